"""Time of one decoder step by its number of rows beside its ceiling, and the host's share of steps.

The ceiling comes first: the matrix products of a step alone, on ONNX Runtime, for the same number
of rows, right before the step (see ceiling.py). The host's share is what the scheduler and the
engine do around the backend's part of a wave, while several clips are generated. The last line is
JSON.

    python benchmarks/steps.py BUNDLE
    python benchmarks/steps.py BUNDLE --backend onnxruntime-cpu --rows 1 16 256
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
from ceiling import Products, copy_bandwidth, products, step_bytes, step_flops
from hardware import hardware

from nuwa.runtime.backends.base import AUTO, BACKENDS, Lane, Part, Rows, Stream
from nuwa.runtime.bench.card import storage_of
from nuwa.runtime.core import GenerationRequest
from nuwa.runtime.engine import Engine, load_engine
from nuwa.runtime.scheduler import Scheduler
from nuwa.spec.config import ModelConfig
from nuwa.spec.plan import decode_plan
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

PROMPT = "a red 3 on a black background moving left ."


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--clips", type=int, nargs="+", default=[1, 4, 8], help="side by side")
    parser.add_argument("--repeats", type=int, default=30, help="steps of each size")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--backend", choices=BACKENDS, default=AUTO)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    threads = options.threads
    engine = load_engine(
        options.bundle, slots=max(options.clips), threads=threads, backend=options.backend
    )
    model, precision = engine._config, engine.info.precision
    stored = storage_of(precision, engine.info.backend)
    floor = Products(products(model), threads, precision)
    bandwidth = copy_bandwidth(2**26, threads)
    report: dict = {
        "hardware": hardware(threads),
        "bundle": engine.info.name,
        "precision": precision,
        "backend": engine.info.backend,
        "copy_bytes_per_second": bandwidth,
        "products_by": floor.library,
    }
    print(f"{engine.info.name}, {precision}, {engine.info.backend}, {threads} threads")
    print(f"copying: {bandwidth / 1e9:.1f} GB/s")
    print("rows   GFLOP/s of the products   bytes at copy speed   products      step  share")
    report["steps"] = []
    stream = synthetic_stream(model, max(options.rows))
    engine._backend.open(stream)
    for rows in options.rows:
        row = _measure(engine, stream, rows, floor, options.repeats)
        row["flops"] = step_flops(model, rows)
        row["bytes"] = step_bytes(model, rows, stored.weight_bytes)
        row["bytes_seconds"] = row["bytes"] / bandwidth
        report["steps"].append(row)
        print(
            f"{rows:4} {row['flops'] / row['ceiling_seconds'] / 1e9:25.0f} "
            f"{1e3 * row['bytes_seconds']:18.2f} ms {1e3 * row['ceiling_seconds']:7.2f} ms "
            f"{1e3 * row['median_seconds']:6.2f} ms {row['fraction_of_ceiling']:6.0%}",
            flush=True,
        )
    engine._backend.close(stream)
    print("clips side by side   rows a wave      wave      host  share")
    report["host"] = [_host(engine, clips) for clips in options.clips]
    for row in report["host"]:
        print(
            f"{row['clips']:18} {row['rows_per_step']:13.1f} {1e3 * row['step_seconds']:6.2f} ms "
            f"{1e6 * row['host_seconds']:6.0f} us {row['host_share']:6.1%}"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    return 0


def synthetic_stream(model: ModelConfig, most: int) -> Stream:
    """Rows of a clip in decoding order, over and over, so that a call may have up to `most`."""
    plan = decode_plan(model.decoder, model.decoder.grid)
    index = np.arange(most) % plan.grid.size
    rows = Rows(
        coordinates=plan.coordinates[index],
        fed=np.full(most, -1 - model.bos, np.int32),
        place=index.astype(np.int32),
        given=np.full(most, -1, np.int32),
        write_index=plan.write_index[index],
        neighbours=plan.neighbours[plan.grid.size - 1 - index],
        visual=None,
        uniform=np.random.default_rng(0).random(most, np.float32),
    )
    return Stream((Lane(0, 0, 14),), Sampling(), plan.grid.size, rows)


def _measure(engine: Engine, stream: Stream, rows: int, floor: Products, repeats: int) -> dict:
    """Medians of alternating steps and ceilings."""
    part = [Part(stream, 0, rows)]
    steps, ceilings = [], []
    for _ in range(3):
        ceilings.append(floor.seconds(rows))
        for repeat in range(repeats + 2):
            began = time.perf_counter()
            engine._backend.step(part)
            if repeat >= 2:
                steps.append(time.perf_counter() - began)
    median, ceiling = statistics.median(steps), statistics.median(ceilings)
    return {
        "rows": rows,
        "median_seconds": median,
        "ceiling_seconds": ceiling,
        "fraction_of_ceiling": ceiling / median,
    }


def _host(engine: Engine, clips: int) -> dict:
    """Of `clips` clips side by side: seconds of a wave, and how many of them the backend has."""
    frames, backend = engine.info.max_frames, engine._backend
    inside: list[float] = []  # of every call of the backend
    rows: list[int] = []  # of every wave

    def timed(run):
        def timed_run(*arguments):
            began = time.perf_counter()
            result = run(*arguments)
            inside.append(time.perf_counter() - began)
            return result

        return timed_run

    scheduler = Scheduler(engine, queue_size=clips)
    whole, host, waves = [], [], []
    backend.step, backend.steps = timed(backend.step), timed(backend.steps)
    engine.on_step = lambda count, seconds: rows.append(count)
    try:
        for repeat in range(3):
            request = GenerationRequest(Task.T2V, PROMPT, frame_count=frames, seed=repeat)
            for _ in range(clips):
                scheduler.submit(request)
            while scheduler.queued:
                scheduler.turn()
            while scheduler.active:
                before, called = len(rows), len(inside)
                began = time.perf_counter()
                scheduler._round()
                whole.append(time.perf_counter() - began)
                host.append(whole[-1] - sum(inside[called:]))
                waves.append(len(rows) - before)
            scheduler.turn()
    finally:
        del backend.step, backend.steps
        engine.on_step = None
    each = list(zip(whole, host, waves, strict=True))
    return {
        "clips": clips,
        "rows_per_step": statistics.mean(rows),
        "waves_per_round": statistics.mean(waves),
        "step_seconds": statistics.median(whole / count for whole, _, count in each),
        "host_seconds": statistics.median(host / count for _, host, count in each),
        "host_share": sum(host) / sum(whole),
    }


if __name__ == "__main__":
    raise SystemExit(main())
