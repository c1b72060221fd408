"""What a generation must read and compute at least, before anything is measured: its card.

From the manifest and the schedules of nuwa.spec alone; no graph is opened and nothing runs. Counted
are the decoder's steps: matrices, keys and values, conditions. Activations, norms, biases, tables,
encoders and pixels are not, so it cannot be done with less.

Legend: T rows of a step, h, w cells of a frame.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nuwa.spec.conditions import lane_texts, visual_window
from nuwa.spec.config import DecoderConfig, ModelConfig
from nuwa.spec.grid import Grid, Int
from nuwa.spec.manifest import Manifest
from nuwa.spec.plan import Call, Plan, RollingPlan, completion_plan, decode_plan
from nuwa.spec.tasks import Task

from ..backends.base import NATIVE_CPU, ONNXRUNTIME_CPU
from ..bundle import manifest_hash, read_manifest

# Of a number in a step's matrices, and of one in the caches, as bundles have them.
WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1}
CACHE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 2, "int8": 4}
PRODUCTS = {"fp8": "bf16"}  # a bundle's precision -> that of the numbers it multiplies, if another
HALF = ("aarch64", "arm64")  # processors on which ONNX Runtime has products of fp16
SHORTEST_TEXT = 2  # tokens: where it begins and ends
REPORTS = ("evaluate*.json", "evaluation*.json", "report.json")
SETTINGS = ("evaluator", "level", "split", "samples", "seed", "unfinished")
FIGURES = ("model", "low", "high", "real", "reconstructed", "samples")


@dataclass(frozen=True)
class Storage:
    """What a backend holds in memory of a bundle. weight_bytes, cache_bytes: of a number in a
    step's matrices, and in the caches; products: the precision of the numbers that it multiplies.
    """

    weight_bytes: int
    cache_bytes: int
    products: str


def storage_of(precision: str, backend: str = "", processor: str | None = None) -> Storage:
    """Of a bundle of this precision; backend: "" for one that stores what the bundle does;
    processor: of platform.machine(), by default of this machine.

    Processors without arithmetic of fp16 compute in fp32: native-cpu keeps caches in it, and
    weights where it has no instructions that read fp16 (level 0); ONNX Runtime keeps weights in
    it, which it converts when it loads them, and caches in fp16. Of bf16 native-cpu multiplies
    weights, and ONNX Runtime has everything in fp32.
    """
    own = Storage(
        WEIGHT_BYTES[precision], CACHE_BYTES[precision], PRODUCTS.get(precision, precision)
    )
    if precision == "bf16" and backend == NATIVE_CPU:
        return replace(own, cache_bytes=CACHE_BYTES["fp32"])
    if precision == "bf16" and backend == ONNXRUNTIME_CPU:
        return storage_of("fp32")
    if precision != "fp16":
        return own
    if backend == NATIVE_CPU:
        return replace(own, cache_bytes=CACHE_BYTES["fp32"], products="fp32")
    if backend == ONNXRUNTIME_CPU and (processor or platform.machine()) not in HALF:
        return replace(own, weight_bytes=WEIGHT_BYTES["fp32"], products="fp32")
    return own


Shapes = list[tuple[int, int]]
Bool = npt.NDArray[np.bool_]


def products(model: ModelConfig) -> Shapes:
    """(inputs, outputs) of a step's linear layers, the head's last."""
    decoder = model.decoder
    d, inner = decoder.width, decoder.ff_multiplier * decoder.width
    layer = [(d, 3 * d), (d, d), (d, d), (d, d), (d, 2 * inner), (inner, d)]
    return layer * decoder.layers + [(d, model.image.codebook_size)]


def step_flops(model: ModelConfig, rows: int) -> float:
    """Floating-point operations of a step's products; attention adds a few percent."""
    return 2.0 * rows * sum(inputs * outputs for inputs, outputs in products(model))


def weights_bytes(model: ModelConfig, weight_bytes: int = 4) -> float:
    """Bytes of the weights that a step multiplies with."""
    return weight_bytes * sum(inputs * outputs for inputs, outputs in products(model))


@dataclass(frozen=True)
class Step:
    """rows: T, all lanes of all samples; drawn: those of them whose logits are needed; bytes: that
    must be read or written; flops: of the products.
    """

    rows: int
    drawn: int
    bytes: int
    flops: float


@dataclass(frozen=True)
class Card:
    """A generation of `samples` samples side by side, each step of all of them one call.

    lanes: rows for each position of a sample, two where guidance compares with no prompt;
    given_frames: of V2V; precision: of the bundle, products_precision: of the numbers that are
    multiplied; parameters: of the whole bundle; weights_bytes: of a step's matrices;
    flops_per_row: of the products; cache_bytes: keys and values of one sample, all its lanes;
    head_bytes: of its last matrix, which a step that draws nothing leaves out; steps: of the
    schedule; first_frame_steps: after how many of them the first frame that was not given can be
    seen; wave_steps, one_by_one_steps: how many either schedule has.
    """

    name: str
    task: Task
    frames: int
    given_frames: int
    samples: int
    guidance: float
    lanes: int
    schedule: str
    precision: str
    products_precision: str
    parameters: int
    weights_bytes: int
    head_bytes: int
    flops_per_row: float
    cache_bytes: int
    wave_steps: int
    one_by_one_steps: int
    first_frame_steps: int
    steps: tuple[Step, ...]

    @property
    def bytes(self) -> int:
        """Of all steps."""
        return sum(step.bytes for step in self.steps)

    @property
    def flops(self) -> float:
        """Of all steps' products."""
        return sum(step.flops for step in self.steps)

    @property
    def row_counts(self) -> list[int]:
        """The different T, in order."""
        return sorted({step.rows for step in self.steps})

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "name": self.name,
            "task": str(self.task),
            "frames": self.frames,
            "given_frames": self.given_frames,
            "samples": self.samples,
            "guidance_scale": self.guidance,
            "rows_per_position": self.lanes,
            "schedule": self.schedule,
            "precision": self.precision,
            "products_precision": self.products_precision,
            "parameters": self.parameters,
            "weights_bytes": self.weights_bytes,
            "flops_per_row": self.flops_per_row,
            "cache_bytes_per_sequence": self.cache_bytes,
            "steps": len(self.steps),
            "wave_steps": self.wave_steps,
            "one_by_one_steps": self.one_by_one_steps,
            "first_frame_steps": self.first_frame_steps,
            "rows_per_step": [step.rows for step in self.steps],
            "generation_bytes": self.bytes,
            "generation_flops": self.flops,
        }


def card(
    manifest: Manifest,
    task: Task,
    *,
    frames: int = 1,
    samples: int = 1,
    guidance: float = 1.0,
    schedule: str = "wave",
    precision: str | None = None,
    given_frames: int = 0,
    known: Bool | None = None,
    prompt: bool | None = None,
    text_length: int | None = None,
    backend: str = "",
) -> Card:
    """The card of a request; ValueError for one that this model cannot be asked.

    precision: of the bundle, if not another; given_frames: of V2V; known: bool [h, w], the cells
    outside a task's mask, none by default (spec.known.known_cells); prompt: whether there is one,
    by default where the task needs it; text_length: tokens of it, by default the fewest there can
    be; backend: that runs it, by default one that stores what the bundle does (storage_of).
    """
    config, decoder = manifest.config, manifest.config.decoder
    precision = precision or manifest.precision
    prompt = task.needs_text if prompt is None else prompt
    _check(manifest, task, frames, samples, given_frames, precision)
    kept = _kept(task, Grid(frames, decoder.grid.height, decoder.grid.width), given_frames, known)
    plans = {kind: _plan(decoder, frames, given_frames, kept, kind) for kind in ("wave", "raster")}
    if schedule not in plans:
        raise ValueError(f"schedule {schedule!r} is not one of 'wave', 'raster'")
    lanes = len(lane_texts("a prompt" if prompt else "", guidance))
    head = decoder.width * config.image.codebook_size
    stored = storage_of(precision, backend)
    costs = _Costs(config, stored, lanes, samples, text_length)
    visual = None
    if task.needs_sketch or (task.needs_mask and kept.any() and config.visual is not None):
        visual = visual_window(config, plans[schedule].grid)
    return Card(
        name=manifest.name,
        task=task,
        frames=frames,
        given_frames=given_frames,
        samples=samples,
        guidance=guidance,
        lanes=lanes,
        schedule=schedule,
        precision=precision,
        products_precision=stored.products,
        parameters=manifest.parameter_count,
        weights_bytes=int(weights_bytes(config, stored.weight_bytes)),
        head_bytes=stored.weight_bytes * head,
        flops_per_row=step_flops(config, 1),
        cache_bytes=lanes * manifest.cache_entries * decoder.layers * costs.entry_bytes,
        wave_steps=plans["wave"].steps,
        one_by_one_steps=plans["raster"].steps,
        first_frame_steps=_first_frame_steps(plans[schedule], given_frames),
        steps=costs.steps(plans[schedule], kept, visual),
    )


def evaluation_of(
    bundle: Path, scores: Path | None = None
) -> tuple[dict[str, Any] | None, str | None]:
    """(scores of `nuwa evaluate` by task, None), or (None, why there are none).

    Looked for in the folder of the bundle, or in `scores`, a report or a folder of such. Only a
    report counts that names this very bundle, or another export that came to the same files, of
    which a remark in place of the None says so; of a task that several have, the first by name
    does. BundleError if there is no bundle.
    """
    place, own = scores or bundle, manifest_hash(bundle)
    files = [place] if place.is_file() else _reports(place)
    if not files:
        return None, f"{place} has none of {', '.join(REPORTS)}"
    tasks: dict[str, Any] = {}
    reasons, exports = [], []
    for file in files:
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
            about = report["about"]["bundle_hash"]
            found = {task: _scores(result) for task, result in report["tasks"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            reasons.append(f"{file.name} is no report of `nuwa evaluate`")
            continue
        if about != own:
            hashes = report["about"].get("files")
            if not hashes or hashes != read_manifest(bundle).files:
                reasons.append(
                    f"{file.name} is of bundle {str(about)[:12]}, this one is {own[:12]}"
                )
                continue
            if found:
                exports.append(f"{file.name} is of another export with the same files")
        settings = {name: report[name] for name in SETTINGS if name in report}
        tasks = {
            task: {"report": file.name, **settings, "scores": each} for task, each in found.items()
        } | tasks
    if tasks:
        return tasks, "; ".join(exports) or None
    return None, "; ".join(reasons) or "the reports have no scores"


class _Costs:
    """What a step of `samples` samples in lockstep moves and computes."""

    def __init__(
        self,
        config: ModelConfig,
        stored: Storage,
        lanes: int,
        samples: int,
        text_length: int | None,
    ) -> None:
        decoder, text = config.decoder, config.text
        self.entry_bytes = 2 * decoder.width * stored.cache_bytes  # key and value, a layer
        self._layers = decoder.layers
        self._windows = Counter(map(decoder.neighbour_columns, range(decoder.layers)))
        self._lanes, self._samples = lanes, samples
        *layers, head = (inputs * outputs for inputs, outputs in products(config))
        self._weights, self._head = sum(layers), head
        self._weight_bytes = stored.weight_bytes
        least = SHORTEST_TEXT if text.mask_padding else text.length
        # A guided sample reads two texts: the prompt, and the word for none.
        self._text = (text_length or least) + (lanes - 1) * least

    def steps(self, plan: Plan, kept: Bool, visual: Int | None) -> tuple[Step, ...]:
        """kept: bool [N], whose tokens are given; visual: i32 [N, v], as of visual_window."""
        return tuple(self._step(call, kept, visual) for call in map(plan.call, range(plan.steps)))

    def _step(self, call: Call, kept: Bool, visual: Int | None) -> Step:
        rows = self._lanes * self._samples * len(call.position)
        drawn = self._lanes * self._samples * int((~kept[call.position]).sum())
        conditions = self._text  # which samples share
        if visual is not None:
            conditions += _distinct(visual[call.position])
        entries = self._layers * conditions
        entries += self._lanes * self._samples * self._touched(call)
        head = self._head if drawn else 0
        return Step(
            rows=rows,
            drawn=drawn,
            bytes=self._weight_bytes * (self._weights + head) + self.entry_bytes * entries,
            flops=2.0 * (rows * self._weights + drawn * self._head),
        )

    def _touched(self, call: Call) -> int:
        """Entries of a cache slot that are read or written, each once, over all layers."""
        return sum(
            layers * _distinct(np.append(call.neighbours[:, first:last], call.write_index))
            for (first, last), layers in self._windows.items()
        )


def _distinct(entries: Int) -> int:
    return len(np.unique(entries[entries >= 0]))


def _plan(decoder: DecoderConfig, frames: int, given_frames: int, kept: Bool, kind: str) -> Plan:
    """As the engine makes it."""
    if frames > decoder.grid.frames:
        return RollingPlan(decoder, frames, given_frames, kind)
    grid = Grid(frames, decoder.grid.height, decoder.grid.width)
    if kept.any():
        return completion_plan(decoder, grid, kept, kind)
    return decode_plan(decoder, grid, kind)


def _first_frame_steps(plan: Plan, given_frames: int) -> int:
    cells = plan.grid.height * plan.grid.width
    left = cells
    for step in range(plan.steps):
        left -= int((plan.call(step).position // cells == given_frames).sum())
        if not left:
            return step + 1
    return plan.steps


def _kept(task: Task, grid: Grid, given_frames: int, known: Bool | None) -> Bool:
    """bool [N]: whose tokens are given."""
    kept = np.zeros(grid.shape, bool)
    kept[:given_frames] = True
    if task.needs_mask and known is not None:
        if known.shape != grid.shape[1:]:
            raise ValueError(f"known is {list(known.shape)}, a frame {list(grid.shape[1:])} cells")
        kept[:] = known
    return kept.reshape(-1)


def _check(
    manifest: Manifest, task: Task, frames: int, samples: int, given_frames: int, precision: str
) -> None:
    most = manifest.config.decoder.grid.frames if task.is_video else 1
    sketches = manifest.config.sketch is not None
    able = [each for each in manifest.tasks if sketches or not each.needs_sketch]
    if task not in able:
        raise ValueError(f"task {task} is not one of {', '.join(able)}")
    if frames < 1 or (frames > most and task is not Task.V2V):
        raise ValueError(f"{frames} frames are not in [1, {most}]")
    if samples < 1:
        raise ValueError(f"samples {samples} is not at least 1")
    if (task is Task.V2V) != (given_frames > 0):
        raise ValueError(f"given_frames {given_frames}: V2V is given some, and no other task")
    if given_frames and not given_frames < frames:
        raise ValueError(f"given_frames {given_frames} are not fewer than the {frames} frames")
    if precision not in WEIGHT_BYTES:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(WEIGHT_BYTES)}")


def _reports(folder: Path) -> list[Path]:
    return sorted({file for pattern in REPORTS for file in folder.glob(pattern)})


def _scores(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each score the figures that say what it is worth."""
    return {
        name: {figure: value[figure] for figure in FIGURES if figure in value}
        if isinstance(value, dict)
        else {"model": value}
        for name, value in result["scores"].items()
    }
