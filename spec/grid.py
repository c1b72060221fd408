"""Geometry of a token volume: positions, nearby sets, predecessors. Pure numpy.

Position p of a grid (frames, height, width) is (f, i, j) with p = (f * height + i) * width + j.
Knows nothing of models; schedule.py builds decoding order and cache layout on top of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int = npt.NDArray[np.int32]
MASKED = -1


@dataclass(frozen=True)
class Grid:
    """The size of a token volume. Text of 77 tokens is Grid(77, 1, 1)."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"grid {name} is {value!r}, not an integer of at least 1")

    @property
    def size(self) -> int:
        """Number of positions."""
        return self.frames * self.height * self.width

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width)."""
        return self.frames, self.height, self.width

    def coordinates(self) -> Int:
        """int32 [size, 3]: (f, i, j) of every position, in raster order."""
        return np.indices(self.shape, dtype=np.int32).reshape(3, -1).T.copy()

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Extent:
    """Window sizes of 3D nearby attention: odd numbers, or None for no limit on that axis."""

    frames: int | None
    height: int | None
    width: int | None

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1 or value % 2 == 0):
                raise ValueError(
                    f"extent {name} is {value!r}; it must be an odd window size or None (no limit)"
                )

    def resolve(self, grid: Grid) -> Extent:
        """The same window on this grid with every `no limit` replaced by a size that covers it."""
        sizes = (self.frames, self.height, self.width)
        pairs = zip(sizes, grid.shape, strict=True)
        return Extent(*(2 * n - 1 if e is None else e for e, n in pairs))

    @property
    def radius(self) -> tuple[int, int, int]:
        """(r_f, r_h, r_w) of a resolved extent."""
        sizes = (self.frames, self.height, self.width)
        assert None not in sizes, "resolve the extent against a grid first"
        return tuple((e - 1) // 2 for e in sizes)  # type: ignore[operator, return-value]


FULL = Extent(None, None, None)


def window_offsets(extent: Extent, *, causal: bool) -> Int:
    """int32 [n, 3]: the window's offsets (key minus query) in its fixed, lexicographic order.

    causal keeps those at or before the query in raster order; the query itself comes last.
    """
    axes = [np.arange(-r, r + 1, dtype=np.int32) for r in extent.radius]
    offsets = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    return offsets[: len(offsets) // 2 + 1] if causal else offsets


def neighbours(grid: Grid, extent: Extent, *, causal: bool) -> Int:
    """int32 [size, n]: the nearby set of every position within its own grid.

    Columns follow `window_offsets`; -1 where the window leaves the grid (it is clipped, never
    wrapped or shifted).
    """
    return cross_neighbours(grid, grid, extent, causal=causal)


def cross_neighbours(query: Grid, key: Grid, extent: Extent, *, causal: bool = False) -> Int:
    """int32 [query.size, n]: positions of `key` near every position of `query`; -1 is masked.

    The centre of query (f, i, j) is (f*F_k//F_q, i*H_k//H_q, j*W_k//W_q) (paper, equation of 3DNA).
    """
    extent = extent.resolve(key)
    sizes = np.array(key.shape, dtype=np.int32)
    centre = query.coordinates() * sizes // np.array(query.shape, dtype=np.int32)
    cells = centre[:, None, :] + window_offsets(extent, causal=causal)[None, :, :]
    inside = ((cells >= 0) & (cells < sizes)).all(axis=-1)
    position = (cells[..., 0] * key.height + cells[..., 1]) * key.width + cells[..., 2]
    return np.where(inside, position, MASKED).astype(np.int32)


def predecessors(grid: Grid, shift: str = "nearest") -> Int:
    """int32 [size]: the position whose token each position is fed; -1 means <bos>.

    nearest: the left neighbour; at a row start the token above; at a frame start the same cell of
    the previous frame. raster: the previous position in raster order.
    """
    position = np.arange(grid.size, dtype=np.int32)
    if shift == "raster":
        return position - 1
    if shift != "nearest":
        raise ValueError(f"shift {shift!r} is not one of 'nearest', 'raster'")
    f, i, j = grid.coordinates().T
    above = np.where(i > 0, position - grid.width, position - grid.height * grid.width)
    result = np.where(j > 0, position - 1, above)
    return np.where((f == 0) & (i == 0) & (j == 0), MASKED, result).astype(np.int32)
