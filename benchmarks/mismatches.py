"""How often a backend draws another token than the CPU's, and whether precision explains each.

Requests of all tasks, N seeds each, are decoded on both. Until the first wave in which tokens
differ, both were fed the same, so draws of that wave and of those before are compared and later
ones are not: what differs there follows from what differed before. Of each compared draw: by how
much its logits differ, and its margin: how far off logits may be, each in any direction, without
another token being drawn. A draw that differs though its margin exceeds what its logits differ by
is unexplained. Drawn at temperature 1, without top-k and top-p.

ONNX Runtime gives no logits of the steps that it records, so that those are others. Then requests
are generated again, as many side by side as --batches says, one number after the other, by steps
that are recorded and by steps of the same sizes that are not. Of these all tokens must be equal.

The last line is JSON; exit code 1 if a draw is unexplained, if more than --most-differing of them
differ, or if a recorded step gave other tokens.

    python benchmarks/mismatches.py BUNDLE --backend tensorrt
    python benchmarks/mismatches.py BUNDLE --backend onnxruntime-cpu --reference native-cpu
    python benchmarks/mismatches.py HALF --backend onnxruntime-cuda --reference-bundle BUNDLE
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from hardware import hardware
from throughput import mixed

from nuwa.runtime.backends.base import BACKENDS, ONNXRUNTIME_CPU, ONNXRUNTIME_CUDA
from nuwa.runtime.backends.choice import make_backend
from nuwa.runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda
from nuwa.runtime.backends.onnxruntime_step import DeviceStep
from nuwa.runtime.bundle import open_bundle
from nuwa.runtime.core import GenerationRequest
from nuwa.runtime.engine import Engine, cache_slots, condition_slots, usual_rows

ONE = 1 << 24  # as the likeliest token weighs in training/sampling.py
ROUNDING = 2.0**-20  # of weights, relative: exponentials and products in fp32


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--reference", choices=BACKENDS, default=ONNXRUNTIME_CPU)
    parser.add_argument("--reference-bundle", type=Path, help="of another precision, say")
    parser.add_argument("--seeds", type=int, default=16, help="generations a task (%(default)s)")
    parser.add_argument("--tasks", nargs="+", help="of the bundle's (default: all)")
    parser.add_argument("--level", default="digits", help="of the sprites (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--most-differing", type=float, default=0.01, help="share of draws (%(default)s)"
    )
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[1, 32, 1],
        metavar="N",
        help=f"recorded and unrecorded steps of {ONNXRUNTIME_CUDA} (%(default)s)",
    )
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    reference = decoder(options.reference_bundle or options.bundle, options.reference, options)
    other = decoder(options.bundle, options.backend, options)
    requests: dict[str, list[GenerationRequest]] = {}
    for request in mixed(reference.engine, options.seeds, options.level):
        sampling = replace(request.sampling, temperature=1.0, top_k=0, top_p=1.0)
        requests.setdefault(str(request.task), []).append(replace(request, sampling=sampling))
    for task in options.tasks or []:
        if task not in requests:
            parser.error(f"task {task!r} is not one of {', '.join(requests)}")
    report: dict[str, Any] = {
        "hardware": hardware(options.threads),
        "bundle": other.engine.info.name,
        "precision": other.engine.info.precision,
        "backend": other.engine.info.backend,
        "reference_precision": reference.engine.info.precision,
        "reference": reference.engine.info.backend,
        "tasks": {},
    }
    for task in options.tasks or requests:
        pairs = [compared(reference.calls(each), other.calls(each)) for each in requests[task]]
        report["tasks"][task] = row = summary(pairs)
        print(
            f"{task:5} {row['differing']:4} of {row['draws']:7} draws differ ({row['rate']:.1e}), "
            f"{row['unexplained']} unexplained; {row['generations_differing']} of "
            f"{row['generations']} generations. Logits differ by {row['median_error']:.1e}, at "
            f"most {row['most_error']:.1e}; {row['within_error']:.1e} of margins are no greater",
            flush=True,
        )
    rows = report["tasks"].values()
    for name in ("draws", "differing", "unexplained"):
        report[name] = sum(row[name] for row in rows)
    report["rate"] = report["differing"] / max(1, report["draws"])
    report["most_differing"] = options.most_differing
    report["recorded"] = None
    if options.backend == ONNXRUNTIME_CUDA:
        del reference, other  # what they have on the GPU
        report["recorded"] = row = recorded(
            *(batch_engine(options, recording=each) for each in (True, False)),
            requests[next(iter(options.tasks or requests))],
            options.batches,
        )
        print(
            f"recorded steps: {row['differing']} of {row['generations']} generations differ from "
            f"those of unrecorded ones; sizes were recorded {row['graphs']} times",
            flush=True,
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    wrong = report["recorded"] is not None and report["recorded"]["differing"] > 0
    return int(report["unexplained"] > 0 or report["rate"] > options.most_differing or wrong)


@dataclass(frozen=True)
class Call:
    """The draws of a call of the backend: places [T], tokens [T], uniform [T], logits [T, K]."""

    places: np.ndarray
    tokens: np.ndarray
    uniform: np.ndarray
    logits: np.ndarray


class Decoder:
    """Generates on a backend that keeps its logits, one request at a time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._backend, self._step = engine._backend, engine._backend.step
        self._calls: list[Call] = []
        self._backend.step = self._watched  # type: ignore[method-assign]

    def calls(self, request: GenerationRequest) -> list[Call]:
        """All in which something was drawn."""
        self._calls = []
        prepared = self.engine.prepare(request)
        self.engine.admit(prepared, 0)
        done = False
        while not done:
            (step,) = self.engine.step()
            if step.error is not None:
                raise step.error
            done = step.done
        self.engine.release(0)
        prepared.close()
        return self._calls

    def _watched(self, parts: Any) -> list[bool]:
        finite = self._step(parts)
        (part,) = parts
        rows, those = part.stream.rows, slice(part.first, part.first + part.count)
        drawn = rows.given[those] < 0
        if drawn.any():
            places = rows.place[those][drawn]
            tokens = self._backend.tokens(part.stream, 0, part.stream.held)[places]
            # Of a guided stream the rows of its first lane, which come first, have the logits that
            # are drawn from.
            logits = self._backend.logits[: part.count][drawn].copy()
            self._calls.append(Call(places, tokens, rows.uniform[those][drawn], logits))
        return finite


def decoder(folder: Path, backend: str, options: argparse.Namespace) -> Decoder:
    """Of a bundle on a backend, for one request at a time."""
    bundle = open_bundle(folder)
    made = make_backend(
        backend,
        bundle,
        cache_slots=cache_slots(1),
        condition_slots=condition_slots(1),
        rows=usual_rows(1, bundle.manifest.config.decoder),
        threads=options.threads,
        logits=True,
    )
    return Decoder(Engine(bundle, made, slots=1))


def batch_engine(options: argparse.Namespace, *, recording: bool) -> Engine:
    """For as many requests side by side as there are at most; its calls are padded in any case."""
    bundle, slots = open_bundle(options.bundle), max(options.batches)
    backend = OnnxRuntimeCuda(
        bundle,
        cache_slots=cache_slots(slots),
        condition_slots=condition_slots(slots),
        rows=usual_rows(slots, bundle.manifest.config.decoder),
        threads=options.threads,
        recording=recording,
    )
    return padding(Engine(bundle, backend, slots=slots))


def padding(engine: Engine) -> Engine:
    """Makes the calls of an engine on OnnxRuntimeCuda as wide as those that are recorded."""
    if (
        step := _device_step(engine)
    ) is not None:  # else its tokens are on the host, and nothing is recorded
        step.padding = True
    return engine


def _device_step(engine: Engine) -> DeviceStep | None:
    backend = engine._backend
    assert isinstance(backend, OnnxRuntimeCuda), "no other backend's steps are recorded so"
    return backend._step


def recorded(
    recording: Engine, unrecorded: Engine, requests: list[GenerationRequest], batches: list[int]
) -> dict[str, Any]:
    """What two engines make of the same requests, of which there are as many as batches need.

    graphs: how often a size was recorded, recording: whether sizes still are.
    """
    differing = generations = 0
    for batch in batches:
        seeded = [replace(requests[index % len(requests)], seed=index) for index in range(batch)]
        for mine, theirs in zip(
            together(recording, seeded), together(unrecorded, seeded), strict=True
        ):
            differing += not np.array_equal(mine, theirs)
            generations += 1
    step = _device_step(recording)
    return {
        "batches": batches,
        "generations": generations,
        "differing": differing,
        "graphs": 0 if step is None else step.made,
        "recording": step is not None and step.recording,
    }


def together(engine: Engine, requests: list[GenerationRequest]) -> list[np.ndarray]:
    """The tokens i32 [F, h, w] of requests that are decoded side by side."""
    prepared = [engine.prepare(each) for each in requests]
    for slot, each in enumerate(prepared):
        engine.admit(each, slot)
    frames: dict[int, list[np.ndarray]] = {slot: [] for slot in range(len(requests))}
    left = set(frames)
    while left:
        for step in engine.step():
            if step.error is not None:
                raise step.error
            frames[step.slot] += [tokens for _, tokens in step.frames]
            if step.done:
                engine.release(step.slot)
                left.discard(step.slot)
    for each in prepared:
        each.close()
    return [np.stack(each) for each in frames.values()]


@dataclass(frozen=True)
class Compared:
    """Of the draws of a generation that can be compared: differ bool [N], margin and error [N]."""

    differ: np.ndarray
    margin: np.ndarray
    error: np.ndarray


def compared(reference: list[Call], other: list[Call]) -> Compared:
    """Draws up to the first wave with one that differs."""
    found = {
        place: (call.tokens[row], call.logits[row])
        for call in other
        for row, place in enumerate(call.places.tolist())
    }
    waves = []
    for call in reference:
        tokens, logits = zip(*(found[place] for place in call.places.tolist()), strict=True)
        differ = call.tokens != np.array(tokens)
        error = np.abs(call.logits.astype(np.float64) - np.stack(logits)).max(axis=1)
        waves.append((differ, margins(call.logits, call.uniform, call.tokens), error))
        if differ.any():
            break
    return Compared(*(np.concatenate(each) for each in zip(*waves, strict=True)))


def margins(logits_TK: np.ndarray, uniform_T: np.ndarray, tokens_T: np.ndarray) -> np.ndarray:
    """f64 [T]: tokens stay what they are where no logit is off by more; -inf where any is too much.

    A token is drawn if the odds of all up to it exceed those of the uniform number, and the odds of
    all before it do not. Logits that are off by e change odds by a factor of at most exp(2e). Whole
    weights lose less than 1 each, here 2, which it may be after that factor while e < log(2).
    """
    logits_TK = logits_TK.astype(np.float64)
    weights_TK = np.exp(logits_TK - logits_TK.max(axis=1, keepdims=True)) * ONE
    sums_TK = weights_TK.cumsum(axis=1)
    rows, codes = np.arange(len(tokens_T)), logits_TK.shape[1]
    up_to, total = sums_TK[rows, tokens_T], sums_TK[:, -1]
    before = np.where(tokens_T > 0, sums_TK[rows, tokens_T - 1], 0.0)
    u, less = uniform_T.astype(np.float64), 1 - ROUNDING
    with np.errstate(divide="ignore", invalid="ignore"):
        above = (up_to * less - 2 * (tokens_T + 1)) * (1 - u) / (u * (total - up_to) / less)
        below = u * ((total - before) * less - 2 * (codes - tokens_T)) / ((1 - u) * before / less)
        least = 0.5 * np.log(np.minimum(above, below))
    return np.nan_to_num(least, nan=-np.inf, posinf=np.inf, neginf=-np.inf)


def summary(pairs: list[Compared]) -> dict[str, Any]:
    """Of all generations of a task; within_error: share of draws that could have differed."""
    differ, margin, error = (
        np.concatenate([getattr(each, name) for each in pairs])
        for name in ("differ", "margin", "error")
    )
    return {
        "generations": len(pairs),
        "generations_differing": sum(bool(each.differ.any()) for each in pairs),
        "draws": len(differ),
        "differing": int(differ.sum()),
        "rate": float(differ.mean()),
        "unexplained": int((differ & (margin > error)).sum()),
        "within_error": float((margin <= error).mean()),
        "median_error": float(np.median(error)),
        "most_error": float(error.max()),
    }


if __name__ == "__main__":
    sys.exit(main())
