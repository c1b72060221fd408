"""Decoding order and cache layout, derived from the dependencies of 3D nearby attention.

A call of the decoder processes any number of positions. In every layer it writes their keys and
values before it attends, so a position may read another position of the same call; only the token
that a position is *fed* must come from an earlier one. Earliest-time scheduling of that graph gives
waves, and decoding wave by wave gives exactly what one-by-one raster decoding gives.

With the nearest predecessor and radii r on a grid wider than the window, a row starts
max(1, r_w) waves after the one above and a frame r_w * (r_h + 1) (at least 1) after the one before.
Everything here is computed from the graph; no closed form is assumed. Pure numpy.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .grid import MASKED, Extent, Grid, Int, neighbours, predecessors

Reads = Literal["same_call", "earlier_call"]


@dataclass(frozen=True, eq=False)
class Schedule:
    """Which positions each call processes, and where their keys and values live.

    calls: int32 arrays of positions, in decoding order; entry: int32 [size], the cache entry of
    each position (a ring in decoding order); entries: ring size R, the least that keeps every
    entry until its last reader is done; oldest: int32 [size], the place in decoding order of the
    oldest position that each position reads.
    """

    grid: Grid
    calls: tuple[Int, ...]
    entry: Int
    entries: int
    oldest: Int

    @property
    def steps(self) -> int:
        """Number of decoder calls."""
        return len(self.calls)

    @property
    def widest(self) -> int:
        """Positions of the largest call."""
        return max(len(call) for call in self.calls)


def wave_index(
    grid: Grid, extents: Sequence[Extent], shift: str, reads: Reads = "same_call"
) -> Int:
    """int32 [size]: the earliest call in which each position can be decoded.

    extents: the windows of all layers. reads "earlier_call" is for an operator that cannot order
    the writes of a call before its reads; it costs more steps and changes no token.
    """
    if reads not in ("same_call", "earlier_call"):
        raise ValueError(f"reads {reads!r} is not one of 'same_call', 'earlier_call'")
    lag = 0 if reads == "same_call" else 1
    nearby = _union(grid, extents)[:, :-1]  # the last column is the position itself
    before = predecessors(grid, shift)
    wave = np.zeros(grid.size, np.int32)
    for position in range(grid.size):
        keys = nearby[position]
        earliest = (wave[keys[keys != MASKED]] + lag).max(initial=0)
        if before[position] != MASKED:
            earliest = max(earliest, wave[before[position]] + 1)
        wave[position] = earliest
    return wave


@functools.lru_cache(maxsize=256)
def wave_schedule(
    grid: Grid, extents: tuple[Extent, ...], shift: str, reads: Reads = "same_call"
) -> Schedule:
    """The schedule of fewest steps that gives exactly the tokens of raster order."""
    wave = wave_index(grid, extents, shift, reads)
    order = np.argsort(wave, kind="stable").astype(np.int32)
    starts = np.flatnonzero(np.diff(wave[order])) + 1
    return _with_cache(grid, extents, tuple(np.split(order, starts)))


@functools.lru_cache(maxsize=64)
def raster_schedule(grid: Grid, extents: tuple[Extent, ...]) -> Schedule:
    """One position a call, in raster order."""
    calls = tuple(np.arange(grid.size, dtype=np.int32).reshape(-1, 1))
    return _with_cache(grid, extents, calls)


def prefilled_schedule(base: Schedule, known: npt.NDArray[np.bool_], shift: str) -> Schedule:
    """The base schedule with consecutive calls merged where known tokens allow it.

    known: bool [size], positions whose tokens are given. A call takes on the next one if every
    token fed to it is known or was sampled in an earlier call, and if the ring holds all that the
    merged call reads and writes. Order, entries and tokens stay those of `base`.
    """
    if known.shape != (base.grid.size,):
        raise ValueError(f"known has shape {known.shape}, the grid {base.grid.size} positions")
    before = predecessors(base.grid, shift)
    ready = np.append(known, True)  # index -1 is <bos>
    groups: list[list[Int]] = []
    written, oldest = 0, 0
    for call in base.calls:
        end, low = written + len(call), int(base.oldest[call].min())
        fits = bool(groups) and end - min(oldest, low) <= base.entries
        if fits and ready[before[call]].all():
            groups[-1].append(call)
            oldest = min(oldest, low)
        else:
            for earlier in groups[-1] if groups else []:
                ready[earlier] = True
            groups.append([call])
            oldest = low
        written = end
    calls = tuple(np.concatenate(group) for group in groups)
    return dataclasses.replace(base, calls=calls)


def _union(grid: Grid, extents: Sequence[Extent]) -> Int:
    """int32 [size, n]: the causal nearby sets of all layers together; the position itself last."""
    sets = [neighbours(grid, extent, causal=True) for extent in dict.fromkeys(extents)]
    own = np.arange(grid.size, dtype=np.int32)[:, None]
    return np.concatenate([*(s[:, :-1] for s in sets), own], axis=1)


def _with_cache(grid: Grid, extents: Sequence[Extent], calls: tuple[Int, ...]) -> Schedule:
    order = np.concatenate(calls)
    rank = np.empty(grid.size, np.int64)
    rank[order] = np.arange(grid.size)
    nearby = _union(grid, extents)
    ranks = np.where(nearby == MASKED, rank[:, None], rank[nearby])
    oldest = ranks.min(axis=1)  # of what each position reads
    entries, written = 0, 0
    for call in calls:
        written += len(call)
        entries = max(entries, written - int(oldest[call].min()))
    entry = (rank % entries).astype(np.int32)
    return Schedule(grid, calls, entry, entries, oldest.astype(np.int32))
