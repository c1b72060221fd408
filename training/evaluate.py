"""Measures a generator on the held-out captions and clips of the sprite world.

Draws captions (or first frames), calls the generator, lets the judge read what comes out, and
sets beside every score what the judge makes of the same real clips, and of those clips after a
round trip through the image tokenizer: the two ceilings. Knows the generator as one function;
knows no model, bundle or file format.

Shapes: F frames, H = W = 64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import metrics
from .judge import Judge
from .report import Specimen, write_report
from .sprites import world
from .sprites.world import FRAMES, SIDE, SpriteSample, SpriteWorld

TASKS = ("t2i", "t2v", "v2v")
FACTORS = {
    "t2i": ("class", "colour", "background"),
    "t2v": ("class", "colour", "background", "motion"),
    "v2v": ("class", "colour", "motion"),
}
GIVEN = 4  # frames that v2v continues
REFERENCE_SAMPLES = 256  # real samples, apart from the measured ones, behind fid_judge
SHEET_SAMPLES = 32
IDENTICAL_DB = 100.0  # PSNR of equal frames, which is infinite, is reported as this

Generate = Callable[..., np.ndarray]
Reconstruct = Callable[[np.ndarray], np.ndarray]


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
) -> dict:
    """JSON-able report on the first `samples` samples of a split, for each of `tasks`.

    generate(task=, prompt=, frame_count=, seed=, frames=) -> u8[F,64,64,3]: for t2i and t2v a
    caption and no frames; for v2v an empty prompt and frames u8[4,64,64,3], and the result
    holds all 10 frames. Sample i is generated with seed + i.
    reconstruct: u8[F,64,64,3] -> the same through the image tokenizer and back.
    judge: by default the stored one of the level.
    out: folder that receives report.json, report.md and one contact sheet a task.
    progress: called with (samples done, samples in all).
    ValueError for unknown names, for less than 2 samples, and for wrongly shaped results.
    """
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"cannot evaluate task {task!r}; choose from {', '.join(TASKS)}")
    if samples < 2:
        raise ValueError(f"samples is {samples}; scores need at least 2")
    source = SpriteWorld(level, split)
    judge = judge or Judge.load(find_judge(level))
    if judge.level != level:
        raise ValueError(f"the judge is one of level {judge.level!r}, not {level!r}")

    report: dict[str, Any] = {
        "evaluator": "sprites",
        "world_version": world.VERSION,
        "level": level,
        "split": split,
        "samples": samples,
        "seed": seed,
        "judge": judge.metadata,
        "tasks": {},
    }
    specimens: dict[str, list[Specimen]] = {}
    for t, task in enumerate(tasks):
        tally = {"model": _Tally(), "real": _Tally()}
        if reconstruct is not None:
            tally["reconstructed"] = _Tally()
        specimens[task] = []
        for index in range(samples):
            sample = source.sample(index)
            real = _real(task, sample, index)
            made = _generate(generate, task, sample, real, seed + index)
            right = tally["model"].add(judge, task, made, real, sample)
            tally["real"].add(judge, task, real, real, sample)
            if reconstruct is not None:
                tally["reconstructed"].add(judge, task, reconstruct(real), real, sample)
            if index < SHEET_SAMPLES:
                specimens[task].append(Specimen(made, real, _caption(task, sample), right))
            if progress is not None:
                progress(t * samples + index + 1, len(tasks) * samples)
        reference = _reference_features(judge, task, source, samples)
        report["tasks"][task] = {"scores": _scores(tally, reference)}
    if out is not None:
        write_report(out, report, specimens)
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


@dataclass
class _Tally:
    """What the judge read from one kind of clips: a list of values for each score."""

    values: dict[str, list[float]] = field(default_factory=dict)
    features: list[np.ndarray] = field(default_factory=list)

    def add(
        self, judge: Judge, task: str, clip: np.ndarray, real: np.ndarray, sample: SpriteSample
    ) -> bool:
        """Reads one clip; True when all its factors are right."""
        verdict = judge.read(_judged(task, clip))
        motion = judge.read_motion(clip) if task == "v2v" else verdict.motion
        factors = sample.factors
        right = {
            "class": verdict.class_index == factors.class_index,
            "colour": verdict.colour == factors.colour,
            "background": verdict.background == factors.background,
            "motion": motion == factors.motion,
        }
        right = {name: right[name] for name in FACTORS[task]}
        right["joint"] = all(right.values())
        scores = {name: float(value) for name, value in right.items()}
        if task == "v2v":
            scores["psnr"] = _psnr(clip[GIVEN:], real[GIVEN:])
            scores["psnr_next"] = _psnr(clip[GIVEN], real[GIVEN])
        for name, value in scores.items():
            self.values.setdefault(name, []).append(value)
        self.features.append(verdict.features)
        return right["joint"]


def _real(task: str, sample: SpriteSample, index: int) -> np.ndarray:
    """The real counterpart of what is generated: one of the frames, or the clip."""
    return sample.frames[index % FRAMES][None] if task == "t2i" else sample.frames


def _judged(task: str, clip: np.ndarray) -> np.ndarray:
    """The frames whose content is the generator's own."""
    return clip[GIVEN:] if task == "v2v" else clip


def _caption(task: str, sample: SpriteSample) -> str:
    return sample.image_caption if task == "t2i" else sample.video_caption


def _generate(
    generate: Generate, task: str, sample: SpriteSample, real: np.ndarray, seed: int
) -> np.ndarray:
    predicts = task == "v2v"
    made = generate(
        task=task,
        prompt="" if predicts else _caption(task, sample),
        frame_count=len(real),
        seed=seed,
        frames=real[:GIVEN].copy() if predicts else None,
    )
    expected = (len(real), SIDE, SIDE, 3)
    if made.shape != expected or made.dtype != np.uint8:
        raise ValueError(
            f"{task} gave {made.dtype} {list(made.shape)}; "
            f"the sprite world needs uint8 {list(expected)}"
        )
    return made


def _reference_features(judge: Judge, task: str, source: SpriteWorld, samples: int) -> np.ndarray:
    """f64[M,D] of real samples that are not among the measured ones."""
    indices = range(samples, samples + max(samples, REFERENCE_SAMPLES))
    clips = (_judged(task, _real(task, source.sample(i), i)) for i in indices)
    return np.stack([judge.read(clip).features for clip in clips])


def _scores(tally: dict[str, _Tally], reference: np.ndarray) -> dict[str, dict]:
    """{score: {model, low, high, real, reconstructed, ratio}}; None where it has no meaning."""
    scores = {}
    for name, values in tally["model"].values.items():
        means = {kind: float(np.mean(t.values[name])) for kind, t in tally.items()}
        low, high = metrics.bootstrap_interval(np.array(values))
        ceiling = means.get("reconstructed")
        decibels = name.startswith("psnr")
        scores[name] = {
            "model": means["model"],
            "low": low,
            "high": high,
            "real": None if decibels else means["real"],
            "reconstructed": ceiling,
            "ratio": means["model"] / ceiling if ceiling and not decibels else None,
        }
    distances = {
        kind: metrics.frechet_distance(np.stack(t.features), reference) for kind, t in tally.items()
    }
    scores["fid_judge"] = {
        "model": distances["model"],
        "low": None,
        "high": None,
        "real": distances["real"],
        "reconstructed": distances.get("reconstructed"),
        "ratio": None,
    }
    return scores


def _psnr(frames: np.ndarray, target: np.ndarray) -> float:
    return min(metrics.psnr(frames, target), IDENTICAL_DB)
