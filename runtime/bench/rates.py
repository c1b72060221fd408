"""How fast this machine moves bytes and multiplies matrices: what floors are made of.

All through numpy: copies and reads in threads, products by the BLAS that numpy was built with. What
stays in a cache is read faster than memory is copied, so both are measured. A floor takes the
fastest of everything, and of every rate its best repeat: another process may have been in the way
of the others, and other kernels than BLAS's may be better at few rows. Processes that are in the
way stay for minutes, so a run's rates are measured before it and after it (`faster`). Knows no
model beyond sizes.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .hardware import Hardware
from .machine import available_bytes, last_level_cache, memory_bytes

REPEATS, REPEATS_AGAIN = 15, 7  # the second time, after a run, it is enough to see a faster machine
SHORTEST = 0.005  # seconds of a repeat; what takes less is done several times
COMPARED = ("best_bytes_per_second", "gemm_best_flops_per_second")  # what floors are made of
MOST_SIZES = 8  # numbers of rows whose products are timed
MANY_ROWS = 256  # of one that always is: products of many rows are the fastest
LEAST_COPIED = 1 << 28  # bytes
LEAST_FRUGAL = 1 << 23  # likewise where memory is short
FRUGAL_SHARE = 16  # of the memory that is free: what a frugal measurement takes, at most
BLAS_SETTERS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)

Shapes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Measurement:
    """value: the median of the repeats, a second; best: the fastest repeat's; spread: from the
    slowest to the fastest, as a share of the median.
    """

    value: float
    best: float
    repeats: int
    spread: float

    @classmethod
    def of(cls, amount: float, seconds: Sequence[float]) -> Measurement:
        """Of an amount that took so long, again and again."""
        value = amount / statistics.median(seconds)
        best, worst = amount / min(seconds), amount / max(seconds)
        return cls(value, best, len(seconds), (best - worst) / value)


@dataclass(frozen=True)
class Rates:
    """copy: bytes a second, read and written, of more than the caches hold; read: bytes a second,
    read again and again, of as much as a step reads of weights; products: floating-point operations
    a second by number of rows, none where these could not be measured; precision: of the products;
    about: how all this was measured.

    Those of a GPU are made by device_rates.py.
    """

    copy: Measurement
    products: Mapping[int, Measurement]
    read: Measurement | None = None
    precision: str = "fp32"
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes_per_second(self) -> float:
        """At which bytes can come: the faster of copy and read, at their best."""
        return max(self.copy.best, 0.0 if self.read is None else self.read.best)

    @property
    def most_flops_per_second(self) -> float:
        """Of products of whatever number of rows was the fastest, at its best."""
        return max(each.best for each in self.products.values())

    def flops_per_second(self, rows: int) -> float:
        """Of products of so many rows, at their best; where these were not measured, of the
        measured numbers of rows next to it the faster one's.
        """
        if rows in self.products:
            return self.products[rows].best
        sizes = sorted(self.products)
        at = bisect.bisect(sizes, rows)
        return max(self.products[size].best for size in sizes[max(0, at - 1) : at + 1])

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        told: dict[str, Any] = {}
        for name, measured in (("copy", self.copy), ("read", self.read)):
            if measured is not None:
                told[f"{name}_bytes_per_second"] = measured.value
                told[f"{name}_best_bytes_per_second"] = measured.best
                told[f"{name}_repeats"] = measured.repeats
                told[f"{name}_spread"] = measured.spread
        told["gemm"] = [
            {
                "rows": rows,
                "flops_per_second": measured.value,
                "best_flops_per_second": measured.best,
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
    frugal: bool = False,
    hardware: Hardware | None = None,
) -> Rates:
    """All rates of this machine's processor; takes seconds.

    shapes: (inputs, outputs) of a step's products; rows: numbers of rows of its steps, of which
    MOST_SIZES are timed, and MANY_ROWS; working_set: bytes of weights that a step reads; frugal:
    little memory is taken, and no more than a part of what is free.
    """
    hardware = hardware or Hardware()
    copied = frugal_bytes(hardware) if frugal else copied_bytes(hardware)
    free = available_bytes(hardware) if frugal else None
    if free is not None:
        working_set = max(1, min(working_set, free // FRUGAL_SHARE))
    copy = copy_bandwidth(copied, threads, repeats)
    read = read_bandwidth(working_set, threads, repeats)
    with blas_threads(1) as single:  # or else BLAS shares the products out by itself
        workers = threads if single else 1
        sizes = sorted({*few_of(rows), MANY_ROWS})
        products = {size: product_rate(shapes, size, workers, repeats) for size in sizes}
    about = {
        "copied_bytes": copied,
        "working_set_bytes": working_set,
        "threads": threads,
        "gemm_by": f"numpy {np.__version__}, {blas_name()}",
        "gemm_threads": threads if single else "those of BLAS",
    }
    return Rates(copy, products, read, about=about)


def faster(before: Rates, after: Rates) -> Rates:
    """Of each measurement the one with the better best repeat; `about` has both bests of COMPARED.

    before, after: of the same shapes and sizes.
    """
    both = {name: [_best(each, name) for each in (before, after)] for name in COMPARED}
    products = {
        rows: _faster(each, after.products.get(rows)) for rows, each in before.products.items()
    }
    return replace(
        before,
        copy=_faster(before.copy, after.copy),
        products=products,
        read=None if before.read is None else _faster(before.read, after.read),
        about={
            **before.about,
            "before_and_after": {n: each for n, each in both.items() if all(each)},
        },
    )


def apart(rates: Rates) -> float:
    """By which share the faster time was faster, of what floors are made of; 0 if it was measured
    once.
    """
    pairs = rates.about.get("before_and_after", {}).values()
    return max((max(pair) / min(pair) - 1 for pair in pairs), default=0.0)


def _faster(before: Measurement, after: Measurement | None) -> Measurement:
    return before if after is None or after.best <= before.best else after


def _best(rates: Rates, name: str) -> float:
    if name == "gemm_best_flops_per_second":
        return rates.most_flops_per_second if rates.products else 0.0
    return rates.bytes_per_second


def copied_bytes(hardware: Hardware) -> int:
    """How much is copied: four times the last caches at least, an eighth of memory at most."""
    wanted = max(LEAST_COPIED, 4 * (last_level_cache(hardware) or 0))
    memory = memory_bytes(hardware)
    return wanted if memory is None else min(wanted, memory // 8)


def frugal_bytes(hardware: Hardware) -> int:
    """How much is copied where memory is short: source and target together are four times the last
    caches, and no more than a part of what is free.
    """
    wanted = max(LEAST_FRUGAL, 2 * (last_level_cache(hardware) or 0))
    free = available_bytes(hardware)
    return wanted if free is None else max(1 << 20, min(wanted, free // (2 * FRUGAL_SHARE)))


def copy_bandwidth(size: int, threads: int, repeats: int = REPEATS) -> Measurement:
    """Bytes a second, read and written, of copying `size` bytes; numpy copies on one core."""
    parts = [np.ones(size // threads, np.uint8) for _ in range(threads)]
    targets = [np.empty_like(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        seconds = timed(lambda: list(pool.map(np.copyto, targets, parts)), repeats)
    return Measurement.of(2 * sum(part.nbytes for part in parts), seconds)


def read_bandwidth(size: int, threads: int, repeats: int = REPEATS) -> Measurement:
    """Bytes a second of reading the same `size` bytes again and again, a part in every thread."""
    parts = [np.ones(max(1, size // threads), np.uint8) for _ in range(threads)]
    passes = max(1, LEAST_COPIED // size)

    def read(part: npt.NDArray[np.uint8]) -> None:
        for _ in range(passes):
            np.maximum.reduce(part)  # of numpy's ways to read everything the fastest

    with ThreadPoolExecutor(threads) as pool:
        seconds = timed(lambda: list(pool.map(read, parts)), repeats)
    return Measurement.of(passes * sum(part.nbytes for part in parts), seconds)


def product_rate(
    shapes: Shapes, rows: int, threads: int = 1, repeats: int = REPEATS
) -> Measurement:
    """Floating-point operations a second of fp32 products [rows, inputs] x [inputs, outputs].

    Every thread makes its share of the outputs and waits for no other. Each shape is timed by
    itself and counts as often as it is named. One matrix for each, so a small one stays in a cache.
    """
    with ThreadPoolExecutor(threads) as pool:
        spent = [
            [times * each for each in _product_seconds(pool, threads, rows, *shape, repeats)]
            for shape, times in Counter(shapes).items()
        ]
    flops = 2.0 * rows * sum(inputs * outputs for inputs, outputs in shapes)
    return Measurement.of(flops, [sum(repeat) for repeat in zip(*spent, strict=True)])


def _product_seconds(
    pool: ThreadPoolExecutor, threads: int, rows: int, inputs: int, outputs: int, repeats: int
) -> list[float]:
    """Of a product, `repeats` times."""
    left = np.ones((rows, inputs), np.float32)
    shares = [len(share) for share in np.array_split(np.arange(outputs), threads)]
    parts = [
        (np.ones((inputs, share), np.float32), np.empty((rows, share), np.float32))
        for share in shares
    ]

    def multiply(times: int) -> None:
        def work(part: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]) -> None:
            right, out = part
            for _ in range(times):
                np.dot(left, right, out=out)

        list(pool.map(work, parts))

    return timed_in_bulk(multiply, repeats)


def few_of(rows: Iterable[int], most: int = MOST_SIZES) -> list[int]:
    """Of numbers of rows the least, the greatest, and some that are about evenly apart in ratio."""
    sizes = sorted(set(rows))
    if len(sizes) <= most:
        return sizes
    wanted = np.geomspace(sizes[0], sizes[-1], most)
    return sorted({sizes[int(np.abs(np.subtract(sizes, to)).argmin())] for to in wanted})


def timed(call: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Seconds of a call, `repeats` times, after it was made twice to warm up."""
    spent = []
    for repeat in range(repeats + 2):
        began = time.perf_counter()
        call()
        if repeat >= 2:
            spent.append(time.perf_counter() - began)
    return spent


def timed_in_bulk(call: Callable[[int], None], repeats: int = REPEATS) -> list[float]:
    """Seconds of one of the many that `call` is told to do, enough of them to last SHORTEST."""
    call(1)
    once = min(timed(lambda: call(1), 3))
    times = max(1, math.ceil(SHORTEST / max(once, 1e-9)))
    return [seconds / times for seconds in timed(lambda: call(times), repeats)]


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
