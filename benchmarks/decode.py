"""Wave decoding against cached raster decoding, and against nuwa-pytorch; random weights, CPU.

The ceiling comes first: the matrix products that a step must do, over the rate at which this
machine multiplies matrices of the same shapes. Wave and raster runs alternate; medians are given.
The last line is JSON.

    python benchmarks/decode.py                 wave against raster
    python benchmarks/decode.py --peer          also nuwa-pytorch (installed into build/peer)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ceiling import Products, products
from hardware import hardware

from nuwa.export.bundle import export_bundle
from nuwa.runtime.backends.base import AUTO, BACKENDS
from nuwa.runtime.core import GenerationRequest, Until
from nuwa.runtime.engine import Engine, load_engine
from nuwa.runtime.scheduler import STEP_SECONDS
from nuwa.spec.config import ModelConfig
from nuwa.spec.grid import Grid
from nuwa.spec.manifest import PRECISIONS
from nuwa.spec.plan import decode_plan
from nuwa.spec.tasks import Task
from nuwa.training.random_model import config, write_random_checkpoint

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / "build" / "peer"
PEER_PACKAGES = (
    "nuwa-pytorch==0.7.8",
    "vector-quantize-pytorch==0.10.15",
    "einops",
    "ftfy",
    "packaging",
    "regex",
    "tqdm",
    "unfoldNd",
    "wcwidth",
)
PROMPT = "a red 3 on a black background moving left ."


@dataclass(frozen=True)
class Workload:
    """One grid to generate: 1 frame is an image."""

    name: str
    grid: Grid
    task: Task


CLIP = Workload("clip 10x8x8", Grid(10, 8, 8), Task.T2V)
IMAGE = Workload("image 1x16x16", Grid(1, 16, 16), Task.T2I)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="pairs of runs (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--codebook", type=int, default=1024)
    parser.add_argument("--backend", choices=BACKENDS, default=AUTO)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--spinning", action="store_true", help="idle threads wait actively")
    parser.add_argument("--peer", action="store_true", help="time nuwa-pytorch too (minutes)")
    parser.add_argument("--peer-repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    report: dict = {"hardware": hardware(options.threads), "options": vars(options) | {"out": None}}
    for workload in (CLIP, IMAGE):
        report[workload.name] = measure(workload, options)
    if options.peer:
        report["nuwa-pytorch 0.7.8"] = {
            workload.name: against_peer(workload, report[workload.name], options)
            for workload in (IMAGE, CLIP)
        }
    text = json.dumps(report, default=str)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2, default=str) + "\n")
    print(text)
    return 0


def measure(workload: Workload, options: argparse.Namespace) -> dict:
    """Ceiling, then alternating wave and raster generations of one random model."""
    model = config(
        workload.grid,
        width=options.width,
        layers=options.layers,
        heads=options.heads,
        codebook=options.codebook,
    )
    print(f"{workload.name}, width {options.width}, {options.layers} layers, ", end="")
    print(f"{options.heads} heads, {options.codebook} codes, {options.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder) / "checkpoint", model)
        export_bundle(
            Path(folder) / "checkpoint", Path(folder) / "bundle", precision=options.precision
        )
        engine = load_engine(
            Path(folder) / "bundle",
            threads=options.threads,
            spinning=options.spinning,
            backend=options.backend,
        )
        floor = {kind: ceiling(model, workload.grid, kind, options) for kind in KINDS}
        for kind in KINDS:
            print(f"  {kind:6} matrix products alone: {1e3 * floor[kind]:8.1f} ms")
        for kind in KINDS:
            run(engine, workload, kind, 0)  # warm-up
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        equal = True
        for seed in range(options.repeats):
            tokens = {}
            for kind in KINDS:
                spent, tokens[kind], steps = run(engine, workload, kind, seed)
                seconds[kind].append(spent)
                assert steps == decode_plan(model.decoder, workload.grid, kind).steps
            equal &= np.array_equal(tokens["wave"], tokens["raster"])
    result: dict = {"tokens_equal": equal, "backend": engine.info.backend}
    for kind in KINDS:
        steps = decode_plan(model.decoder, workload.grid, kind).steps
        median = statistics.median(seconds[kind])
        result[kind] = {
            "steps": steps,
            "seconds": seconds[kind],
            "median_seconds": median,
            "ms_per_step": 1e3 * median / steps,
            "ceiling_seconds": floor[kind],
            "fraction_of_ceiling": floor[kind] / median,
        }
        print(
            f"  {kind:6} {steps:4} steps, median {1e3 * median:8.1f} ms, "
            f"{1e3 * median / steps:.2f} ms a step, {floor[kind] / median:.0%} of the ceiling"
        )
    result["ratio"] = result["raster"]["median_seconds"] / result["wave"]["median_seconds"]
    print(f"  raster / wave = {result['ratio']:.2f}, tokens equal: {equal}")
    return result


KINDS = ("wave", "raster")


def run(engine: Engine, workload: Workload, kind: str, seed: int) -> tuple[float, np.ndarray, int]:
    """Seconds from the request to its last token (text encoding included, pixels not)."""
    request = GenerationRequest(
        task=workload.task,
        prompt=PROMPT,
        frame_count=workload.grid.frames,
        seed=seed,
        schedule=kind,
    )
    frames: dict[int, np.ndarray] = {}
    steps, done = 0, False
    began = time.perf_counter()
    prepared = engine.prepare(request)
    engine.admit(prepared, 0)
    while not done:
        (step,) = engine.step(Until(STEP_SECONDS))
        frames.update(step.frames)
        if step.error is not None:
            raise step.error
        steps, done = steps + step.waves, step.done
    seconds = time.perf_counter() - began
    engine.release(0)
    prepared.close()
    return seconds, np.stack([frames[n] for n in sorted(frames)]), steps


def ceiling(model: ModelConfig, grid: Grid, kind: str, options: argparse.Namespace) -> float:
    """Seconds of one generation's matrix products alone, at the rates measured here and now."""
    plan = decode_plan(model.decoder, grid, kind)
    sizes, counts = np.unique(np.diff(plan.bounds), return_counts=True)
    alone = Products(products(model), options.threads, options.precision)
    pairs = zip(sizes.tolist(), counts.tolist(), strict=True)
    return sum(count * alone.seconds(size) for size, count in pairs)


def against_peer(workload: Workload, ours: dict, options: argparse.Namespace) -> dict:
    """nuwa-pytorch's token loop on the same grid, width, depth, heads and codebook.

    Of a clip one frame of it is timed, at full length: as many times as there are frames.
    """
    if not (PEER / "nuwa_pytorch").exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*install, "--target", str(PEER), *PEER_PACKAGES], check=True)
    command = [sys.executable, str(ROOT / "benchmarks" / "peer_nuwa_pytorch.py")]
    for name in ("width", "layers", "heads", "codebook", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--size", str(workload.grid.width), "--frames", str(workload.grid.frames)]
    environment = {**os.environ, "PYTHONPATH": str(PEER)}
    seconds = []
    for _ in range(options.peer_repeats):
        result = subprocess.run(command, env=environment, check=True, capture_output=True)
        timed = json.loads(result.stdout.splitlines()[-1])
        seconds.append(timed["seconds"] / timed["tokens"] * workload.grid.size)
        print(f"  nuwa-pytorch, {workload.name}: {seconds[-1]:.1f} s")
    median = statistics.median(seconds)
    ratio = median / ours["wave"]["median_seconds"]
    print(f"  nuwa-pytorch / wave = {ratio:.0f}")
    return {"seconds": seconds, "median_seconds": median, "ratio": ratio}


if __name__ == "__main__":
    raise SystemExit(main())
