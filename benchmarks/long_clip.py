"""Predicted clips of 10, 100 and 1000 frames: time, steps and memory, each in a process of its own.

Every clip goes on from two frames of noise (what is seen costs nothing), and its frames are turned
into pixels and dropped, as a server streams them. Peak memory is that of the whole process. The
last line is JSON.

    python benchmarks/long_clip.py BUNDLE
    python benchmarks/long_clip.py BUNDLE --frames 10 100 --out benchmarks/results/long.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from hardware import hardware

from nuwa.runtime.core import GenerationRequest, Until
from nuwa.runtime.engine import Engine, load_engine
from nuwa.runtime.scheduler import STEP_SECONDS
from nuwa.spec.tasks import Task

GIVEN = 2  # frames


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="a bundle that can do V2V")
    parser.add_argument("--frames", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--alone", action="store_true", help="measure in this process, JSON only")
    options = parser.parse_args()
    if options.alone:
        clips = [measure(options.bundle, n, options.threads, options.seed) for n in options.frames]
        print(json.dumps(clips))
        return 0
    report: dict = {"hardware": hardware(options.threads), "bundle": options.bundle.name}
    print("frames   steps   seconds  frames/s  ms/step   peak MB  of which before  caches MB")
    report["clips"] = [in_a_process(options, frames) for frames in options.frames]
    report["peak_growth_bytes"] = (
        report["clips"][-1]["peak_bytes"] - report["clips"][0]["peak_bytes"]
    )
    grown = report["peak_growth_bytes"] / 1e6
    print(f"{options.frames[-1]} frames take {grown:+.1f} MB more than {options.frames[0]}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    return 0


def in_a_process(options: argparse.Namespace, frames: int) -> dict:
    """One clip in a fresh process; prints its line of the table."""
    command = [sys.executable, __file__, str(options.bundle), "--alone", "--frames", str(frames)]
    command += ["--threads", str(options.threads), "--seed", str(options.seed)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    (clip,) = json.loads(result.stdout.splitlines()[-1])
    print(
        f"{frames:6} {clip['steps']:7} {clip['seconds']:9.2f} {clip['frames_per_second']:9.1f} "
        f"{1e3 * clip['seconds'] / clip['steps']:8.2f} {clip['peak_bytes'] / 1e6:9.1f} "
        f"{clip['peak_before_bytes'] / 1e6:16.1f} {clip['cache_bytes'] / 1e6:10.2f}",
        flush=True,
    )
    return clip


def measure(bundle: Path, frames: int, threads: int, seed: int) -> dict:
    """Seconds from the request to its last pixel, and what the process took until then."""
    engine = load_engine(bundle, threads=threads)
    size = (GIVEN, engine.info.height, engine.info.width, 3)
    given = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    generate(engine, GenerationRequest(Task.V2V, frame_count=GIVEN + 1, frames=given))  # warm-up
    before = peak_bytes()
    request = GenerationRequest(Task.V2V, frame_count=frames, frames=given, seed=seed)
    began = time.perf_counter()
    steps, first = generate(engine, request)
    seconds = time.perf_counter() - began
    backend = engine._backend
    return {
        "frames": frames,
        "steps": steps,
        "seconds": seconds,
        "first_frame_seconds": first,
        "frames_per_second": frames / seconds,
        "peak_before_bytes": before,
        "peak_bytes": peak_bytes(),
        "cache_bytes": sum(array.nbytes for array in backend.caches.values()),
        "condition_bytes": sum(array.nbytes for array in backend.conditions.values()),
    }


def generate(engine: Engine, request: GenerationRequest) -> tuple[int, float]:
    """Steps of a clip, and seconds until the pixels of its first new frame."""
    engine.check(request)
    began, steps, count, first, done = time.perf_counter(), 0, 0, 0.0, False
    prepared = engine.prepare(request)
    engine.admit(prepared, 0)
    while not done:
        (step,) = engine.step(Until(STEP_SECONDS))
        if step.error is not None:
            raise step.error
        steps, done = steps + step.waves, step.done
        if step.frames:
            engine.pixels(np.stack([tokens for _, tokens in step.frames]))
            count += len(step.frames)
            if not first and count > GIVEN:
                first = time.perf_counter() - began
    engine.release(0)
    prepared.close()
    assert count == request.frame_count, "every frame is handed out"
    return steps, first


def peak_bytes() -> int:
    """Most memory that this process has held at a time; Linux only.

    getrusage would also count the process that started this one.
    """
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    raise SystemExit(main())
