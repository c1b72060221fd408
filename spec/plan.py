"""What `decoder_step` is fed about geometry, call by call: the rows of one decoding run.

Every decoder (PyTorch's reference, the runtime's engine) takes the same ones, so they cannot
disagree. A volume of up to the configured number of frames has tables, made once; a longer clip has
a plan that makes the rows of a call when they are asked for, in memory that does not depend on how
long it is.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .config import DecoderConfig
from .grid import MASKED, Grid, Int, neighbours, predecessors
from .schedule import (
    EndlessSchedule,
    Long,
    Schedule,
    endless_raster_schedule,
    endless_wave_schedule,
    frame_windows,
    prefilled_schedule,
    raster_schedule,
    wave_schedule,
)

MAX_PREDICTED_FRAMES = 1000  # of a clip that goes on beyond the trained length
STAGED_CALLS = 16  # of such a clip whose rows are made at a time


class Call(NamedTuple):
    """The rows of one call; row k of every array belongs to the k-th position it decodes.

    position: int32 [w], its place in raster order; coordinates: int32 [w, 3], (frame, row, column),
    the frame modulo the configured number; fed: int32 [w], the position whose token it is fed, N
    (the size of the volume) for <bos>; write_index: int32 [w], its cache entry; neighbours: int32
    [w, n], cache entries it attends to, -1 masked.
    """

    position: Int
    coordinates: Int
    fed: Int
    write_index: Int
    neighbours: Int


class Plan(Protocol):
    """One decoding run, call by call."""

    @property
    def grid(self) -> Grid:
        """The volume that is decoded."""
        ...

    @property
    def steps(self) -> int:
        """Number of calls."""
        ...

    @property
    def entries(self) -> int:
        """Cache entries that it writes to and reads."""
        ...

    @property
    def widest(self) -> int:
        """Positions of the widest wave; a call that merges several may have more."""
        ...

    @property
    def held_frames(self) -> int:
        """How many frames in a row must be at hand at a time.

        Those from the oldest that is not complete before a call, or that the call is fed from, to
        the newest that it decodes.
        """
        ...

    def call(self, step: int) -> Call:
        """The rows of a call."""
        ...

    def stage(self, step: int) -> tuple[Call, Int]:
        """The rows of a call and of as many after it as are made at a time, one after the other.

        And int32 [calls + 1], where the rows of each of these calls begin.
        """
        ...

    def complete_frames(self, step: int) -> int:
        """How many frames are complete, and all before them, once a call is done."""
        ...


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """Row k of every table belongs to the k-th decoded position.

    position, coordinates, fed, write_index, neighbours: as in Call, for all N positions; bounds:
    int32 [steps + 1], call s decodes rows bounds[s] to bounds[s + 1]; frame_done: int32 [frames],
    the call after which each frame's tokens are complete.
    """

    schedule: Schedule
    position: Int
    coordinates: Int
    fed: Int
    write_index: Int
    neighbours: Int
    bounds: Int
    frame_done: Int

    @property
    def grid(self) -> Grid:
        """The volume that is decoded."""
        return self.schedule.grid

    @property
    def steps(self) -> int:
        """Number of calls."""
        return self.schedule.steps

    def rows(self, step: int) -> slice:
        """Rows of one call."""
        return slice(int(self.bounds[step]), int(self.bounds[step + 1]))

    @property
    def entries(self) -> int:
        """Cache entries that it writes to and reads."""
        return self.schedule.entries

    @property
    def widest(self) -> int:
        """Positions of the widest wave."""
        return self.schedule.widest

    @property
    def held_frames(self) -> int:
        """All frames."""
        return self.grid.frames

    def call(self, step: int) -> Call:
        """The rows of a call: views of the tables."""
        return self._views(self.rows(step))

    def stage(self, step: int) -> tuple[Call, Int]:
        """All rows from a call on: views of the tables."""
        first = self.bounds[step]
        return self._views(slice(int(first), None)), self.bounds[step:] - first

    def _views(self, rows: slice) -> Call:
        return Call(
            self.position[rows],
            self.coordinates[rows],
            self.fed[rows],
            self.write_index[rows],
            self.neighbours[rows],
        )

    def complete_frames(self, step: int) -> int:
        """How many frames are complete, and all before them, once a call is done."""
        return self._complete[step]

    @cached_property
    def _complete(self) -> list[int]:
        done = np.maximum.accumulate(self.frame_done)
        return np.searchsorted(done, np.arange(self.steps), side="right").tolist()


class RollingPlan:
    """A clip of any number of frames, of which the first `known_frames` are given.

    Each position attends to its window and nothing else, and the time coordinate starts again from
    0 after the last configured frame, so frames beyond that are decoded as those before them.

    Calls are those of `wave_schedule` or, for kind "raster", one position each. At the start,
    consecutive waves are merged where given tokens and the ring allow it, as in
    `prefilled_schedule`; none can be once every wave decodes a token that the next one is fed.

    offset: `stage` ends after calls of which the number is this more than a multiple of
    STAGED_CALLS, so that plans with different ones are staged in different calls.
    """

    def __init__(
        self,
        decoder: DecoderConfig,
        frames: int,
        known_frames: int = 0,
        kind: str = "wave",
        offset: int = 0,
    ) -> None:
        """ValueError for frames or known_frames out of range, or a decoder of single images."""
        most = decoder.grid
        if most.frames < 2:
            raise ValueError("this model decodes single images; a clip cannot go on from one")
        if not 1 <= frames <= MAX_PREDICTED_FRAMES:
            raise ValueError(f"{frames} frames are not in [1, {MAX_PREDICTED_FRAMES}]")
        if not 0 <= known_frames <= min(most.frames, frames - 1):
            raise ValueError(
                f"{known_frames} known frames are not in [0, {min(most.frames, frames - 1)}]: this "
                f"model takes up to {most.frames}, and fewer than the {frames} of the clip"
            )
        self.grid = Grid(frames, most.height, most.width)
        self._offset = offset
        self._period_frames, self._cells = most.frames, most.height * most.width
        self._schedule = endless_schedule(decoder, kind)
        self._earlier, self._where = frame_windows(most.height, most.width, decoder.window_extents)
        pair = predecessors(Grid(2, most.height, most.width), decoder.shift)
        own = np.arange(self._cells, 2 * self._cells, dtype=np.int32)
        self._fed_back = own - pair[-self._cells :]  # how far before a position its token is
        self.widest = max(len(cells) for cells in self._schedule.by_phase)
        self._merged = self._merge(known_frames) if kind == "wave" else [0]
        self.held_frames = self._held_frames()

    @property
    def steps(self) -> int:
        """Number of calls."""
        return len(self._merged) - 1 + self._schedule.steps(self.grid.frames) - self._merged[-1]

    @property
    def entries(self) -> int:
        """Cache entries that it writes to and reads."""
        return self._schedule.entries

    def call(self, step: int) -> Call:
        """The rows of a call, made anew each time."""
        return self._made(step, step + 1)[0]

    def stage(self, step: int) -> tuple[Call, Int]:
        """The rows of up to STAGED_CALLS calls, made anew each time."""
        over = (step - self._offset) % STAGED_CALLS
        return self._made(step, min(step + STAGED_CALLS - over, self.steps))

    def _made(self, begin: int, end: int) -> tuple[Call, Int]:
        """The rows of calls [begin, end), and where each call's begin."""
        places, bounds = [], [0]
        for step in range(begin, end):
            first, last = self._waves(step)
            waves = [self._schedule.wave(wave, self.grid.frames) for wave in range(first, last)]
            places += waves
            bounds.append(bounds[-1] + sum(len(frame) for frame, _ in waves))
        frame, cell = (np.concatenate(part) for part in zip(*places, strict=True))
        return self._rows(frame, cell), np.array(bounds, np.int32)

    def complete_frames(self, step: int) -> int:
        """How many frames are complete, and all before them, once a call is done."""
        _, end = self._waves(step)
        return min(self._schedule.complete_frames(end - 1), self.grid.frames)

    def _waves(self, step: int) -> tuple[int, int]:
        """The half-open range of waves that a call decodes."""
        merged = len(self._merged) - 1
        if step < merged:
            return self._merged[step], self._merged[step + 1]
        wave = self._merged[-1] + step - merged
        return wave, wave + 1

    def _rows(self, frame: Int, cell: Int) -> Call:
        position = frame * self._cells + cell
        fed = position - self._fed_back[cell]
        row, column = np.divmod(cell, np.int32(self.grid.width))
        rank, near = self._ranks(frame, cell)
        entries = self._schedule.entries
        return Call(
            position=position,
            coordinates=np.stack([frame % self._period_frames, row, column], axis=1),
            fed=np.where(fed < 0, np.int32(self.grid.size), fed),
            write_index=(rank % entries).astype(np.int32),
            neighbours=np.where(near < 0, MASKED, near % entries).astype(np.int32),
        )

    def _ranks(self, frame: Int, cell: Int) -> tuple[Long, Long]:
        """int64 ranks [w] of positions and [w, n] of their windows, -1 outside the volume."""
        frames, cells = frame[:, None] - self._earlier, self._where[cell]
        near = self._schedule.rank(np.maximum(frames, 0), cells)
        outside = (frames < 0) | (cells == MASKED)
        return self._schedule.rank(frame, cell), np.where(outside, MASKED, near)

    def _merge(self, known_frames: int) -> list[int]:
        """The first wave of each merged call, and the first wave after them, at least [0]."""
        if known_frames == 0:
            return [0]
        starts, written_before, low = [0], 0, 0
        # A later wave is fed by the one before with a token that is not known.
        stop = min(self._schedule.steps(known_frames) + 1, self._schedule.steps(self.grid.frames))
        for wave in range(stop):
            frame, cell = self._schedule.wave(wave, self.grid.frames)
            rank, near = self._ranks(frame, cell)
            oldest = int(np.where(near == MASKED, rank[:, None], near).min())
            fed = frame * self._cells + cell - self._fed_back[cell]
            fed_frame, fed_cell = np.divmod(np.maximum(fed, 0), self._cells)
            sampled = self._schedule.rank(fed_frame, fed_cell) < written_before
            ready = (fed_frame < known_frames) | sampled
            fits = int(rank[-1]) + 1 - min(oldest, low) <= self._schedule.entries
            if ready.all() and fits:
                low = min(oldest, low)
            else:
                starts.append(wave)
                written_before, low = int(rank[0]), oldest
        return [*starts, stop]

    def _held_frames(self) -> int:
        """As Plan says, or more by a frame."""
        schedule, last = self._schedule, self.grid.frames - 1
        merged = itertools.pairwise(self._merged)
        most = schedule.last // schedule.period + 2  # in calls of one wave
        for begin, end in merged:
            newest = min((end - 1) // schedule.period, last)
            # The first row of a frame is fed from the frame before, which may be complete.
            most = max(most, newest - schedule.complete_frames(begin - 1) + 2)
        return min(most, self.grid.frames)


def base_schedule(decoder: DecoderConfig, grid: Grid, kind: str = "wave") -> Schedule:
    """The schedule of a decoder on a grid: kind "wave", or "raster" for one position a call."""
    if kind == "wave":
        return wave_schedule(grid, decoder.window_extents, decoder.shift)
    if kind == "raster":
        return raster_schedule(grid, decoder.window_extents)
    raise ValueError(f"schedule {kind!r} is not one of 'wave', 'raster'")


def endless_schedule(decoder: DecoderConfig, kind: str = "wave") -> EndlessSchedule:
    """`base_schedule` of a volume of this decoder that goes on."""
    height, width = decoder.grid.height, decoder.grid.width
    if kind == "wave":
        return endless_wave_schedule(height, width, decoder.window_extents, decoder.shift)
    if kind == "raster":
        return endless_raster_schedule(height, width, decoder.window_extents)
    raise ValueError(f"schedule {kind!r} is not one of 'wave', 'raster'")


@functools.lru_cache(maxsize=64)
def decode_plan(decoder: DecoderConfig, grid: Grid, kind: str = "wave") -> DecodePlan:
    """Tables for generating a whole volume. ValueError if the grid is not this decoder's."""
    check_grid(decoder, grid)
    return _tables(decoder, base_schedule(decoder, grid, kind))


def widest_wave(decoder: DecoderConfig) -> int:
    """Positions of the widest wave of any volume that is drawn: clips that go on beyond the
    decoder's grid may have wider waves than it has.
    """
    widest = decode_plan(decoder, decoder.grid).widest
    if decoder.grid.frames > 1:
        widest = max(widest, *map(len, endless_schedule(decoder).by_phase))
    return widest


def completion_plan(
    decoder: DecoderConfig, grid: Grid, known: npt.NDArray[np.bool_], kind: str = "wave"
) -> DecodePlan:
    """Tables for a volume of which some tokens are given; known: bool [N] in raster order."""
    check_grid(decoder, grid)
    schedule = base_schedule(decoder, grid, kind)
    if kind == "wave" and known.any():
        schedule = prefilled_schedule(schedule, known, decoder.shift)
    return _tables(decoder, schedule)


def check_grid(decoder: DecoderConfig, grid: Grid) -> None:
    """ValueError unless the decoder has positions for every cell of the grid."""
    most = decoder.grid
    if (grid.height, grid.width) != (most.height, most.width) or grid.frames > most.frames:
        raise ValueError(
            f"this model decodes 1 to {most.frames} frames of {most.height}x{most.width} tokens, "
            f"not {grid}"
        )


def longest_clip(decoder: DecoderConfig) -> int:
    """Frames of the longest clip that can go on from given frames; 1 for a model of images."""
    return MAX_PREDICTED_FRAMES if decoder.grid.frames > 1 else 1


def cache_entries(decoder: DecoderConfig) -> int:
    """Ring entries that every schedule fits in: of 1 to the configured number of frames, and for
    more than one, of any number, which may need more.
    """
    grids = [
        Grid(f + 1, decoder.grid.height, decoder.grid.width) for f in range(decoder.grid.frames)
    ]
    kinds = ("wave", "raster")
    entries = [base_schedule(decoder, grid, kind).entries for grid in grids for kind in kinds]
    if decoder.grid.frames > 1:
        entries += [endless_schedule(decoder, kind).entries for kind in kinds]
    return max(entries)


def _tables(decoder: DecoderConfig, schedule: Schedule) -> DecodePlan:
    grid = schedule.grid
    order = np.concatenate(schedule.calls)
    windows = [neighbours(grid, e, causal=True) for e in decoder.window_extents]
    nearby = np.concatenate(windows, axis=1)[order]
    before = predecessors(grid, decoder.shift)[order]
    sizes = [len(call) for call in schedule.calls]
    call_of = np.repeat(np.arange(len(sizes)), sizes)
    frame = grid.coordinates()[order][:, 0]
    frame_done = np.zeros(grid.frames, np.int32)
    np.maximum.at(frame_done, frame, call_of.astype(np.int32))
    return DecodePlan(
        schedule=schedule,
        position=order,
        coordinates=grid.coordinates()[order],
        fed=np.where(before == MASKED, grid.size, before).astype(np.int32),
        write_index=schedule.entry[order],
        neighbours=np.where(nearby == MASKED, MASKED, schedule.entry[nearby]).astype(np.int32),
        bounds=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32),
        frame_done=frame_done,
    )
