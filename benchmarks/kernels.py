"""The kernels of 3DNA on a GPU: time beside the bytes they must move, and errors.

Copying comes first: how fast the GPU moves bytes. Then each operator, through the plugin library,
for several types, widths of heads, rows T and neighbours n: the time of a call, put into a CUDA
graph many times over with other cache slots each, so that what it reads comes from memory and not
from a cache of the GPU; and what the bytes that it must move would take at the speed of copying.
NearbyAttention is called as cross-attention does, all rows see the same n entries of text;
CachedNearbyAttention as decoding does, each row sees others of the live entries. Then the greatest
error against the reference in fp64, beside that of plain PyTorch in the same type. The last line is
JSON; exit code 1 if an error is more than twice PyTorch's.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --on-cpu       errors alone, of the same arithmetic on a CPU

Needs nvcc and the headers of TensorRT, for the harness of tests/plugins_trt; --on-cpu a compiler.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from hardware import hardware

from nuwa import plugins_trt
from nuwa.runtime.backends.device_memory import CudaMemory
from nuwa.runtime.bench.device_rates import copy_bandwidth
from nuwa.runtime.errors import UnavailableError
from nuwa.spec.config import preset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.plugins_trt import needs  # noqa: E402
from tests.plugins_trt.calls import Sizes, drawn, errors, stored  # noqa: E402
from tests.plugins_trt.native_attention import STORAGES, NativeAttention  # noqa: E402
from tests.plugins_trt.plugin_harness import Harness, inputs_of, tensors_of  # noqa: E402

NEARBY, CACHED = "NearbyAttention", "CachedNearbyAttention"
BY_ROWS = "by rows"  # fused or split, whichever fits their number
TACTICS = {NEARBY: {"": 0}, CACHED: {BY_ROWS: 0, "fused": 1, "split": 2}}
ITEM = {"fp32": 4, "fp16": 2, "bf16": 2}  # bytes
COPIED = 1 << 30  # bytes
COLD = 1 << 28  # bytes of caches that the calls of a graph read: more than a GPU's own cache holds
MOST_CALLS = 2048  # of a graph
LIVE = 721  # entries of a sequence that rows may still see, at paper size
REPEATS = 15
SEEDS = 3  # of calls whose errors count
LEAST_CHECKED, MOST_CHECKED = 8, 98  # rows of those calls; an error is of a row, not of a call


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--on-cpu", action="store_true", help="errors alone, on a CPU")
    parser.add_argument("--library", type=Path, help="plugins (default: those installed)")
    parser.add_argument("--types", nargs="+", choices=STORAGES, default=STORAGES)
    parser.add_argument("--head-dims", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 11, 98, 784])
    parser.add_argument("--neighbours", nargs="+", type=int, default=[14, 27, 77])
    parser.add_argument("--width", type=int, default=1280, help="of all heads (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    for head_dim in options.head_dims:
        if head_dim not in (32, 64, 128) or options.width % head_dim:
            parser.error(f"heads of {head_dim} are not of 32, 64 or 128, or not {options.width}")
    needs.required = True  # what is missing is told, not skipped
    report: dict[str, Any] = {"hardware": hardware(1), "width": options.width, "calls": []}
    with tempfile.TemporaryDirectory() as folder:
        native = NativeAttention(Path(folder))
        try:
            gpu = None if options.on_cpu else Gpu(options.library or plugins_trt.library())
        except (FileNotFoundError, UnavailableError) as error:
            parser.error(f"{error}; --on-cpu does without a GPU")
        if gpu is not None:
            report |= gpu.about
            print(f"{gpu.about['gpu']}, copying: {gpu.bandwidth / 1e9:.0f} GB/s")
        for name, storage, head_dim, n, rows in itertools.product(
            TACTICS, options.types, options.head_dims, options.neighbours, options.rows
        ):
            entries = n if name == NEARBY else min(max(n, LIVE), n * rows)
            sizes = Sizes(rows, 1, entries, n, options.width // head_dim, head_dim)
            for row in measured(name, storage, sizes, native, gpu):
                report["calls"].append(row)
                print(line(row), flush=True)
    report["of_steps_of_base"] = of_steps(report["calls"])
    for step in report["of_steps_of_base"]:
        print(f"a step of base, {step['type']}, T {step['rows']}: {1e3 * step['seconds']:.3f} ms")
    report["worst_error_over_plain"] = max(each["error_over_plain"] for each in report["calls"])
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    return int(report["worst_error_over_plain"] > 2)


def measured(
    name: str, storage: str, sizes: Sizes, native: NativeAttention, gpu: Gpu | None
) -> Iterator[dict[str, Any]]:
    """Rows of the report, one a tactic."""
    about = {"operator": name, "type": storage, "rows": sizes.rows, "neighbours": sizes.neighbours}
    about |= {"heads": sizes.heads, "head_dim": sizes.head_dim}
    for tactic, number in TACTICS[name].items():
        if gpu is None and number:
            continue  # on a CPU there is one way
        row = about | {"tactic": tactic} | checked(name, storage, sizes, number, native, gpu)
        if gpu is not None:
            row |= gpu.timed(name, storage, sizes, number)
        yield row


def checked(
    name: str, storage: str, sizes: Sizes, tactic: int, native: NativeAttention, gpu: Gpu | None
) -> dict[str, float]:
    """The greatest errors of some drawn calls, ours and plain PyTorch's."""
    rows = min(max(sizes.rows, LEAST_CHECKED), MOST_CHECKED)
    sizes = dataclasses.replace(sizes, rows=rows, slots=3)
    ours = plain = 0.0
    for seed in range(SEEDS):
        kept, meant = stored(native, drawn(sizes, seed, writes=name == CACHED), storage)
        if gpu is None:
            out = native(storage, heads=sizes.heads, **kept)
        else:
            out, *_ = gpu.harness.enqueue(name, storage, sizes, kept, tactic=tactic)
        own, theirs = errors(out, meant, storage, sizes.heads)
        ours, plain = max(ours, own), max(plain, theirs)
    return {"error": ours, "plain_error": plain, "error_over_plain": ours / plain}


class Gpu:
    """The plugin library on the first GPU."""

    def __init__(self, library: Path) -> None:
        self.memory = CudaMemory()
        self._cuda = self.memory._cuda
        self.harness = Harness(library)
        self.bandwidth = copy_bandwidth(self.memory, COPIED).value
        properties = self._did(self._cuda.cudaGetDeviceProperties(self.memory.index))
        self.about = {
            "gpu": properties.name.decode(),
            "driver": self._did(self._cuda.cudaDriverGetVersion()),
            "library": str(library),
            "copy_bytes_per_second": self.bandwidth,
        }

    def timed(self, name: str, storage: str, sizes: Sizes, tactic: int) -> dict[str, Any]:
        """Seconds of a call, and of the bytes that it must move at the speed of copying."""
        slot_bytes = 2 * sizes.entries * sizes.heads * sizes.head_dim * ITEM[storage]
        calls = min(MOST_CALLS, math.ceil(COLD / slot_bytes))
        sizes = dataclasses.replace(sizes, slots=calls)
        call = spread(name, sizes)
        given = tensors_of(name, storage, sizes)
        plugin = self.harness.attached(name, sizes.heads, tactic)
        with self._placed(storage, sizes, call) as at:
            inputs = [[at[each] for each in inputs_of(name, sizes)] for _ in range(calls)]
            place = inputs_of(name, sizes).index("slot")
            for index, addresses in enumerate(inputs):
                addresses[place] += 4 * sizes.rows * index
            outputs = [at["out"]] if name == NEARBY else [at["out"], at["key"], at["value"]]

            def work() -> None:
                for addresses in inputs:
                    self.harness.launch(plugin, given, addresses, outputs, self.memory.stream)

            seconds = [each / calls for each in self._seconds(work)]
        self.harness.c.harness_delete(plugin)
        moved = moved_bytes(storage, sizes, call)
        median, floor = statistics.median(seconds), moved / self.bandwidth
        return {
            "seconds": median,
            "best_seconds": min(seconds),
            "bytes": moved,
            "floor_seconds": floor,
            "fraction_of_floor": floor / median,
            "calls_of_a_graph": calls,
        }

    def _seconds(self, work: Callable[[], None]) -> list[float]:
        """Of `work` on the GPU, as one graph, by CUDA's own clock."""
        cuda, stream = self._cuda, self.memory.stream
        work()  # loads the kernels, which cannot be while it is recorded
        self.memory.wait()
        graph = self.memory.record(work)
        began, ended = (self._did(cuda.cudaEventCreate()) for _ in range(2))
        seconds = []
        for repeat in range(REPEATS + 2):
            self._did(cuda.cudaEventRecord(began, stream))
            graph.launch()
            self._did(cuda.cudaEventRecord(ended, stream))
            self._did(cuda.cudaEventSynchronize(ended))
            if repeat >= 2:
                seconds.append(self._did(cuda.cudaEventElapsedTime(began, ended)) / 1e3)
        for event in (began, ended):
            self._did(cuda.cudaEventDestroy(event))
        graph.free()
        return seconds

    @contextmanager
    def _placed(
        self, storage: str, sizes: Sizes, call: dict[str, np.ndarray]
    ) -> Iterator[dict[str, int]]:
        """Addresses of a call's tensors on the GPU; slot: those of all calls of the graph."""
        memory, width = self.memory, sizes.heads * sizes.head_dim
        draw = np.random.default_rng(0)

        def numbers(*shape: int) -> np.ndarray:
            values = draw.standard_normal(shape).astype(np.float32)
            if storage == "bf16":
                return (values.view(np.uint32) >> 16).astype(np.uint16)
            return values.astype(np.float16 if storage == "fp16" else np.float32)

        arrays = call | {"slot": np.repeat(np.arange(sizes.slots, dtype=np.int32), sizes.rows)}
        for name in ("query", "key_new", "value_new", "out"):
            arrays[name] = numbers(sizes.rows, width)
        at: dict[str, int] = {}
        try:
            for name, array in arrays.items():
                at[name] = memory.allocate(array.nbytes)
                memory.upload(array, at[name])
            for name in ("key", "value"):
                one = numbers(sizes.entries, width)
                at[name] = memory.allocate(sizes.slots * one.nbytes)
                memory.upload(one, at[name])
                for slot in range(1, sizes.slots):
                    memory.copy(at[name], at[name] + slot * one.nbytes, one.nbytes)
            memory.wait()
            yield at
        finally:
            for address in at.values():
                memory.free(address)

    def _did(self, result: tuple[Any, ...]) -> Any:
        """What a function of CUDA returns besides its status; RuntimeError says what went wrong."""
        status, *values = result
        self.memory._check("timing", status)
        return values[0] if values else None


def spread(name: str, sizes: Sizes) -> dict[str, np.ndarray]:
    """Indices of a call, none masked: neighbours i32 [T, n] and write_index i32 [T]."""
    draw = np.random.default_rng(0)
    if name == NEARBY:
        same = np.arange(sizes.neighbours, dtype=np.int32)
        return {"neighbours": np.tile(same, (sizes.rows, 1))}
    near = [draw.permutation(sizes.entries)[: sizes.neighbours] for _ in range(sizes.rows)]
    index = np.full(sizes.rows, -1, np.int32)
    writing = min(sizes.rows, sizes.entries)  # no two rows the same entry
    index[:writing] = draw.permutation(sizes.entries)[:writing]
    return {"neighbours": np.stack(near).astype(np.int32), "write_index": index}


def moved_bytes(storage: str, sizes: Sizes, call: dict[str, np.ndarray]) -> int:
    """That a call of one slot must read and write, each once, whatever the kernel does."""
    row = sizes.heads * sizes.head_dim * ITEM[storage]
    index = call.get("write_index", np.empty(0, np.int32))
    written = index[index >= 0]
    seen = np.setdiff1d(call["neighbours"], written)  # what the call writes it has from its inputs
    vectors = 2 * sizes.rows + 2 * len(seen[seen >= 0])  # query, out; keys, values
    if len(index):
        vectors += 2 * sizes.rows + 2 * len(written)  # keys, values: read, and written
    numbers = call["neighbours"].size + sizes.rows + len(index)
    return vectors * row + 4 * numbers


def of_steps(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What 3DNA takes of a decoder step of `base`, where calls of its sizes were timed."""
    model = preset("base")
    decoder, found = model.decoder, {}
    for call in calls:
        if call["heads"] == decoder.heads and call["tactic"] in ("", BY_ROWS):
            key = (call["operator"], call["neighbours"], call["type"], call["rows"])
            found[key] = call.get("seconds")
    steps = []
    for (name, n, storage, rows), own in found.items():
        across = found.get((NEARBY, model.text.length, storage, rows))
        if name == CACHED and n == decoder.neighbour_count and own and across:
            seconds = decoder.layers * (own + across)
            steps.append({"type": storage, "rows": rows, "seconds": seconds})
    return steps


def line(row: dict[str, Any]) -> str:
    """Of a row of the report."""
    text = (
        f"{row['operator']:21} {row['type']} {row['heads']:2} x {row['head_dim']:3} "
        f"T {row['rows']:4} n {row['neighbours']:3} {row['tactic']:7} "
        f"error {row['error']:.1e}, plain {row['plain_error']:.1e} ({row['error_over_plain']:.2f})"
    )
    if "seconds" in row:
        text += (
            f", {1e6 * row['seconds']:8.2f} us, floor {1e6 * row['floor_seconds']:8.2f} us "
            f"({row['fraction_of_floor']:.0%})"
        )
    return text


if __name__ == "__main__":
    sys.exit(main())
