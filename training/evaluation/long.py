"""V2V far beyond the trained length: does a long clip stay what it was?

From two frames 100 frames are predicted and read in windows of ten, one after the other: class,
colour, and whether the sprite still moves, along the axis on which it started. The first window
holds the two given frames. The last windows must keep up with the first ones, and with the last
ones of real clips after a round trip through the image tokenizer. Once without a prompt, so that
all that tells what the sprite was are frames that the model made itself; and once with the caption
of an image of it, which says what it is and not how it moves.

Shapes: F frames, S = 64, N clips, W windows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..judge import Judge, Verdict
from ..readers import LEAST_FIT, SLOWEST
from ..sprites.world import DIRECTIONS, Factors, SpriteWorld
from .asking import Ask
from .bars import Bar, judge_bars
from .prediction import GIVEN
from .question import Question, right_factors
from .scoring import MODEL, REAL, RECONSTRUCTED, Tally, estimate

PART, CAPTIONED = "v2v_long", "v2v_long_captioned"  # in the report
PARTS = (PART, CAPTIONED)
FRAMES, WINDOW = 100, 10
ENDS = 3  # windows at the start and at the end that are compared
KEPT = 0.95  # of the first windows' score, and of the ceiling's last, that the last ones must have
SCORES = ("class", "colour", "axis")
MOST_MISSING = 0.3  # share of a window's frames that may show no sprite
CHUNK = 16  # clips at a time

Reconstruct = Callable[[np.ndarray], np.ndarray]


def long_clips(
    part: str,
    ask: Ask,
    judge: Judge,
    world: SpriteWorld,
    *,
    samples: int,
    seed: int,
    reconstruct: Reconstruct | None,
    progress: Callable[[int], None],
) -> tuple[dict[str, Any], list[dict[str, Any]], list[tuple[np.ndarray, np.ndarray]]]:
    """One of PARTS: its report, bars, and (generated, real) clips u8[100,S,S,3] of the first chunk.

    In the report each score is a series over the windows, for the model with its 95 % interval,
    for real and for reconstructed clips; `change` is the last three windows less the first
    three, with its interval over the clips.
    """
    right: dict[str, list[np.ndarray]] = {MODEL: [], REAL: []}
    if reconstruct is not None:
        right[RECONSTRUCTED] = []
    shown: list[tuple[np.ndarray, np.ndarray]] = []
    for first in range(0, samples, CHUNK):
        indices = range(first, min(first + CHUNK, samples))
        questions = [_question(world, index, part) for index in indices]
        made = ask("v2v", questions, [seed + index for index in indices])
        kinds = {MODEL: made, REAL: [q.real for q in questions]}
        if reconstruct is not None:
            kinds[RECONSTRUCTED] = [_in_windows(q.real, reconstruct) for q in questions]
        for kind, clips in kinds.items():
            pairs = zip(clips, questions, strict=True)
            right[kind] += [_read(judge, clip, question.expected) for clip, question in pairs]
        if not shown:
            shown = [(clip, q.real) for clip, q in zip(made, questions, strict=True)]
        progress(len(indices))
    right_NSW = {kind: np.stack(each) for kind, each in right.items()}
    ends = {kind: _ends(each) for kind, each in right_NSW.items()}
    bars = [bar for name in SCORES for bar in _bars(name)]
    return _report(part, right_NSW, ends), judge_bars(part, bars, ends), shown


def keeps_axis(verdict: Verdict, motion: str) -> bool:
    """The sprite of a window moves, and (nearly) all of it along the axis of `motion`."""
    track_F2 = verdict.layout.track_F2
    if 1 - verdict.seen > MOST_MISSING:
        return False
    axis = 0 if DIRECTIONS[motion.split()[0]][0] else 1
    variance_2 = np.nanvar(track_F2, axis=0)
    speed = np.nanmean(np.abs(np.diff(track_F2[:, axis])))
    return bool(speed >= SLOWEST and variance_2[axis] >= LEAST_FIT * variance_2.sum())


def _question(world: SpriteWorld, index: int, part: str) -> Question:
    real, factors = world.long_clip(index, range(FRAMES))[0], world.factors(index)
    prompt = factors.image_caption if part == CAPTIONED else ""
    return Question(real, factors, prompt, frames=real[:GIVEN])


def _in_windows(clip: np.ndarray, reconstruct: Reconstruct) -> np.ndarray:
    return np.concatenate([reconstruct(each) for each in np.split(clip, FRAMES // WINDOW)])


def _read(judge: Judge, clip: np.ndarray, expected: Factors) -> np.ndarray:
    """f64[scores, W] of 0 and 1."""
    verdicts = judge.read_many(np.split(clip, FRAMES // WINDOW))
    right = [right_factors(verdict, expected) for verdict in verdicts]
    return np.array(
        [
            [each["class"] for each in right],
            [each["colour"] for each in right],
            [keeps_axis(v, expected.motion) for v in verdicts],
        ],
        float,
    )


def _ends(right_NSW: np.ndarray) -> Tally:
    """Each clip's mean over the first and over the last windows, as scores of their own."""
    tally = Tally()
    for right_SW in right_NSW:
        first_S, last_S = right_SW[:, :ENDS].mean(1), right_SW[:, -ENDS:].mean(1)
        scores = {f"{name}_first": float(first_S[s]) for s, name in enumerate(SCORES)}
        tally.add(scores | {f"{name}_last": float(last_S[s]) for s, name in enumerate(SCORES)}, {})
    return tally


def _bars(name: str) -> tuple[Bar, Bar]:
    return Bar(f"{name}_last", KEPT, "score", f"{name}_first"), Bar(f"{name}_last", KEPT)


def _report(part: str, right_NSW: dict[str, np.ndarray], ends: dict[str, Tally]) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for s, name in enumerate(SCORES):
        windows = [estimate(list(column_N)).interval for column_N in right_NSW[MODEL][:, s].T]
        first, last = (ends[MODEL].estimate(f"{name}_{end}") for end in ("first", "last"))
        assert first is not None and last is not None, "every clip has both"
        low, high = last.less(first)
        scores[name] = {kind: each[:, s].mean(0).tolist() for kind, each in right_NSW.items()} | {
            "low": [interval[0] for interval in windows],
            "high": [interval[1] for interval in windows],
            "first": first.value,
            "last": last.value,
            "change": last.value - first.value,
            "change_low": low,
            "change_high": high,
        }
    return {
        "asks": f"{FRAMES} frames from the first {GIVEN}, which are part of the first window, "
        + ("and the caption of an image" if part == CAPTIONED else "without a prompt"),
        "samples": len(right_NSW[MODEL]),
        "frames": FRAMES,
        "given": GIVEN,
        "window": WINDOW,
        "ends": ENDS,
        "scores": scores,
    }
