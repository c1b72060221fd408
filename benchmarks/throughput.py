"""Mixed requests that arrive at once, against the same requests one at a time.

Thirty-two requests, four of each task, with the model's own sampling defaults; pictures, sketches
and clips are those of the sprites' split `val`. Both ways alternate, on engines of the same backend
and as many threads; every request must give the same tokens both ways. Beside them the floor: what
products and convolutions of all requests would take at the rate that this machine's matrix products
have in each round (in bf16 for a bundle of that, else in fp32), and so how many times faster than
one at a time anything could be. Also how long the steps of the crowd take, and how busy the
processors are, waiting actively included. The last line is JSON.

    python benchmarks/throughput.py BUNDLE
    python benchmarks/throughput.py BUNDLE --slots 16 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ceiling import Products, products, step_flops
from hardware import hardware
from work import Work

from nuwa.runtime.backends.base import AUTO, BACKENDS
from nuwa.runtime.bundle import read_manifest
from nuwa.runtime.core import GenerationRequest
from nuwa.runtime.engine import Engine, load_engine
from nuwa.runtime.handle import Handle
from nuwa.runtime.scheduler import Scheduler
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task
from nuwa.training.sprites.world import SpriteWorld

GIVEN = 2  # frames of V2V
ROWS = 256  # of the products whose rate counts; more are no faster

Run = tuple[float, float, list[np.ndarray]]  # seconds, seconds of all processors, tokens by request


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--slots", type=int, default=8, help="of the engine that takes all at once")
    parser.add_argument("--each", type=int, default=4, help="requests of a task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--level", default="digits", help="of the sprites (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--backend", choices=BACKENDS, default=AUTO)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    load = {"threads": options.threads, "backend": options.backend}
    alone = load_engine(options.bundle, slots=1, **load)
    crowd = load_engine(options.bundle, slots=options.slots, **load)
    requests = mixed(crowd, options.each, options.level)
    model = read_manifest(options.bundle).config
    precision = "bf16" if crowd.info.precision == "bf16" else "fp32"
    rate = Products(products(model), options.threads, precision)
    work = Work(options.bundle)
    flops: Counter[str] = Counter()
    for request in requests:
        flops.update(work.flops(request))
    with Scheduler(alone) as one, Scheduler(crowd) as many:
        one_by_one(one, requests[:: options.each])  # warm-up, once a task
        at_once(many, requests[:: options.each])
        steps = time_steps(crowd)
        rounds = []
        for _ in range(options.rounds):
            steps.clear()
            serial, serial_cpu, expected = one_by_one(one, requests)
            together, together_cpu, tokens = at_once(many, requests)
            floor = flops.total() / (step_flops(model, ROWS) / rate.seconds(ROWS))
            equal = all(np.array_equal(a, b) for a, b in zip(expected, tokens, strict=True))
            rounds.append(
                {
                    "one_at_a_time_seconds": serial,
                    "at_once_seconds": together,
                    "ratio": serial / together,
                    "floor_seconds": floor,
                    "most_ratio": serial / floor,
                    "one_at_a_time_busy": serial_cpu / serial / options.threads,
                    "at_once_busy": together_cpu / together / options.threads,
                    "tokens_equal": equal,
                    "step_median_seconds": statistics.median(steps),
                    "step_p99_seconds": float(np.quantile(steps, 0.99)),
                    "step_longest_seconds": max(steps),
                }
            )
            print(
                f"one at a time {serial:.2f} s ({serial_cpu:.2f} s of processors), at once "
                f"{together:.2f} s ({together_cpu:.2f} s), ratio {serial / together:.2f} (at most "
                f"{serial / floor:.2f}: the floor is {floor:.2f} s), "
                f"tokens equal: {equal}; {len(steps)} steps, median "
                f"{1e3 * statistics.median(steps):.1f} ms, p99 "
                f"{1e3 * np.quantile(steps, 0.99):.1f} ms, longest {1e3 * max(steps):.1f} ms",
                flush=True,
            )
    report = {
        "hardware": hardware(options.threads),
        "bundle": crowd.info.name,
        "precision": crowd.info.precision,
        "backend": crowd.info.backend,
        "requests": len(requests),
        "slots": options.slots,
        "flops": dict(flops),
        "products_by": rate.library,
        "ratio": statistics.median(each["ratio"] for each in rounds),
        "most_ratio": statistics.median(each["most_ratio"] for each in rounds),
        "step_p99_over_median": statistics.median(
            each["step_p99_seconds"] / each["step_median_seconds"] for each in rounds
        ),
        "rounds": rounds,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    return 0


def mixed(engine: Engine, each: int, level: str) -> list[GenerationRequest]:
    """`each` requests of every task that the bundle can do, task by task."""
    world, requests = SpriteWorld(level, "val"), []
    for task in engine.info.tasks:
        for index in range(each):
            sample = world.sample(index)
            frames = slice(None) if task.is_video else slice(0, 1)
            caption = sample.video_caption if task.is_video else sample.image_caption
            given = sample.frames[:GIVEN] if task is Task.V2V else sample.frames[frames]
            mask = np.zeros(sample.frames.shape[1:3], bool)
            mask[:, : mask.shape[1] // 2] = True
            requests.append(
                GenerationRequest(
                    task,
                    caption if task.needs_text else "",
                    frame_count=len(sample.frames) if task.is_video else 1,
                    seed=index,
                    sampling=engine.info.sampling.get(task, Sampling()),
                    frames=given if task.needs_frames else None,
                    mask=mask if task.needs_mask else None,
                    sketch=sample.segmentation[frames] if task.needs_sketch else None,
                )
            )
    return requests


def one_by_one(scheduler: Scheduler, requests: list[GenerationRequest]) -> Run:
    """Each submitted when the one before is done."""
    return _timed(lambda: [_tokens(scheduler.submit(request)) for request in requests])


def at_once(scheduler: Scheduler, requests: list[GenerationRequest]) -> Run:
    """All submitted before any is waited for."""

    def run() -> list[np.ndarray]:
        handles = [scheduler.submit(request) for request in requests]
        return [_tokens(handle) for handle in handles]

    return _timed(run)


def _timed(run: Callable[[], list[np.ndarray]]) -> Run:
    began, used = time.perf_counter(), time.process_time()
    tokens = run()
    return time.perf_counter() - began, time.process_time() - used, tokens


def time_steps(engine: Engine) -> list[float]:
    """A list that from now on has the seconds of every wave."""
    steps: list[float] = []
    engine.on_step = lambda rows, seconds: steps.append(seconds)
    return steps


def _tokens(handle: Handle) -> np.ndarray:
    return np.stack([frame.tokens for frame in handle.result()[0]])


if __name__ == "__main__":
    raise SystemExit(main())
