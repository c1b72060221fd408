"""Real samples with one factor changed, and the box that a sprite never leaves: what TI2I and TV2V
are to make, and where.

An edited sample is as exact as the world's own: the same canvas, place and speed, one factor
different. Knows the plan of a sample; nothing of masks, tokens or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .bank import TILE
from .world import FRAMES, REACH, SIDE, Plan, SpriteSample, SpriteWorld, Track, render

EDITS = ("colour", "class", "motion")
_OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def edited(world: SpriteWorld, index: int, factor: str) -> SpriteSample | None:
    """Clip `index` with another colour, class (and glyph) or motion; None if there is no other.

    The new motion is the mirrored one ("left" for "right", "left then right" for "right then
    left"), along the same stretch of canvas. The new class and motion are a pair that this split
    has, so test stays test and novel stays novel. ValueError for a factor that is not in EDITS.
    """
    plan = world.plan(index)
    if factor == "colour":
        colours = [name for name in world.colours if name != plan.factors.colour]
        changed = replace(plan, factors=replace(plan.factors, colour=_pick(colours, index)))
        return _sample(changed)
    if factor == "class":
        return _with_class(world, plan, index)
    if factor == "motion":
        return _mirrored(world, plan)
    raise ValueError(f"unknown edit {factor!r}; choose one of {', '.join(EDITS)}")


def tile_box(world: SpriteWorld, index: int, frames: Sequence[int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right), ends excluded, of all places of the sprite's tile in `frames`.

    Every glyph fits into the tile, so any edit of these frames stays inside the box.
    """
    corners = [world.plan(index).track.corner(f) for f in frames]
    rows, columns = zip(*corners, strict=True)
    return min(rows), min(columns), max(rows) + TILE, max(columns) + TILE


def aligned(box: tuple[int, int, int, int], cell: int) -> tuple[int, int, int, int]:
    """The smallest box of whole cells that holds `box` and a pixel around it, on the canvas."""
    top, left, bottom, right = box
    low = [max(0, (edge - 1) // cell * cell) for edge in (top, left)]
    high = [min(SIDE, -(-(edge + 1) // cell) * cell) for edge in (bottom, right)]
    return low[0], low[1], high[0], high[1]


def _with_class(world: SpriteWorld, plan: Plan, index: int) -> SpriteSample | None:
    now = plan.factors
    classes = [c for c, motion in world.pairs if motion == now.motion and c != now.class_index]
    if not classes:
        return None
    class_index = _pick(classes, index)
    glyph_TT = _pick(world.glyphs[class_index], index)
    return _sample(replace(plan, factors=replace(now, class_index=class_index), glyph_TT=glyph_TT))


def _mirrored(world: SpriteWorld, plan: Plan) -> SpriteSample | None:
    words = plan.factors.motion.split()
    motion = " ".join(_OPPOSITE.get(word, word) for word in words)
    if (plan.factors.class_index, motion) not in world.pairs:
        return None
    return _sample(
        replace(plan, factors=replace(plan.factors, motion=motion), track=_opposite(plan.track))
    )


def _opposite(track: Track) -> Track:
    """The track that covers the same stretch the other way round, in the frames of a sample."""
    axis, sign = (0 if track.direction[0] else 1), sum(track.direction)
    along = [track.corner(f)[axis] for f in range(FRAMES)]
    travel = [sign * (place - along[0]) for place in along]
    start = REACH - track.start - max(travel) - min(travel)
    row, column = track.direction
    return replace(track, direction=(-row, -column), start=start)


def _sample(plan: Plan) -> SpriteSample:
    frames, segmentation = render(plan, range(FRAMES))
    factors = plan.factors
    return SpriteSample(frames, segmentation, factors.video_caption, factors.image_caption, factors)


def _pick(choices, index: int):
    """One of them, evenly over the indices."""
    return choices[index // len(EDITS) % len(choices)]
