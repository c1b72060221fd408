"""Thousands of generations of mixed tasks and lengths: does memory grow, do tokens stay the same?

Requests of all tasks, V2V of several lengths, some with guidance and some without, keep an engine's
slots full. A fifth is cancelled under way. Every request that is not is compared with the first
one like it, until the first token that differs. On a processor none may: a row is computed the same
in any company. On a GPU products of other numbers of rows are summed in another order, so a share
of tokens may differ (mismatches.py measures how many, and why). Memory of the process, and of the
GPU for backends on one, is read once every so many generations; growth is that of the line through
the second half of what was read. The last line is JSON; exit code 1 if more tokens differ than may,
slots are left taken, or memory grows in a long run.

    python benchmarks/soak.py BUNDLE --count 2000
    python benchmarks/soak.py BUNDLE --count 10000 --backend tensorrt
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
from hardware import hardware
from throughput import mixed

from nuwa.runtime.backends.base import AUTO, BACKENDS
from nuwa.runtime.core import GenerationRequest
from nuwa.runtime.engine import load_engine
from nuwa.runtime.handle import Handle
from nuwa.runtime.process import resident_megabytes
from nuwa.runtime.scheduler import Scheduler
from nuwa.spec.tasks import Task

CANCELLED = 0.2
LENGTHS = (3, 10, 17)  # frames of V2V
KINDS = 4  # requests of a task that differ
MOST_DIFFERING = 0.01  # of tokens, on a GPU; until it is measured, what half precision may do
MOST_GROWTH = 5.0  # megabytes in 1000 generations
LONG = 2000  # generations: in fewer, growth is that of allocators' pools, which fill in steps
ON_GPU = ("onnxruntime-cuda", "tensorrt", "tensorrt-rtx")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=10_000, help="generations (%(default)s)")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--level", default="digits", help="of the sprites (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--backend", choices=BACKENDS, default=AUTO)
    parser.add_argument("--readings", type=int, default=50, help="of memory (%(default)s)")
    parser.add_argument(
        "--most-differing",
        type=float,
        help=f"share of tokens (default: 0, on a GPU {MOST_DIFFERING})",
    )
    parser.add_argument(
        "--most-growth",
        type=float,
        default=MOST_GROWTH,
        help=f"megabytes in 1000 generations, of {LONG} and more (%(default)s)",
    )
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    engine = load_engine(
        options.bundle, slots=options.slots, threads=options.threads, backend=options.backend
    )
    requests = [
        _varied(each, index) for index, each in enumerate(mixed(engine, KINDS, options.level))
    ]
    draw, began = random.Random(0), time.perf_counter()
    expected: dict[int, np.ndarray] = {}
    under_way: deque[tuple[int, Handle]] = deque()
    readings: list[dict] = []
    counts = {"finished": 0, "cancelled": 0, "differing": 0, "tokens": 0}
    every = max(1, options.count // options.readings)
    with Scheduler(engine, queue_size=4 * options.slots) as scheduler:
        for number in range(options.count):
            kind = draw.randrange(len(requests))
            handle = scheduler.submit(requests[kind])
            if draw.random() < CANCELLED:
                _cancel(handle, draw)
                counts["cancelled"] += 1
            else:
                under_way.append((kind, handle))
            if len(under_way) >= 2 * options.slots:
                _finish(*under_way.popleft(), expected, counts)
            if (number + 1) % every == 0:
                readings.append(_reading(number + 1, options.backend))
                print(f"{readings[-1]}", flush=True)
        while under_way:
            _finish(*under_way.popleft(), expected, counts)
        deadline = time.perf_counter() + 10
        while (scheduler.active or scheduler.queued) and time.perf_counter() < deadline:
            time.sleep(0.01)
        left = scheduler.active + scheduler.queued
    allowed = options.most_differing
    if allowed is None:
        allowed = MOST_DIFFERING if options.backend in ON_GPU else 0.0
    growth = {name: _growth(readings, name) for name in readings[-1] if name != "generations"}
    share = counts["differing"] / max(1, counts["tokens"])
    problems = {
        "tokens differ": share > allowed,
        "slots are left taken": left > 0,
        "memory grows": options.count >= LONG and max(growth.values()) > options.most_growth,
    }
    report = {
        "hardware": hardware(options.threads),
        "bundle": engine.info.name,
        "precision": engine.info.precision,
        "backend": engine.info.backend,
        "slots": options.slots,
        "seconds": time.perf_counter() - began,
        **counts,
        "slots_left_taken": left,
        "differing_share": share,
        "most_differing": allowed,
        "growth_megabytes_per_1000": growth,
        "most_growth": options.most_growth,
        "problems": [name for name, found in problems.items() if found],
        "readings": readings,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    return int(any(problems.values()))


def _varied(request: GenerationRequest, index: int) -> GenerationRequest:
    """The same with another length, or other guidance."""
    if request.task is Task.V2V:
        return replace(request, frame_count=LENGTHS[index % len(LENGTHS)])
    if index % 2:
        return replace(request, sampling=replace(request.sampling, guidance_scale=1.0))
    return request


def _cancel(handle: Handle, draw: random.Random) -> None:
    """After none or a few events; it may be done by then."""
    for _, _ in zip(range(draw.randrange(4)), handle.events(), strict=False):
        pass
    handle.cancel()


def _finish(
    kind: int, handle: Handle, expected: dict[int, np.ndarray], counts: dict[str, int]
) -> None:
    """Counts a generation, the tokens of it that can be compared, and whether the last of them
    differs; in order of frames, which is nearly that of drawing.
    """
    frames, _ = handle.result()
    ordered = sorted(frames, key=lambda each: each.index)
    tokens = np.concatenate([each.tokens.reshape(-1) for each in ordered])
    differ = tokens != expected.setdefault(kind, tokens)
    counts["finished"] += 1
    counts["differing"] += int(differ.any())
    counts["tokens"] += int(differ.argmax()) + 1 if differ.any() else len(tokens)


def _reading(generations: int, backend: str) -> dict:
    reading = {"generations": generations, "process": resident_megabytes()}
    if backend in ON_GPU:
        from cuda.bindings import runtime

        _, free, total = runtime.cudaMemGetInfo()
        reading["gpu"] = (total - free) / 1e6
    return reading


def _growth(readings: list[dict], name: str) -> float:
    """Megabytes in 1000 generations, of the second half of the readings."""
    half = readings[len(readings) // 2 :]
    if len(half) < 2:
        return 0.0
    counts = np.array([each["generations"] for each in half]) / 1000
    return float(np.polyfit(counts, [each[name] for each in half], 1)[0])


if __name__ == "__main__":
    raise SystemExit(main())
