"""Index tables of one decoding run, in decoding order, staged once per request.

The tables turn a schedule into what `decoder_step` is fed; every decoder (PyTorch's reference, the
runtime's engine) slices the same ones, so they cannot disagree about geometry.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .config import DecoderConfig
from .grid import MASKED, Grid, Int, neighbours, predecessors
from .schedule import Schedule, prefilled_schedule, raster_schedule, wave_schedule


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """Row k of every table belongs to the k-th decoded position.

    position: int32 [N], its place in raster order; coordinates: int32 [N, 3], (frame, row, column);
    fed: int32 [N], the position whose token it is fed, N for <bos>; write_index: int32 [N], its
    cache entry; neighbours: int32 [N, n], cache entries it attends to, -1 masked; bounds: int32
    [steps + 1], call s decodes rows bounds[s] to bounds[s + 1]; frame_done: int32 [frames], the
    call after which each frame's tokens are complete.
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


def base_schedule(decoder: DecoderConfig, grid: Grid, kind: str = "wave") -> Schedule:
    """The schedule of a decoder on a grid: kind "wave", or "raster" for one position a call."""
    if kind == "wave":
        return wave_schedule(grid, decoder.window_extents, decoder.shift)
    if kind == "raster":
        return raster_schedule(grid, decoder.window_extents)
    raise ValueError(f"schedule {kind!r} is not one of 'wave', 'raster'")


@functools.lru_cache(maxsize=64)
def decode_plan(decoder: DecoderConfig, grid: Grid, kind: str = "wave") -> DecodePlan:
    """Tables for generating a whole volume. ValueError if the grid is not this decoder's."""
    check_grid(decoder, grid)
    return _tables(decoder, base_schedule(decoder, grid, kind))


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


def cache_entries(decoder: DecoderConfig) -> int:
    """Ring entries that every schedule of 1 to the configured number of frames fits in."""
    grids = [
        Grid(f + 1, decoder.grid.height, decoder.grid.width) for f in range(decoder.grid.frames)
    ]
    kinds = ("wave", "raster")
    return max(base_schedule(decoder, grid, kind).entries for grid in grids for kind in kinds)


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
