"""How fast this machine moves bytes and multiplies matrices: what floors are made of.

All through numpy: copies and reads in threads, products by the BLAS that numpy was built with. A
library with better kernels may multiply faster, and what stays in a cache is read faster than it is
copied, so both are measured, and a floor takes the faster. Knows no model beyond sizes.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .machine import Hardware, last_level_cache, memory_bytes

REPEATS = 15
SHORTEST = 0.002  # seconds of a repeat; shorter calls are made several times
MOST_SIZES = 8  # numbers of rows whose products are timed
LEAST_COPIED = 1 << 28  # bytes
BLAS_SETTERS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)

Shapes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Measurement:
    """value: the median of the repeats, a second; spread: from the slowest repeat to the fastest,
    as a share of it.
    """

    value: float
    repeats: int
    spread: float

    @classmethod
    def of(cls, amount: float, seconds: Sequence[float]) -> Measurement:
        """Of an amount that took so long, again and again."""
        value = amount / statistics.median(seconds)
        most, least = amount / min(seconds), amount / max(seconds)
        return cls(value, len(seconds), (most - least) / value)


@dataclass(frozen=True)
class Rates:
    """copy: bytes a second, read and written, of more than the caches hold; read: bytes a second,
    read again and again, of as much as a step reads of weights; products: floating-point operations
    a second by number of rows; precision: of the products; about: how they were measured.

    Those of a GPU are made by whoever measures one; then copy and products are its own.
    """

    copy: Measurement
    products: Mapping[int, Measurement]
    read: Measurement | None = None
    precision: str = "fp32"
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes_per_second(self) -> float:
        """At which bytes can come: the faster of copy and read."""
        return max(self.copy.value, 0.0 if self.read is None else self.read.value)

    def flops_per_second(self, rows: int) -> float:
        """Of products of so many rows; where these were not measured, of the measured numbers of
        rows next to it the faster one's. ValueError if none was measured.
        """
        if not self.products:
            raise ValueError("no products were measured")
        if rows in self.products:
            return self.products[rows].value
        sizes = sorted(self.products)
        at = bisect.bisect(sizes, rows)
        return max(self.products[size].value for size in sizes[max(0, at - 1) : at + 1])

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        told: dict[str, Any] = {}
        for name, measured in (("copy", self.copy), ("read", self.read)):
            if measured is not None:
                told[f"{name}_bytes_per_second"] = measured.value
                told[f"{name}_repeats"] = measured.repeats
                told[f"{name}_spread"] = measured.spread
        told["gemm"] = [
            {
                "rows": rows,
                "flops_per_second": measured.value,
                "repeats": measured.repeats,
                "spread": measured.spread,
            }
            for rows, measured in sorted(self.products.items())
        ]
        return told | {"gemm_precision": self.precision} | dict(self.about)


def measure(
    shapes: Shapes,
    rows: Iterable[int],
    *,
    threads: int,
    working_set: int,
    repeats: int = REPEATS,
    hardware: Hardware | None = None,
) -> Rates:
    """All rates of this machine's processor; takes seconds.

    shapes: (inputs, outputs) of a step's products; rows: numbers of rows of its steps, of which
    MOST_SIZES are timed; working_set: bytes of weights that a step reads.
    """
    copied = copied_bytes(hardware or Hardware())
    copy = copy_bandwidth(copied, threads, repeats)
    read = read_bandwidth(working_set, threads, repeats)
    with blas_threads(threads) as limited:
        products = {count: product_rate(shapes, count, repeats) for count in few_of(rows)}
    about = {
        "copied_bytes": copied,
        "working_set_bytes": working_set,
        "threads": threads,
        "gemm_by": f"numpy {np.__version__}, {blas_name()}",
        "gemm_threads": threads if limited else "as BLAS has them",
    }
    return Rates(copy, products, read, about=about)


def copied_bytes(hardware: Hardware) -> int:
    """How much is copied: four times the last caches at least, an eighth of memory at most."""
    wanted = max(LEAST_COPIED, 4 * (last_level_cache(hardware) or 0))
    memory = memory_bytes(hardware)
    return wanted if memory is None else min(wanted, memory // 8)


def copy_bandwidth(size: int, threads: int, repeats: int = REPEATS) -> Measurement:
    """Bytes a second, read and written, of copying `size` bytes; numpy copies on one core."""
    parts = [np.ones(size // threads, np.uint8) for _ in range(threads)]
    targets = [np.empty_like(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        seconds = timed(lambda: list(pool.map(np.copyto, targets, parts)), repeats)
    return Measurement.of(2 * sum(part.nbytes for part in parts), seconds)


def read_bandwidth(size: int, threads: int, repeats: int = REPEATS) -> Measurement:
    """Bytes a second of reading the same `size` bytes again and again, a part in every thread."""
    parts = [np.ones(max(1, size // threads // 4), np.int32) for _ in range(threads)]
    passes = max(1, LEAST_COPIED // size)

    def read(part: npt.NDArray[np.int32]) -> None:
        for _ in range(passes):
            np.bitwise_or.reduce(part)

    with ThreadPoolExecutor(threads) as pool:
        seconds = timed(lambda: list(pool.map(read, parts)), repeats)
    return Measurement.of(passes * sum(part.nbytes for part in parts), seconds)


def product_rate(shapes: Shapes, rows: int, repeats: int = REPEATS) -> Measurement:
    """Floating-point operations a second of fp32 products [rows, inputs] x [inputs, outputs].

    Each shape is timed by itself and counts as often as it is named. One matrix for each, so a
    small one stays in a cache.
    """
    spent = [
        [times * seconds for seconds in _product_seconds(rows, inputs, outputs, repeats)]
        for (inputs, outputs), times in Counter(shapes).items()
    ]
    flops = 2.0 * rows * sum(inputs * outputs for inputs, outputs in shapes)
    return Measurement.of(flops, [sum(repeat) for repeat in zip(*spent, strict=True)])


def _product_seconds(rows: int, inputs: int, outputs: int, repeats: int) -> list[float]:
    left, right = np.ones((rows, inputs), np.float32), np.ones((inputs, outputs), np.float32)
    out = np.empty((rows, outputs), np.float32)
    return timed(lambda: np.dot(left, right, out=out), repeats)


def few_of(rows: Iterable[int], most: int = MOST_SIZES) -> list[int]:
    """Of numbers of rows the least, the greatest, and some that are about evenly apart in ratio."""
    sizes = sorted(set(rows))
    if len(sizes) <= most:
        return sizes
    wanted = np.geomspace(sizes[0], sizes[-1], most)
    return sorted({sizes[int(np.abs(np.subtract(sizes, to)).argmin())] for to in wanted})


def timed(call: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Seconds of a call, `repeats` times, after it was made twice to warm up."""
    call()
    began = time.perf_counter()
    call()
    once = time.perf_counter() - began
    times = max(1, math.ceil(SHORTEST / max(once, 1e-9)))
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(times):
            call()
        spent.append((time.perf_counter() - began) / times)
    return spent


def blas_name() -> str:
    """The BLAS of numpy and its version, as numpy was built."""
    built = np.show_config(mode="dicts") or {}
    blas = built.get("Build Dependencies", {}).get("blas", {})
    return " ".join(str(blas[part]) for part in ("name", "version") if blas.get(part)) or "unknown"


@contextmanager
def blas_threads(count: int) -> Iterator[bool]:
    """numpy's BLAS has so many threads meanwhile; whether it could be told, as OpenBLAS can."""
    found = _openblas()
    if found is None:
        yield False
        return
    get, set_ = found
    before = get()
    set_(count)
    try:
        yield True
    finally:
        set_(before)


def _openblas() -> tuple[Callable[[], int], Callable[[int], object]] | None:
    """How to ask the OpenBLAS of numpy's wheels for its threads, and how to set them."""
    home = Path(np.__file__).parent
    files = [*home.parent.glob("numpy.libs/*openblas*"), *home.glob(".dylibs/*openblas*")]
    for file in files:
        try:
            library = ctypes.CDLL(str(file))
        except OSError:
            continue
        for name in BLAS_SETTERS:
            if hasattr(library, name):
                return getattr(library, name.replace("_set_", "_get_")), getattr(library, name)
    return None
