"""V2V far beyond the trained length: does a long clip stay what it was?

From two frames and no prompt 100 frames are predicted and read in windows of ten, one after the
other: class, colour, and whether the sprite still moves, along the axis on which it started.

Shapes: F frames, S = 64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import metrics
from ..judge import Judge, Verdict
from ..readers import LEAST_FIT, SLOWEST
from ..sprites.world import DIRECTIONS, Factors, SpriteWorld
from .asking import Ask
from .prediction import GIVEN
from .question import Question

FRAMES, WINDOW = 100, 10
ENDS = 3  # windows at the start and at the end that are compared
KEPT = 0.95  # of the first windows' score that the last ones must have
SCORES = ("class", "colour", "axis")
MOST_MISSING = 0.3  # share of a window's frames that may show no sprite
CHUNK = 16  # clips at a time

Reconstruct = Callable[[np.ndarray], np.ndarray]


def long_clips(
    ask: Ask,
    judge: Judge,
    world: SpriteWorld,
    *,
    samples: int,
    seed: int,
    reconstruct: Reconstruct | None,
    progress: Callable[[int], None],
) -> tuple[dict[str, Any], list[tuple[np.ndarray, np.ndarray]]]:
    """The report, and (generated, real) clips u8[100,S,S,3] of the first chunk.

    In the report each score is a series over the windows, for the model with its 95 % interval,
    for real and for reconstructed clips; `change` is the last three windows less the first
    three, with its interval over the clips.
    """
    right: dict[str, list[np.ndarray]] = {"model": [], "real": []}
    if reconstruct is not None:
        right["reconstructed"] = []
    shown: list[tuple[np.ndarray, np.ndarray]] = []
    for first in range(0, samples, CHUNK):
        indices = range(first, min(first + CHUNK, samples))
        questions = [_question(world, index) for index in indices]
        made = ask("v2v", questions, [seed + index for index in indices])
        kinds = {"model": made, "real": [q.real for q in questions]}
        if reconstruct is not None:
            kinds["reconstructed"] = [_in_windows(q.real, reconstruct) for q in questions]
        for kind, clips in kinds.items():
            pairs = zip(clips, questions, strict=True)
            right[kind] += [_read(judge, clip, question.expected) for clip, question in pairs]
        if not shown:
            shown = [(clip, q.real) for clip, q in zip(made, questions, strict=True)]
        progress(len(indices))
    return _report(right, samples), shown


def keeps_axis(verdict: Verdict, motion: str) -> bool:
    """The sprite of a window moves, and (nearly) all of it along the axis of `motion`."""
    track_F2 = verdict.layout.track_F2
    seen = np.isfinite(track_F2).all(1)
    if 1 - seen.mean() > MOST_MISSING:
        return False
    axis = 0 if DIRECTIONS[motion.split()[0]][0] else 1
    variance_2 = track_F2[seen].var(0)
    speed = np.nanmean(np.abs(np.diff(track_F2[:, axis])))
    return bool(speed >= SLOWEST and variance_2[axis] >= LEAST_FIT * variance_2.sum())


def _question(world: SpriteWorld, index: int) -> Question:
    real = world.long_clip(index, range(FRAMES))[0]
    return Question(real, world.factors(index), frames=real[:GIVEN])


def _in_windows(clip: np.ndarray, reconstruct: Reconstruct) -> np.ndarray:
    return np.concatenate([reconstruct(each) for each in np.split(clip, FRAMES // WINDOW)])


def _read(judge: Judge, clip: np.ndarray, expected: Factors) -> np.ndarray:
    """f64[scores, windows] of 0 and 1."""
    verdicts = judge.read_many(np.split(clip, FRAMES // WINDOW))
    return np.array(
        [
            [v.class_index == expected.class_index for v in verdicts],
            [v.colour == expected.colour for v in verdicts],
            [keeps_axis(v, expected.motion) for v in verdicts],
        ],
        float,
    )


def _report(right: dict[str, list[np.ndarray]], samples: int) -> dict[str, Any]:
    stacked = {kind: np.stack(each) for kind, each in right.items()}
    scores: dict[str, Any] = {}
    for s, name in enumerate(SCORES):
        model_NW = stacked["model"][:, s]
        intervals = [metrics.bootstrap_interval(column) for column in model_NW.T]
        first_N, last_N = model_NW[:, :ENDS].mean(1), model_NW[:, -ENDS:].mean(1)
        low, high = metrics.bootstrap_interval(last_N - first_N)
        scores[name] = {kind: each[:, s].mean(0).tolist() for kind, each in stacked.items()} | {
            "low": [interval[0] for interval in intervals],
            "high": [interval[1] for interval in intervals],
            "first": float(first_N.mean()),
            "last": float(last_N.mean()),
            "change": float((last_N - first_N).mean()),
            "change_low": low,
            "change_high": high,
            "holds": bool(last_N.mean() >= KEPT * first_N.mean()),
        }
    return {
        "asks": f"{FRAMES} frames from the first {GIVEN}, without a prompt",
        "samples": samples,
        "frames": FRAMES,
        "given": GIVEN,
        "window": WINDOW,
        "bar": f"the last {ENDS} windows >= {KEPT:g} x the first {ENDS}",
        "scores": scores,
    }
