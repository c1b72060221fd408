"""The manifest of a bundle: what model it holds, which files, how exact, under which licence.

Also the names of a bundle's graphs and of their inputs and outputs. Reads and writes JSON text;
opening a folder and checking its files is the runtime's work (runtime/bundle.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import ModelConfig
from .sampling import Sampling, sampling_defaults
from .tasks import Task

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
TEXT_TOKENIZER = "tokenizer.json"
# The storage type of weights and caches; of int8 and fp8 only the matrices of decoder_step are, and
# all else is fp32 or bf16.
PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8")

DECODER_STEP = "decoder_step"
TEXT_ENCODER = "text_encoder"
IMAGE_TOKENIZER = "image_tokenizer"
IMAGE_DETOKENIZER = "image_detokenizer"
GRAPHS = (DECODER_STEP, TEXT_ENCODER, IMAGE_TOKENIZER, IMAGE_DETOKENIZER)  # in every bundle
VISUAL_ENCODER = "visual_encoder"
SKETCH_TOKENIZER = "sketch_tokenizer"
RANKER = "ranker"
RANKERS = ("clip",)  # the name in requests of what the graph `ranker` computes

STEP_ROW_INPUTS = (
    *("tokens", "coordinates", "slot", "write_index", "neighbours"),
    *("condition_slot", "cross_neighbours"),
    *("temperature", "top_k", "top_p", "uniform", "guidance", "unconditional_row"),
)
# Metadata of a graph: weights that go by another one's name, and such that lie there transposed.
WEIGHT_ALIASES, WEIGHT_TRANSPOSES = "nuwa.aliases", "nuwa.transposes"
VISUAL_ENCODER_INPUTS = ("tokens", "coordinates", "neighbours")
RANKER_INPUTS = ("tokens", "frames")

# Fields that say when, where and how exactly a bundle was made, and not what it computes.
_OF_THE_EXPORT = ("created", "parity")

_HASH = re.compile(r"[0-9a-f]{64}")
# One path component that means the same file on every system.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class BundleError(ValueError):
    """A folder is not a bundle that this version can use; the message says why and what to do."""


def graph_file(graph: str) -> str:
    """File name of a graph in a bundle."""
    return f"{graph}.onnx"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def layer_names(kind: str, layers: int) -> list[str]:
    """`kind_0`, `kind_1`, ...: kind is key_cache, value_cache, cross_key or cross_value."""
    return [f"{kind}_{layer}" for layer in range(layers)]


def graph_names(config: ModelConfig, ranker: bool = False) -> tuple[str, ...]:
    """The graphs of a bundle of this model, with or without a ranker."""
    visual = () if config.visual is None else (VISUAL_ENCODER,)
    sketch = () if config.sketch is None else (SKETCH_TOKENIZER,)
    return (*GRAPHS, *visual, *sketch, *((RANKER,) if ranker else ()))


def step_call_inputs(config: ModelConfig) -> list[str]:
    """Inputs of decoder_step that every call brings, in order: by row, then for the whole call."""
    visual = [] if config.visual is None else ["cross_columns"]
    return [*STEP_ROW_INPUTS, "ranks", *visual]


def decoder_step_inputs(config: ModelConfig) -> list[str]:
    """Inputs of decoder_step, in order."""
    caches = [
        name
        for kind in ("key_cache", "value_cache", "cross_key", "cross_value")
        for name in layer_names(kind, config.decoder.layers)
    ]
    return [*step_call_inputs(config), *caches]


def decoder_step_outputs(layers: int) -> list[str]:
    """Outputs of decoder_step, in order; bind each cache output to its input's memory."""
    caches = [*layer_names("key_cache", layers), *layer_names("value_cache", layers)]
    return ["next_tokens", "logits", *(f"{name}_out" for name in caches)]


def condition_outputs(layers: int) -> list[str]:
    """Outputs of text_encoder and of visual_encoder, in order."""
    return [*layer_names("cross_key", layers), *layer_names("cross_value", layers)]


@dataclass(frozen=True)
class Manifest:
    """manifest.json.

    cache_entries: R, entries of a cache slot; files: SHA-256 of every other file by name; parity:
    per graph, how far ONNX Runtime is from PyTorch (see export/verify.py); parameter_count: all
    weights, tokenizers and ranker included; licence and training_data: of the weights, as their
    checkpoint states them; created: UTC, ISO 8601; rankers: names of RANKERS; sampling: what
    requests that do not say get, by task, Sampling() for those not named.
    """

    name: str
    config: ModelConfig
    tasks: tuple[Task, ...]
    precision: str
    opset: int
    cache_entries: int
    files: dict[str, str]
    parity: dict[str, dict[str, Any]]
    parameter_count: int
    licence: str
    training_data: str
    created: str
    rankers: tuple[str, ...] = ()
    sampling: dict[Task, Sampling] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def graphs(self) -> tuple[str, ...]:
        """The bundle's graphs."""
        return graph_names(self.config, bool(self.rankers))

    @property
    def contents_hash(self) -> str:
        """SHA-256, in hexadecimal, of what the bundle computes and with what: the same for exports
        of one checkpoint that came to the same files, whenever they were made.
        """
        data = dataclasses.asdict(self)
        kept = {name: value for name, value in data.items() if name not in _OF_THE_EXPORT}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal manifest."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Manifest from `to_json`'s text; BundleError for anything unknown, missing or invalid."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise BundleError(
                f"{MANIFEST} is not JSON ({error}); export the bundle again"
            ) from None
        if not isinstance(data, dict) or "format_version" not in data:
            raise BundleError(f"{MANIFEST} names no format_version; it is not that of a bundle")
        version = data["format_version"]
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{MANIFEST} has format version {version!r}, this nuwa-runtime reads "
                f"{FORMAT_VERSION}; install the nuwa-runtime it was exported with, or export the "
                f"checkpoint again with this one"
            )
        return cls(**_checked(data))


def _checked(data: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Manifest from parsed JSON, each of its type."""
    fields = {each.name for each in dataclasses.fields(Manifest)}
    missing, unknown = sorted(fields - set(data)), sorted(set(data) - fields)
    if missing or unknown:
        raise BundleError(
            f"{MANIFEST} lacks {missing} and has unknown fields {unknown}; it does not follow "
            f"format version {FORMAT_VERSION}: export the bundle again"
        )
    for name in ("name", "licence", "training_data", "created"):
        _require(isinstance(data[name], str), name, data[name], "a string")
    for name in ("opset", "cache_entries", "parameter_count"):
        _require(_is_positive(data[name]), name, data[name], "a positive integer")
    _require(data["precision"] in PRECISIONS, "precision", data["precision"], f"in {PRECISIONS}")
    rankers = data["rankers"]
    known = isinstance(rankers, list) and rankers in ([], list(RANKERS))
    _require(known, "rankers", rankers, f"[] or {list(RANKERS)}")
    parity = data["parity"]
    objects = isinstance(parity, dict) and all(isinstance(v, dict) for v in parity.values())
    _require(objects, "parity", parity, "an object of objects")
    parsed = _parsed(data)
    _check_files(data["files"], graph_names(parsed["config"], bool(rankers)))
    return data | parsed


def _parsed(data: dict[str, Any]) -> dict[str, Any]:
    try:
        config = ModelConfig.from_dict(data["config"])
        tasks = tuple(Task(task) for task in data["tasks"])
        sampling = sampling_defaults(data["sampling"], tasks)
    except (ValueError, TypeError) as error:
        raise BundleError(f"{MANIFEST} cannot be used: {error}") from None
    return {
        "config": config,
        "tasks": tasks,
        "rankers": tuple(data["rankers"]),
        "sampling": sampling,
    }


def _check_files(files: Any, graphs: tuple[str, ...]) -> None:
    _require(isinstance(files, dict), "files", files, "an object")
    for name, digest in files.items():
        plain = _FILE_NAME.fullmatch(name) is not None and name != MANIFEST
        _require(plain, "files", name, "a list of plain file names inside the folder")
        hashed = isinstance(digest, str) and _HASH.fullmatch(digest) is not None
        _require(hashed, f"files[{name}]", digest, "a SHA-256 in hexadecimal")
    needed = [*map(graph_file, graphs), TEXT_TOKENIZER]
    absent = [name for name in needed if name not in files]
    _require(not absent, "files", sorted(files), f"complete: {absent} missing")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _require(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        raise BundleError(f"{MANIFEST}: {name} is {value!r}, not {wanted}; export the bundle again")
