"""Measures a generator on the held-out samples of the sprite world, all eight tasks.

Asks the questions of each part, lets the judge read what comes out, and sets beside every score
what the judge makes of real answers to the same questions, and of those after a round trip
through the image tokenizer: the two ceilings. Knows the generator as one function; knows no
model, bundle or file format.

Shapes: F frames, H = W = 64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .evaluation.asking import Ask, Generate, asking
from .evaluation.long import Reconstruct, long_clips
from .evaluation.parts import TASKS, parts_of
from .evaluation.question import Part, Question
from .evaluation.scoring import MODEL, REAL, RECONSTRUCTED, Tally, judge_bars, summary
from .judge import Judge, Verdict
from .published import Published
from .report import write_report
from .sheets import LongSpecimen, Specimen
from .sprites import world
from .sprites.world import SpriteWorld

__all__ = ["TASKS", "evaluate", "find_judge"]

REFERENCE_SAMPLES = 256  # least real samples, apart from the measured ones, behind the distances
SHEET_SAMPLES = 32
CHUNK = 64  # questions that are asked, then scored, at a time


def evaluate(
    generate: Generate,
    *,
    tasks: Sequence[str],
    split: str,
    samples: int,
    seed: int,
    level: str = "digits",
    judge: Judge | None = None,
    reconstruct: Reconstruct | None = None,
    out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    concurrency: int = 1,
    about: Mapping[str, Any] | None = None,
    long: int = 0,
    sketch_prompt: str = "caption",
    weights: Mapping[str, Path] | None = None,
) -> dict:
    """JSON-able report on the first `samples` questions of each part of `tasks`.

    generate: see evaluation.asking; question i is asked with seed + i. concurrency: calls at a
    time. reconstruct: u8[F,64,64,3] -> the same through the image tokenizer and back; never
    called while generate is.
    judge: by default the stored one of the level.
    about: goes into the report as it is: the bundle, how it samples.
    long: number of 100-frame clips that V2V is to predict; 0 for none.
    sketch_prompt: "caption" or "none": what S2I and S2V are given beside the class maps.
    weights: files for metrics with published names, by network; see `published`.
    out: folder that receives report.json, report.md and one contact sheet a part.
    progress: called with (questions done, questions in all).
    ValueError for unknown names, for less than 2 samples, and for wrongly shaped answers.
    """
    source = SpriteWorld(level, split)
    parts = parts_of(tasks, source, sketch_prompt=sketch_prompt)
    if samples < 2:
        raise ValueError(f"samples is {samples}; scores need at least 2")
    if long and "v2v" not in tasks:
        raise ValueError("long clips are made by v2v, which is not among the tasks")
    judge = judge or Judge.load(find_judge(level))
    if judge.level != level:
        raise ValueError(f"the judge is one of level {judge.level!r}, not {level!r}")
    published = Published(weights or {})

    report: dict[str, Any] = {
        "evaluator": "sprites",
        "world_version": world.VERSION,
        "level": level,
        "split": split,
        "samples": samples,
        "seed": seed,
        "seeds": f"question i is asked with seed {seed} + i",
        "about": dict(about or {}),
        "sketch_prompt": sketch_prompt,
        "judge": judge.metadata,
        "published_weights": published.files,
        "tasks": {},
        "bars": [],
    }
    done = _Counter(progress, len(parts) * samples + long)
    specimens: dict[str, list[Specimen]] = {}
    long_specimens: list[LongSpecimen] = []
    with asking(generate, concurrency) as ask:
        for part in parts:
            scores, specimens[part.name] = _measure(
                ask, part, judge, published, reconstruct, samples, seed, done
            )
            report["tasks"][part.name] = {"asks": part.asks, "scores": scores}
            report["bars"] += judge_bars(part.name, part.bars, scores)
        if long:
            report["long"], clips = long_clips(
                ask, judge, source, samples=long, seed=seed, reconstruct=reconstruct, progress=done
            )
            long_specimens = [LongSpecimen(made, real) for made, real in clips]
    if out is not None:
        write_report(out, report, specimens, long_specimens)
    return report


def find_judge(level: str) -> Path:
    """checkpoints/judge-LEVEL under the working directory or this repository; else ValueError."""
    name = Path("checkpoints") / f"judge-{level}"
    for root in (Path(), Path(__file__).resolve().parents[1]):
        if (root / name / "judge.json").is_file():
            return root / name
    raise ValueError(
        f"there is no {name}; train it with nuwa train judge --level {level} --out {name}"
    )


class _Counter:
    """Tells `progress` of so many more questions done."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, more: int) -> None:
        self.done += more
        if self.progress is not None:
            self.progress(self.done, self.total)


def _measure(
    ask: Ask,
    part: Part,
    judge: Judge,
    published: Published,
    reconstruct: Reconstruct | None,
    samples: int,
    seed: int,
    done: _Counter,
) -> tuple[dict[str, dict], list[Specimen]]:
    """The scores of one part, and its first answers for the contact sheet."""
    tallies: dict[str, Tally] = {}
    specimens: list[Specimen] = []
    collected = published.collector()
    for first in range(0, samples, CHUNK):
        indices = range(first, min(first + CHUNK, samples))
        questions = [part.question(index) for index in indices]
        made = ask(part.task, questions, [seed + index for index in indices])
        for kind, clips in _kinds(part, questions, made, reconstruct).items():
            tally = tallies.setdefault(kind, Tally())
            verdicts = judge.read_many([part.judged(clip) for clip in clips])
            for question, clip, verdict in zip(questions, clips, verdicts, strict=True):
                scores = part.scores(question, clip, verdict)
                tally.add(scores, _features(verdict))
                if kind == MODEL and len(specimens) < SHEET_SAMPLES:
                    right = bool(part.right(question, verdict)[part.whole])
                    specimens.append(Specimen(question, clip, right))
        collected.add(made, questions)
        done(len(indices))
    reference = _reference(judge, part, samples)
    return summary(tallies, reference) | collected.scores(), specimens


def _kinds(
    part: Part,
    questions: list[Question],
    made: list[np.ndarray],
    reconstruct: Reconstruct | None,
) -> dict[str, list[np.ndarray]]:
    """The clips to be scored: the answers, the ceilings, and the part's own baselines."""
    kinds = {MODEL: made, REAL: [question.real for question in questions]}
    if reconstruct is not None:
        kinds[RECONSTRUCTED] = [each.restored(reconstruct(each.real)) for each in questions]
    for question in questions:
        for name, clip in part.baselines(question).items():
            kinds.setdefault(name, []).append(clip)
    return kinds


def _features(verdict: Verdict) -> dict[str, np.ndarray]:
    features = {"fid_judge": verdict.features}
    if len(verdict.features_FD) > 1:
        features["fvd_judge"] = verdict.clip_features
    return features


def _reference(judge: Judge, part: Part, samples: int) -> dict[str, np.ndarray]:
    """f64[M,D] of the real answers to questions that are not among the measured ones."""
    count = max(samples, REFERENCE_SAMPLES)
    tally = Tally()
    for first in range(samples, samples + count, CHUNK):
        indices = range(first, min(first + CHUNK, samples + count))
        clips = [part.judged(part.question(index).real) for index in indices]
        for verdict in judge.read_many(clips):
            tally.add({}, _features(verdict))
    return {name: np.stack(vectors) for name, vectors in tally.features.items()}
