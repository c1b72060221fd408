"""Measures a generator on the held-out samples of the sprite world, all eight tasks.

Asks the questions of each part, lets the judge read what comes out, and sets beside every score
what the judge makes of real answers to the same questions, and of those after a round trip
through the image tokenizer: the two ceilings. Knows the generator as one function; knows no
model, bundle or file format.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .evaluation.asking import Generate, asking
from .evaluation.long import PARTS as LONG_PARTS
from .evaluation.long import Reconstruct, long_clips
from .evaluation.measuring import Measuring
from .evaluation.parts import TASKS, parts_of
from .evaluation.prediction import GIVEN
from .judge import Judge
from .published import Published
from .report_folder import ReportFolder
from .sheets import LongSpecimen
from .sprites import world
from .sprites.world import SpriteWorld

__all__ = ["TASKS", "evaluate", "find_judge"]

VERSION = 4  # of what is asked and how it is scored: raise it when a score's meaning changes


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
    ranking: Mapping[str, Any] | None = None,
    long: int = 0,
    sketch_prompt: str = "caption",
    given: str = str(GIVEN),
    weights: Mapping[str, Path] | None = None,
    overwrite: bool = False,
) -> dict:
    """JSON-able report on the first `samples` questions of each part of `tasks`.

    generate: see evaluation.asking; question i is asked with seed + i. concurrency: calls at a
    time. reconstruct: u8[F,64,64,3] -> the same through the image tokenizer and back; never
    called while generate is.
    judge: by default the stored one of the level.
    about: goes into the report as it is: the bundle, how it samples. ranking: likewise, {"samples":
    N, "rank_by": NAME} where `generate` makes N answers to a prompt and gives the best.
    long: number of 100-frame clips that V2V is to predict, without a prompt and with the caption of
    an image; 0 for none.
    sketch_prompt: "caption" or "none": what S2I and S2V are given beside the class maps.
    given: frames that V2V goes on from, 1 to 9; the 100-frame clips always two.
    weights: files for metrics with published names, by network; see `published`.
    out: folder that receives report.json, report.md and one contact sheet a part, as each part is
    done. Parts that a report of the same settings in it has are kept and not asked again; one of
    others is a ValueError before anything is asked, or with `overwrite` replaced.
    progress: called with (questions done, questions in all).
    ValueError for unknown names, for less than 2 samples, and for wrongly shaped answers.
    """
    source = SpriteWorld(level, split)
    parts = parts_of(tasks, source, sketch_prompt=sketch_prompt, given=_frames(given))
    if samples < 2:
        raise ValueError(f"samples is {samples}; scores need at least 2")
    if long and "v2v" not in tasks:
        raise ValueError("long clips are made by v2v, which is not among the tasks")
    judge = judge or Judge.load(find_judge(level))
    if judge.level != level:
        raise ValueError(f"the judge is one of level {judge.level!r}, not {level!r}")
    published = Published(weights or {})
    settings: dict[str, Any] = {
        "evaluator": "sprites",
        "version": VERSION,
        "world_version": world.VERSION,
        "level": level,
        "split": split,
        "samples": samples,
        "seed": seed,
        "seeds": f"question i is asked with seed {seed} + i",
        "about": dict(about or {}),
        "ranking": dict(ranking) if ranking else None,
        "sketch_prompt": sketch_prompt,
        "given": given,
        "reconstructed": reconstruct is not None,
        "judge": judge.source | judge.metadata,
        "published_weights": published.files,
    }
    folder = None if out is None else ReportFolder(out)
    earlier = _earlier(folder, settings, long, overwrite)
    report = settings | {"tasks": {}, "bars": [], "long": {}} | earlier
    todo = [part for part in parts if part.name not in report["tasks"]]
    left = [name for name in LONG_PARTS if long and name not in report["long"]]
    report["unfinished"] = [part.name for part in todo] + left
    done = _Counter(progress, len(todo) * samples + len(left) * long)
    with asking(generate, concurrency) as ask:
        measuring = Measuring(ask, judge, published, reconstruct, samples, seed, done)
        for part in todo:
            measured = measuring.measure(part)
            prompted = bool(part.question(0).prompt)
            report["tasks"][part.name] = {
                "asks": part.asks,
                "samples_per_prompt": ranking["samples"] if ranking and prompted else 1,
                "scores": measured.scores,
            }
            report["bars"] += measured.bars
            report["unfinished"].remove(part.name)
            if folder is not None:
                folder.add_sheet(part.name, measured.specimens)
                folder.write(report)
        for name in left:
            report["long"][name], bars, clips = long_clips(
                name,
                ask,
                judge,
                source,
                samples=long,
                seed=seed,
                reconstruct=reconstruct,
                progress=done,
            )
            report["bars"] += bars
            report["unfinished"].remove(name)
            if folder is not None:
                folder.add_long_sheet(name, [LongSpecimen(made, real) for made, real in clips])
                folder.write(report)
    if folder is not None:
        folder.write(report)
    return report


def _frames(given: str) -> int:
    try:
        return int(given)
    except ValueError:
        raise ValueError(f"given {given!r} is not a number of frames") from None


def _earlier(
    folder: ReportFolder | None, settings: dict[str, Any], long: int, overwrite: bool
) -> dict[str, Any]:
    """The results that need not be measured again; says on stderr what becomes of them."""
    if folder is None:
        return {}
    results, sentence = folder.earlier(settings, overwrite=overwrite)
    if sentence:
        print(sentence, file=sys.stderr)
    for name, found in list(results.get("long", {}).items()):
        if long and found["samples"] != long:
            del results["long"][name]
            results["bars"] = [bar for bar in results["bars"] if bar["part"] != name]
    return results


class _Counter:
    """Tells `progress` of so many more questions done."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, more: int) -> None:
        self.done += more
        if self.progress is not None:
            self.progress(self.done, self.total)


def find_judge(level: str) -> Path:
    """checkpoints/judge-LEVEL under the working directory or this repository; else ValueError."""
    name = Path("checkpoints") / f"judge-{level}"
    for root in (Path(), Path(__file__).resolve().parents[1]):
        if (root / name / "judge.json").is_file():
            return root / name
    raise ValueError(
        f"there is no {name}; train it with nuwa train judge --level {level} --out {name}"
    )
