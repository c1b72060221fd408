"""Measures one part: asks its questions, has the answers read, and sums up.

Beside the answers it measures what real answers to the same questions give, as they are and after
a round trip through the image tokenizer, and the part's own baselines.

Shapes: F frames, S = 64, M reference samples, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..judge import Judge, Verdict
from ..published import Collector, Published
from ..sheets import Specimen
from .asking import Ask
from .bars import judge_bars
from .long import Reconstruct
from .question import Part, Question
from .scoring import MODEL, REAL, RECONSTRUCTED, Tally, summary

REFERENCE_SAMPLES = 256  # least real samples, apart from the measured ones, behind the distances
SHEET_SAMPLES = 32
CHUNK = 64  # questions that are asked, then scored, at a time


@dataclass(frozen=True)
class Measured:
    """What one part gave: for the report, and its first answers for the contact sheet."""

    scores: dict[str, dict[str, Any]]
    bars: list[dict[str, Any]]
    specimens: list[Specimen]


@dataclass(frozen=True)
class Measuring:
    """Everything but the part: question i is asked with `seed` + i.

    reconstruct: u8[F,S,S,3] -> the same through the image tokenizer and back, or None. progress:
    called with the number of questions that were answered.
    """

    ask: Ask
    judge: Judge
    published: Published
    reconstruct: Reconstruct | None
    samples: int
    seed: int
    progress: Callable[[int], None] = field(repr=False)

    def measure(self, part: Part) -> Measured:
        """Asks the first `samples` questions of `part`."""
        tallies: dict[str, Tally] = {}
        specimens: list[Specimen] = []
        collected = self.published.collector()
        for first in range(0, self.samples, CHUNK):
            indices = range(first, min(first + CHUNK, self.samples))
            questions = [part.question(index) for index in indices]
            made = self.ask(part.task, questions, [self.seed + index for index in indices])
            prompts = [question.prompt for question in questions]
            for kind, clips in self._kinds(part, questions, made).items():
                tally = tallies.setdefault(kind, Tally())
                judged = [part.judged(clip) for clip in clips]
                verdicts = self.judge.read_many(judged)
                for question, clip, verdict in zip(questions, clips, verdicts, strict=True):
                    tally.add(part.scores(question, clip, verdict), _features(verdict))
                    if kind == MODEL and len(specimens) < SHEET_SAMPLES:
                        right = part.right(question, verdict)[part.whole]
                        specimens.append(Specimen(question, clip, right))
                if kind in (MODEL, REAL):
                    collected.add(kind, judged, prompts)
            self.progress(len(indices))
        reference = self._reference(part, collected)
        scores = summary(tallies, reference) | collected.scores()
        return Measured(scores, judge_bars(part.name, part.bars, tallies), specimens)

    def _kinds(
        self, part: Part, questions: list[Question], made: list[np.ndarray]
    ) -> dict[str, list[np.ndarray]]:
        """The clips to be scored: the answers, the ceilings, and the part's own baselines."""
        kinds = {MODEL: made, REAL: [question.real for question in questions]}
        if self.reconstruct is not None:
            kinds[RECONSTRUCTED] = [
                each.restored(self.reconstruct(each.real)) for each in questions
            ]
        for question in questions:
            for name, clip in part.baselines(question).items():
                kinds.setdefault(name, []).append(clip)
        return kinds

    def _reference(self, part: Part, collected: Collector) -> dict[str, np.ndarray]:
        """f64[M,D] of the real answers to questions that are not among the measured ones."""
        count = max(self.samples, REFERENCE_SAMPLES)
        tally = Tally()
        for first in range(self.samples, self.samples + count, CHUNK):
            indices = range(first, min(first + CHUNK, self.samples + count))
            clips = [part.judged(part.question(index).real) for index in indices]
            collected.add_reference(clips)
            for verdict in self.judge.read_many(clips):
                tally.add({}, _features(verdict))
        return {name: np.stack(vectors) for name, vectors in tally.features.items()}


def _features(verdict: Verdict) -> dict[str, np.ndarray]:
    features = {"fid_judge": verdict.features}
    if len(verdict.features_FD) > 1:
        features["fvd_judge"] = verdict.clip_features
    return features
