"""Decoding order and cache layout, derived from the dependencies of 3D nearby attention.

A call of the decoder processes any number of positions. In every layer it writes their keys and
values before it attends, so a position may read another position of the same call; only the token
that a position is *fed* must come from an earlier one. Earliest-time scheduling of that graph gives
waves, and decoding wave by wave gives exactly what one-by-one raster decoding gives.

With the nearest predecessor and radii r on a grid wider than the window, a row starts
max(1, r_w) waves after the one above and a frame r_w * (r_h + 1) (at least 1) after the one before.
Everything here is computed from the graph; no closed form is assumed. Pure numpy.

A volume need not have a last frame: every frame is decoded as the one before, the same number of
waves later, so the waves of one frame and that number are the schedule of a clip of any length.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .grid import MASKED, Extent, Grid, Int, neighbours, predecessors, window_offsets

Long = npt.NDArray[np.int64]
Reads = Literal["same_call", "earlier_call"]


@dataclass(frozen=True, eq=False)
class Schedule:
    """Which positions each call processes, and where their keys and values live.

    calls: int32 arrays of positions, in decoding order; entry: int32 [size], the cache entry of
    each position (a ring in decoding order); entries: ring size R, the least that keeps every
    entry until its last reader is done; oldest: int32 [size], the place in decoding order of the
    oldest position that each position reads; widest: positions of the largest call, before any were
    merged.
    """

    grid: Grid
    calls: tuple[Int, ...]
    entry: Int
    entries: int
    oldest: Int
    widest: int

    @property
    def steps(self) -> int:
        """Number of decoder calls."""
        return len(self.calls)


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


@dataclass(frozen=True, eq=False)
class EndlessSchedule:
    """Decoding order and cache layout of a volume without a last frame.

    Cell c of frame f is decoded in wave first[c] + f * period. Positions are ordered by wave, then
    as in raster order; a position's rank is its place in that order, and its cache entry the rank
    modulo `entries`. A clip of F frames is decoded in the same order with the positions of later
    frames left out: its waves are the same, and none of them is empty.

    first: int32 [cells], waves of frame 0, 0 being cell 0's; by_phase: int32 arrays, one for each
    phase (wave modulo period), of its cells in decoding order; place: int32 [cells], where
    `by_phase` has each cell; base: int64, per wave, rank less `place` of its positions; from wave
    max(first) on it grows by the number of cells every `period` waves.
    """

    period: int
    first: Int
    by_phase: tuple[Int, ...]
    place: Int
    base: Long
    entries: int

    @property
    def last(self) -> int:
        """The wave that completes frame 0."""
        return len(self.base) - self.period

    def steps(self, frames: int) -> int:
        """Number of waves of so many frames."""
        return self.last + 1 + (frames - 1) * self.period

    def complete_frames(self, wave: int) -> int:
        """How many frames are complete once a wave is done."""
        return max(0, (wave - self.last) // self.period + 1)

    def wave(self, wave: int, frames: int) -> tuple[Int, Int]:
        """int32 frame and cell of each position of a wave of a clip of so many frames."""
        cells = self.by_phase[wave % self.period]
        frame = (wave - self.first[cells]) // self.period
        inside = (frame >= 0) & (frame < frames)
        return frame[inside], cells[inside]

    def rank(self, frame: npt.NDArray[np.integer], cell: npt.NDArray[np.integer]) -> Long:
        """int64: the rank of positions, given as frames (0 or later) and cells that broadcast."""
        wave = self.first[cell] + frame * self.period
        periods = np.maximum(wave - self.last, 0) // self.period
        return (
            self.base[wave - periods * self.period] + periods * len(self.first) + self.place[cell]
        )


def frame_windows(height: int, width: int, extents: Sequence[Extent]) -> tuple[Int, Int]:
    """The causal windows of a frame that has all the frames it can see before it.

    int32 [n], how many frames earlier each column is, and int32 [cells, n], which cell of that
    frame, -1 outside; the columns are those of `neighbours`, all extents side by side.
    """
    cells = height * width
    earlier, where = [], []
    for extent in extents:
        radius = extent.radius[0]
        nearby = neighbours(Grid(radius + 1, height, width), extent, causal=True)[-cells:]
        where.append(np.where(nearby == MASKED, MASKED, nearby % cells).astype(np.int32))
        earlier.append(-window_offsets(extent, causal=True)[:, 0])
    return np.concatenate(earlier), np.concatenate(where, axis=1)


@functools.lru_cache(maxsize=64)
def endless_wave_schedule(
    height: int, width: int, extents: tuple[Extent, ...], shift: str
) -> EndlessSchedule:
    """`wave_schedule` of a volume that goes on; the extents limit every axis."""
    cells = height * width
    # Waves follow from those of the `reach` frames before, and moving all of these moves them
    # alike. So if `reach` frames in a row are each `period` later than the one before, all are.
    reach = max(1, *(extent.radius[0] for extent in extents))
    wave = wave_index(Grid(reach + 1, height, width), extents, shift).reshape(-1, cells)
    later = np.diff(wave, axis=0)
    period = int(later[0, 0])
    assert (later == period).all(), "the first frames do not repeat each other"
    return _endless(height, width, extents, wave[0], period)


@functools.lru_cache(maxsize=64)
def endless_raster_schedule(
    height: int, width: int, extents: tuple[Extent, ...]
) -> EndlessSchedule:
    """`raster_schedule` of a volume that goes on."""
    cells = height * width
    return _endless(height, width, extents, np.arange(cells, dtype=np.int32), cells)


def _endless(
    height: int, width: int, extents: tuple[Extent, ...], first: Int, period: int
) -> EndlessSchedule:
    # In a wave, the later a cell is in its frame, the earlier is the frame.
    order = np.lexsort((np.arange(len(first)), -first)).astype(np.int32)
    by_phase = tuple(order[first[order] % period == phase] for phase in range(period))
    place = np.empty(len(first), np.int32)
    for phase in by_phase:
        place[phase] = np.arange(len(phase))
    waves = np.arange(int(first.max()) + period)
    begun = -(-(waves[:, None] - first) // period)  # frames begun before a wave, cell by cell
    later = (first > waves[:, None]) & ((waves[:, None] - first) % period == 0)
    base = np.maximum(begun, 0).sum(axis=1) - later.sum(axis=1)
    endless = EndlessSchedule(period, first, by_phase, place, base, 0)
    return dataclasses.replace(endless, entries=_endless_entries(endless, height, width, extents))


def _endless_entries(
    endless: EndlessSchedule, height: int, width: int, extents: tuple[Extent, ...]
) -> int:
    """The least ring for any number of frames: what one period needs once all frames are there.

    Before that, and after the last frame, there are fewer positions between a write and a read.
    """
    earlier, where = frame_windows(height, width, extents)
    begin = 2 * endless.last + int(earlier.max()) * endless.period  # reads from wave `last` on
    most = 0
    for wave in range(begin, begin + endless.period):
        frame, cell = endless.wave(wave, wave + 1)
        near = where[cell]
        ranks = endless.rank(frame[:, None] - earlier, near)
        own = endless.rank(frame, cell)
        oldest = np.where(near == MASKED, own[:, None], ranks).min()
        most = max(most, int(own[-1]) + 1 - int(oldest))
    return most


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
    widest = max(len(call) for call in calls)
    return Schedule(grid, calls, entry, entries, oldest.astype(np.int32), widest)
