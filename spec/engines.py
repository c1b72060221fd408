"""TensorRT engines in a bundle: where they lie, what they were built for, which of them fit.

    engines/<key>/engines.json       an EngineRecord
    engines/<key>/<graph>.engine     as TensorRT serialized it

Knows no TensorRT: whoever has one says what it is. An engine of anything else is refused by what
the record says, before its bytes are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from .manifest import BundleError, Manifest, graph_file

ENGINES = "engines"
RECORD = "engines.json"
RECORD_VERSION = 1
TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"
RUNTIMES = (TENSORRT, TENSORRT_RTX)
MODULES = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx"}
PACKAGES = {TENSORRT: "tensorrt-cu13", TENSORRT_RTX: "tensorrt-rtx-cu13"}
MOST_SORTED = 3840  # that a TopK of either runtime gives at most, as NvInfer.h says of ITopKLayer


def widest_sort(codebook_size: int) -> int:
    """The most that W, the length of decoder_step's input `ranks`, may be in an engine."""
    return min(codebook_size, MOST_SORTED)


def engine_file(graph: str) -> str:
    """File name of a graph's engine."""
    return f"{graph}.engine"


def version_number(text: str) -> str:
    """The numbers of what a TensorRT says of its version, at most four: "11.4.0.106"."""
    return ".".join(re.findall(r"\d+", text)[:4])


def graphs_hash(manifest: Manifest) -> str:
    """SHA-256 over the hashes of a bundle's graphs and of their weights, in hexadecimal."""
    graphs = tuple(graph_file(graph) for graph in manifest.graphs)  # large weights: name.onnx.data
    hashes = [digest for name, digest in sorted(manifest.files.items()) if name.startswith(graphs)]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


@dataclass(frozen=True)
class EngineKey:
    """What engines are for. runtime: one of RUNTIMES; version: its own, "11.4.0.106"; targets: the
    GPUs' architectures, "sm_90"; plugin_abi: of the plugin library, None for engines of standard
    operators alone; graphs: graphs_hash of their bundle; gpu: the model of GPU that TensorRT chose
    kernels for, "NVIDIA H200", "" for engines of TensorRT-RTX, which are for all of their targets.
    """

    runtime: str
    version: str
    targets: tuple[str, ...]
    plugin_abi: int | None
    graphs: str
    gpu: str = ""

    @property
    def name(self) -> str:
        """Of their folder."""
        operators = "functions" if self.plugin_abi is None else f"plugin{self.plugin_abi}"
        targets = "+".join(self.targets)
        if self.gpu:
            targets += "-" + "_".join(re.findall("[a-z0-9]+", self.gpu.lower()))
        return "-".join((self.runtime, self.version, targets, operators, self.graphs[:12]))


@dataclass(frozen=True)
class EngineRecord:
    """engines.json. slots, rows: of the engines' profiles, the requests that decode side by side
    and the upper ends of the ranges of rows; version_compatible: whether later versions of the same
    major one can run them; files: SHA-256 by file name; created: UTC, ISO 8601.
    """

    key: EngineKey
    slots: int
    rows: tuple[int, ...]
    version_compatible: bool
    files: dict[str, str]
    created: str
    record_version: int = RECORD_VERSION

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal record."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> EngineRecord:
        """BundleError if the text is not a record of this version."""
        try:
            data = json.loads(text)
            version = data["record_version"]
            if version != RECORD_VERSION:
                raise BundleError(f"its record has version {version}, this is {RECORD_VERSION}")
            key = data["key"] | {"targets": tuple(data["key"]["targets"])}
            return cls(**data | {"key": EngineKey(**key), "rows": tuple(data["rows"])})
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, BundleError):
                raise
            raise BundleError(f"its record cannot be read: {error}") from None


def misfit(record: EngineRecord, wanted: EngineKey, slots: int) -> str:
    """Why engines cannot be used as `wanted`, whose targets are one GPU's; "" if they can."""
    key = record.key
    if key.runtime != wanted.runtime:
        return f"for {key.runtime}"
    if key.graphs != wanted.graphs:
        return "of other graphs than this bundle's"
    if key.version != wanted.version:
        of, here = (tuple(map(int, each.split("."))) for each in (key.version, wanted.version))
        if not (record.version_compatible and of[0] == here[0] and of <= here):
            return f"built with {key.runtime} {key.version}, and this is {wanted.version}"
    if not set(wanted.targets) <= set(key.targets):
        return f"for {', '.join(key.targets)}, and this GPU is {', '.join(wanted.targets)}"
    if key.gpu != wanted.gpu:
        return f"for {key.gpu or 'no known GPU'}, and this is {wanted.gpu}"
    if key.plugin_abi not in (None, wanted.plugin_abi):
        have = "there is none" if wanted.plugin_abi is None else f"this is {wanted.plugin_abi}"
        return f"for version {key.plugin_abi} of the plugin library, and {have}"
    if record.slots != slots:
        return f"for {record.slots} slots, not {slots}"
    return ""


def find_engines(bundle: Path, wanted: EngineKey, slots: int) -> tuple[Path, EngineRecord]:
    """The folder and record of a bundle's engines that fit; those with the plugin before others.

    BundleError with why each of those there are does not fit, and what to do.
    """
    reasons, fitting = [], []
    for path in sorted((bundle / ENGINES).glob(f"[!.]*/{RECORD}")):  # others are being written
        try:
            record = EngineRecord.from_json(path.read_text())
            reason = misfit(record, wanted, slots)
        except BundleError as error:
            reason = str(error)
        if reason:
            reasons.append(f"{path.parent.name} is not it: {reason}")
        else:
            fitting.append((path.parent, record))
    if fitting:
        return max(fitting, key=lambda each: each[1].key.plugin_abi is not None)
    target = wanted.gpu or ", ".join(wanted.targets)
    there = "; ".join(reasons) if reasons else "there are none at all"
    raise BundleError(
        f"{bundle} has no engines for {wanted.runtime} {wanted.version} on {target} with {slots} "
        f"slots ({there}); build them with `{_command(bundle, wanted, slots)}`"
    )


def _command(bundle: Path, wanted: EngineKey, slots: int) -> str:
    """That builds engines which fit, with the plugin where there is one."""
    words = ["nuwa build-engines", str(bundle), "--runtime", wanted.runtime]
    if wanted.runtime == TENSORRT_RTX:  # TensorRT takes no other than the GPU it runs on
        words += [word for target in wanted.targets for word in ("--target", target)]
    words += ["--slots", str(slots)]
    if wanted.plugin_abi is not None:
        words.append("--plugins")
    return " ".join(words)
