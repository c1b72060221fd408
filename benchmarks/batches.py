"""Images and clips a second by how many are decoded side by side, and what steps wait for.

The floor comes first: the bytes that all steps of a generation must move (weights once a step, what
a sequence sees of its cache and text once, what it writes), at the speed at which the device copies
memory. Sampling is included, text and pixels are not. The share of the host is what lies outside
the backend's step. On a GPU, what lies inside is told apart by CUDA events around what a step
launches: device (kernels and the gaps between them; which, `nsys profile` shows), and gap, the rest
(staging, the launch itself, the way of the answer).

With --reference the same sizes are decoded by PyTorch, one token at a time (torch_reference.py),
before and after. For TensorRT engines are built first, with the plugins of 3DNA; it is an error if
there are none, except with --function-bodies. They stay in a BUNDLE and are too narrow for guided
clips: build others to serve it. Each batch size runs in a process of its own. The last line is
JSON.

    python benchmarks/batches.py BUNDLE
    python benchmarks/batches.py --random base --backend onnxruntime-cuda --reference
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
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from ceiling import copy_bandwidth, text_entries, timed, weights_bytes
from hardware import hardware

from nuwa import plugins_trt
from nuwa.export.engines import EngineOptions, build_engines
from nuwa.runtime.backends.base import AUTO, BACKENDS
from nuwa.runtime.backends.device_memory import CudaMemory
from nuwa.runtime.bench.card import CACHE_BYTES, WEIGHT_BYTES
from nuwa.runtime.core import GenerationRequest, Until
from nuwa.runtime.engine import Engine, load_engine
from nuwa.runtime.scheduler import STEP_SECONDS
from nuwa.spec import engines
from nuwa.spec.config import PRESETS, ModelConfig
from nuwa.spec.grid import Grid
from nuwa.spec.manifest import MANIFEST, PRECISIONS, Manifest
from nuwa.spec.plan import decode_plan
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

ON_GPU = ("onnxruntime-cuda", "tensorrt", "tensorrt-rtx")
COPIED = 1 << 30  # bytes
PROMPT = "a red digit 3 on a black background moving left ."


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--random", choices=PRESETS, help="a model of this size, random weights")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of --random")
    parser.add_argument("--keep", type=Path, help="put the bundle of --random here, or find it")
    parser.add_argument("--backend", choices=BACKENDS, default=AUTO)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--function-bodies", action="store_true", help="TensorRT without the plugins of 3DNA"
    )
    parser.add_argument(
        "--timing-cache",
        type=Path,
        help="of TensorRT, which times a kernel once then (default: one for all batch sizes)",
    )
    parser.add_argument("--reference", action="store_true", help="time PyTorch too")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    if (options.bundle is None) == (options.random is None):
        parser.error("a BUNDLE or --random, one of the two")
    if options.reference and not options.random:
        parser.error("--reference needs --random: PyTorch decodes a model of the same size")
    try:
        plugins(options)
    except FileNotFoundError as error:
        parser.error(f"{error}, or use --function-bodies")
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle or made(options, Path(folder))
        if options.backend == engines.TENSORRT:
            options.timing_cache = options.timing_cache or Path(folder) / "timings"
        if len(options.batches) > 1:
            report = measure_apart(bundle, options)
        else:
            report = measure(bundle, options)
    text = json.dumps(report)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(text)
    return 0


def made(options: argparse.Namespace, folder: Path) -> Path:
    """The bundle of --random, which may be there already."""
    from nuwa.export.random_bundle import random_bundle

    bundle = options.keep or folder / "bundle"
    if not bundle.exists():
        random_bundle(options.random, bundle, options.precision)
    return bundle


def measure_apart(bundle: Path, options: argparse.Namespace) -> dict:
    """One report of all batch sizes: a process gives all its memory back at its end."""
    report: dict = {}
    for batch in options.batches:
        command = [sys.executable, __file__]
        if options.random:
            command += ["--random", options.random, "--precision", options.precision]
            command += ["--keep", str(bundle)]
        else:
            command += [str(bundle)]
        command += ["--batches", str(batch)]
        for name in ("backend", "threads", "repeats"):
            command += [f"--{name}", str(getattr(options, name))]
        command += ["--frames", *map(str, options.frames)]
        command += ["--reference"] * options.reference
        command += ["--function-bodies"] * options.function_bodies
        if options.timing_cache is not None:
            command += ["--timing-cache", str(options.timing_cache)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        *lines, last = said.splitlines()
        print("\n".join(lines), flush=True)
        made = json.loads(last)
        made["batches"] = report.get("batches", []) + made["batches"]
        report = made
    return report


def measure(bundle: Path, options: argparse.Namespace) -> dict:
    """The report of one batch size; prints a line a length."""
    bandwidth, gpu = device_bandwidth(options)
    report: dict = {
        "hardware": hardware(options.threads),
        "gpu": gpu,
        "copy_bytes_per_second": bandwidth,
        "batches": [],
    }
    print(f"copying: {bandwidth / 1e9:.0f} GB/s")
    (batch,) = options.batches
    if options.backend in engines.RUNTIMES:
        _, record = build_engines(bundle, engine_options(bundle, options))
        report["tensorrt"] = record.key.version
        report["plugin_abi"] = record.key.plugin_abi
    engine = load_engine(bundle, slots=batch, threads=options.threads, backend=options.backend)
    if options.backend in engines.RUNTIMES and engine._backend._record.key != record.key:
        loaded = engine._backend._record.key.name
        raise SystemExit(f"{bundle} has the engines {loaded}, which are preferred: remove them")
    report |= {
        "bundle": engine.info.name,
        "precision": engine.info.precision,
        "backend": engine.info.backend,
    }
    for frames in options.frames:
        row = _measure(engine, batch, frames, bandwidth, options)
        report["batches"].append(row)
        print(
            f"{frames:3} frames x {batch:3}: {row['median_seconds']:8.4f} s, "
            f"{row['per_second']:8.2f} a second, floor {row['floor_seconds']:8.4f} s "
            f"({row['fraction_of_floor']:.0%}), {row['steps']} steps of "
            f"{1e3 * row['step_seconds']:.3f} ms, host {row['host_share']:.1%}{_split(row)}",
            flush=True,
        )
    return report


def _split(row: dict) -> str:
    if row["device_seconds"] is None:
        return ""
    device, gap = (statistics.mean(row[f"{name}_seconds"]) for name in ("device", "gap"))
    return f"; of a step {1e3 * device:.3f} ms device, {1e3 * gap:.3f} ms gap"


def engine_options(bundle: Path, options: argparse.Namespace) -> EngineOptions:
    """Of engines that do what is measured, and no more: generations without guidance."""
    decoder = Manifest.from_json((bundle / MANIFEST).read_text()).config.decoder
    height, width = decoder.grid.height, decoder.grid.width
    waves = [decode_plan(decoder, Grid(each, height, width)).widest for each in options.frames]
    (batch,) = options.batches
    return EngineOptions(
        options.backend,
        slots=batch,
        most_rows=batch * max(waves),
        plugins=plugins(options),
        timing_cache=options.timing_cache,
    )


def plugins(options: argparse.Namespace) -> Path | None:
    """The plugin library that engines are built with; FileNotFoundError if it was not built."""
    if options.backend != engines.TENSORRT or options.function_bodies:
        return None
    return plugins_trt.library()


def device_bandwidth(options: argparse.Namespace) -> tuple[float, str | None]:
    """Bytes a second, read and written, of copying on the device, and its name if it is a GPU."""
    if options.backend not in ON_GPU:
        return copy_bandwidth(2**26, options.threads), None
    memory = CudaMemory()
    from_, to = memory.allocate(COPIED), memory.allocate(COPIED)

    def copy() -> None:
        memory.copy(from_, to, COPIED)
        memory.wait()

    seconds = timed(copy)
    for address in (from_, to):
        memory.free(address)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return 2 * COPIED / seconds, said or "unknown"


def floor_seconds(
    model: ModelConfig, grid: Grid, batch: int, precision: str, rate: float, text: int
) -> float:
    """What the bytes of all steps take at this rate. text: entries of it that a row sees."""
    plan, decoder = decode_plan(model.decoder, grid), model.decoder
    number = CACHE_BYTES[precision]
    seconds = 0.0
    for call in range(plan.steps):
        part = plan.rows(call)
        near = plan.neighbours[part]
        entries = len(np.unique(near[near >= 0])) + text + (part.stop - part.start)
        cache = batch * decoder.layers * 2 * entries * decoder.width * number
        seconds += (weights_bytes(model, WEIGHT_BYTES[precision]) + cache) / rate
    return seconds


def _measure(
    engine: Engine, batch: int, frames: int, bandwidth: float, options: argparse.Namespace
) -> dict:
    model, inside = engine._config, _Inside(engine)
    grid = Grid(frames, model.decoder.grid.height, model.decoder.grid.width)
    reference = []
    if options.reference:
        reference.append(_reference(frames, batch, options))
    totals, host = [], []
    for repeat in range(options.repeats + 1):
        inside.clear()
        total = _generate(engine, batch, frames, repeat, Until(STEP_SECONDS))
        if repeat:
            totals.append(total)
            host.append(1 - inside.total / total)
    inside.clear()
    _generate(engine, batch, frames, options.repeats, None)
    inside.restore()
    if options.reference:
        reference.append(_reference(frames, batch, options))
    seconds = statistics.median(totals)
    text = text_entries(model, engine._text.used(engine._text.encode(PROMPT)))
    floor = floor_seconds(model, grid, batch, engine.info.precision, bandwidth, text)
    row = {
        "frames": frames,
        "batch": batch,
        "steps": len(inside.seconds),
        "seconds": totals,
        "median_seconds": seconds,
        "per_second": batch / seconds,
        "step_seconds": seconds / len(inside.seconds),
        "host_share": statistics.median(host),
        # Of each step of one more generation, which waits for every step; None without a GPU.
        "device_seconds": inside.device,
        "gap_seconds": inside.gap,
        "floor_seconds": floor,
        "fraction_of_floor": floor / seconds,
    }
    if reference:
        row["reference_seconds"] = reference
        row["faster_than_reference"] = statistics.mean(reference) / seconds
    return row


class CudaEvents:
    """Seconds between what is launched first and last in a stream, by the GPU's own clock.

    memory: a CudaMemory. An event costs its stream less than a microsecond.
    """

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self._first, self._last = (memory._call("cudaEventCreate")[0] for _ in range(2))

    @contextmanager
    def around(self) -> Iterator[None]:
        self._memory._call("cudaEventRecord", self._first, self._memory.stream)
        yield
        self._memory._call("cudaEventRecord", self._last, self._memory.stream)

    def seconds(self) -> float:
        """Of what was last between them; all of the stream is done."""
        (milliseconds,) = self._memory._call("cudaEventElapsedTime", self._first, self._last)
        return milliseconds / 1e3


class _Inside:
    """Seconds of every call that a backend is asked for alone, and of them those on the device.

    device, gap: what it launches and the rest, None of a backend that keeps no rows on a GPU;
    total: of all calls, also of those that it is asked for together; events: what times the others,
    on a CudaMemory, and what stands for it in tests.
    """

    def __init__(self, engine: Engine, events: Any = CudaEvents) -> None:
        self._backend: Any = engine._backend
        self._step, self._steps = self._backend.step, self._backend.steps
        memory = getattr(getattr(self._backend, "_rows", None), "memory", None)
        timed = hasattr(self._backend, "launching") and memory is not None
        self._events = events(memory) if timed else None
        self.clear()

        def step(parts):
            began = time.perf_counter()
            done = self._step(parts)
            self.seconds.append(time.perf_counter() - began)
            self.total += self.seconds[-1]
            if self._events is not None:
                self._device.append(self._events.seconds())
            return done

        def steps(calls, until):
            began = time.perf_counter()
            done = self._steps(calls, until)
            self.total += time.perf_counter() - began
            return done

        self._backend.step, self._backend.steps = step, steps
        if self._events is not None:
            self._backend.launching = self._events.around

    def clear(self) -> None:
        self.total = 0.0
        self.seconds: list[float] = []
        self._device: list[float] = []

    @property
    def device(self) -> list[float] | None:
        return self._device if self._events is not None else None

    @property
    def gap(self) -> list[float] | None:
        if self._events is None:
            return None
        return [all_ - device for all_, device in zip(self.seconds, self._device, strict=True)]

    def restore(self) -> None:
        self._backend.step, self._backend.steps = self._step, self._steps
        if self._events is not None:
            self._backend.launching = nullcontext


def _generate(engine: Engine, batch: int, frames: int, seed: int, until: Until | None) -> float:
    """Seconds from the first step of `batch` requests to the last token of all."""
    prepared = [
        engine.prepare(
            GenerationRequest(
                Task.T2V if frames > 1 else Task.T2I,
                PROMPT,
                frame_count=frames,
                seed=batch * seed + slot,
                sampling=Sampling(guidance_scale=1.0),
            )
        )
        for slot in range(batch)
    ]
    began = time.perf_counter()
    for slot, each in enumerate(prepared):
        engine.admit(each, slot)
    left = set(range(batch))
    while left:
        for done in engine.step(until):
            if done.error is not None:
                raise done.error
            if done.done:
                engine.release(done.slot)
                left.discard(done.slot)
    seconds = time.perf_counter() - began
    for each in prepared:
        each.close()
    return seconds


def _reference(frames: int, batch: int, options: argparse.Namespace) -> float:
    """Median seconds of torch_reference.py, in a process of its own."""
    device = "cuda" if options.backend in ON_GPU else "cpu"
    command = [sys.executable, str(Path(__file__).with_name("torch_reference.py"))]
    command += ["--preset", options.random, "--frames", str(frames), "--batch", str(batch)]
    command += ["--device", device, "--dtype", "bf16" if device == "cuda" else "fp32"]
    command += ["--repeats", "1"] if device == "cuda" else ["--repeats", "1", "--eager"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1])["results"][0]["seconds"]


if __name__ == "__main__":
    sys.exit(main())
