"""Reads position, colour, background and motion off the pixels of a sprite clip, by arithmetic.

Made for generated clips: blurred, noisy, with stray blobs or with nothing in them, so every
reader can answer NONE. Knows the named colours of the sprite world; knows no class and no model.

Shapes: F frames, S canvas side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .sprites.bank import TILE
from .sprites.world import BACKGROUNDS, COLOURS, DIRECTIONS, MOTIONS

NONE = "none"
INK_FLOOR = 45.0  # RGB distance from the background below which nothing counts as ink
BACKGROUND_LIMIT = 60.0  # RGB distance from every named background beyond which it has no name
INK_LIMIT = 0.4  # the same for ink, as a share of its distance from the background
SLOWEST = 1.0  # pixels a frame
LEAST_FIT = 0.75  # share of the track's variance that a motion must explain
SHORTEST_LEG = 3  # steps between two turns, or a turn and an end


@dataclass(frozen=True)
class Layout:
    """Where the sprite is. Frames without one have NaN in the track."""

    background: np.ndarray  # f64[3], the clip's background
    ink_FSS: np.ndarray  # f32, 0..1: distance from the background, 1 at full ink
    track_F2: np.ndarray  # f64, centroid (row, column)

    @property
    def seen_F(self) -> np.ndarray:
        """bool: the frames that show a sprite."""
        return np.isfinite(self.track_F2).all(1)


def locate(frames: np.ndarray) -> Layout:
    """Finds the sprite in u8[F,S,S,3]: what differs from the background, where most of it is."""
    background = median_colour(frames)
    distance_FSS = np.sqrt(np.square(frames - background.astype(np.float32)).sum(-1))
    # Full ink is what the strongest 20 pixels of a frame reach, in the median frame.
    strongest = np.partition(distance_FSS.reshape(len(frames), -1), -20, axis=1)[:, -20]
    full = max(float(np.median(strongest)), INK_FLOOR)
    ink_FSS = np.clip(distance_FSS / full, 0.0, 1.0)
    ink_FSS[ink_FSS < max(0.3, INK_FLOOR / 2 / full)] = 0.0
    track_F2 = np.array([_centroid(ink_SS) for ink_SS in ink_FSS])
    track_F2[strongest < INK_FLOOR] = np.nan
    return Layout(background, ink_FSS, track_F2)


def median_colour(frames: np.ndarray) -> np.ndarray:
    """f64[3]: the median of each channel of u8[...,3], by counting."""
    count = frames.size // 3
    middle = ((count - 1) // 2, count // 2)
    below_3 = [np.bincount(frames[..., c].ravel(), minlength=256).cumsum() for c in range(3)]
    return np.array([np.searchsorted(below, middle, side="right").mean() for below in below_3])


def _centroid(ink_SS: np.ndarray) -> tuple[float, float]:
    """Mean position of the ink around its median position, so that stray blobs do not count."""
    total = ink_SS.sum()
    if total == 0:
        return (np.nan, np.nan)
    spans, centre = [], []
    for axis in (1, 0):
        profile = ink_SS.sum(axis)
        median = int(np.searchsorted(np.cumsum(profile), total / 2))
        spans.append(slice(max(0, median - TILE * 3 // 4), median + TILE * 3 // 4 + 1))
    near = ink_SS[spans[0], spans[1]]
    for axis, span in ((1, spans[0]), (0, spans[1])):
        profile = near.sum(axis)
        centre.append(span.start + float(profile @ np.arange(len(profile)) / profile.sum()))
    return (centre[0], centre[1])


def read_background(layout: Layout) -> str:
    """The nearest named background, or NONE."""
    names, values = list(BACKGROUNDS), np.array(list(BACKGROUNDS.values()), float)
    distances = np.linalg.norm(values - layout.background, axis=1)
    best = int(distances.argmin())
    return names[best] if distances[best] <= BACKGROUND_LIMIT else NONE


def read_colour(frames: np.ndarray, layout: Layout) -> str:
    """The named colour that, thinned with the background, comes nearest to the ink; or NONE.

    A thin or blurred stroke nowhere reaches its full colour: its pixels lie between the
    background and the colour. So the share of colour, within bounds, is fitted with it.
    """
    if not np.isfinite(layout.track_F2).any():
        return NONE
    inked = layout.ink_FSS > 0
    full = layout.ink_FSS >= max(np.median(layout.ink_FSS[inked]), 0.5)
    ink = np.median(frames[full], axis=0) - layout.background
    pure_N3 = np.array(list(COLOURS.values()), float) - layout.background
    share_N = np.clip(pure_N3 @ ink / np.square(pure_N3).sum(1), 0.35, 1.1)
    distances = np.linalg.norm(ink - share_N[:, None] * pure_N3, axis=1)
    best = int(distances.argmin())
    return list(COLOURS)[best] if distances[best] <= INK_LIMIT * np.linalg.norm(ink) else NONE


def read_motion(track_F2: np.ndarray) -> str:
    """The motion whose ideal track fits best, or NONE when none explains the track.

    Each motion (and turn frame) is a straight line driven out, and perhaps back, at one speed;
    start and speed are fitted by least squares over the frames that show a sprite.
    """
    seen = np.isfinite(track_F2).all(1)
    steps = len(track_F2) - 1
    if steps < 2 * SHORTEST_LEG or seen.mean() < 0.7:
        return NONE
    times = np.arange(steps + 1)
    moved_N2 = track_F2[seen] - track_F2[seen].mean(0)
    variance = float(np.square(moved_N2).sum())
    best, best_fit = NONE, LEAST_FIT
    for motion in MOTIONS:
        turns = range(SHORTEST_LEG, steps - SHORTEST_LEG + 1) if " then " in motion else [steps]
        for turn in turns:
            travel = (np.minimum(times, turn) - np.maximum(times - turn, 0))[seen].astype(float)
            travel -= travel.mean()
            ideal_N2 = np.outer(travel, DIRECTIONS[motion.split()[0]])
            weight = float(np.square(ideal_N2).sum())
            speed = float((moved_N2 * ideal_N2).sum()) / weight
            fit = speed * speed * weight / variance if variance else 0.0
            if speed >= SLOWEST and fit > best_fit:
                best, best_fit = motion, fit
    return best
