"""`nuwa evaluate`: scores of a bundle, from an evaluator that another package part brings.

Evaluators come from the entry point group `nuwa.evaluators`: runtime never imports training. One is
a function evaluate(generate, *, tasks, split, samples, seed, out, progress, reconstruct,
concurrency, about, ranking, ...) -> report. `generate` is what generator() gives; sample i is to be
asked with seed + i. Further arguments are what --long, --overwrite and the weights name, and what
--set may name: those with a text as their default. The report has tasks, bars and perhaps long; see
score_table.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import parse_task

from ..client import BaseClient, LocalClient
from ..core import MAX_SEED, Mask, ModelInfo, Pixels
from . import arguments

GROUP = "nuwa.evaluators"

DESCRIPTION = """\
Generate many samples with a bundle and score them against the evaluator's data set.

Sample i is generated with seed SEED + i, so the same command gives the same report, whatever
--slots and --threads are. With --out the report is written after each part; the same command goes
on where an earlier one was stopped. A report of other settings in that folder is replaced only with
--overwrite."""

EXAMPLES = """\
examples:
  nuwa evaluate demo/bundle --split test --out report
  nuwa evaluate demo/bundle --split novel --tasks t2i,t2v --samples 64 --seed 1000
  nuwa evaluate demo/bundle --tasks v2v --long 128 --out report --strict
  nuwa evaluate demo/bundle --tasks t2v --samples-per-prompt 16 --rank-by clip
  nuwa evaluate demo/bundle --set level=full --set sketch_prompt=none --json > report.json
  nuwa evaluate demo/bundle --tasks v2v --set given=9
  nuwa evaluate demo/bundle --split val --tasks s2i --temperature 0.3 --out tuning/s2i-0.3
  nuwa evaluate demo/bundle --evaluator rollouts --split train --samples 256 --out rollouts
  nuwa evaluate demo/bundle --inception-weights pt_inception-2015-12-05-6726825d.pth
"""

SLOTS = 8
MOST_REQUESTS = 64  # at a time; the scheduler refuses what no longer fits into its queue
WEIGHTS = {"inception": "FID and IS", "clip": "CLIPSIM", "i3d": "FVD"}
ASKED_BY = {"long": "--long", "weights": "weight files", "overwrite": "--overwrite"}


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("bundle", type=Path, help="folder made by `nuwa export`")
    parser.add_argument(
        "--split", default="test", help="part of the data set (default: %(default)s)"
    )
    parser.add_argument(
        "--samples",
        type=arguments.positive,
        default=1024,
        metavar="N",
        help="a task (default: %(default)s)",
    )
    parser.add_argument(
        "--tasks", metavar="A,B", help="tasks to score (default: all that the bundle can do)"
    )
    parser.add_argument(
        "--long",
        type=arguments.positive,
        metavar="N",
        help="also predict N clips of 100 frames, each "
        "once without a prompt and once with a caption",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first sample (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for report and pictures")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a report of other settings"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--strict", action="store_true", help="exit with status 1 if a bar does not hold"
    )
    parser.add_argument(
        "--evaluator", default="sprites", metavar="NAME", help="which scores (default: %(default)s)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=VALUE",
        help="an option of the evaluator, such as level=full; may be repeated",
    )
    best = parser.add_argument_group("best of several, where there is a prompt")
    best.add_argument(
        "--samples-per-prompt",
        type=arguments.positive,
        default=1,
        metavar="N",
        help="generate N, score the one that --rank-by puts first (default: %(default)s)",
    )
    best.add_argument("--rank-by", metavar="NAME", help="one of the bundle's rankers")
    published = parser.add_argument_group("metrics with published names, from your own files")
    for name, metrics in WEIGHTS.items():
        published.add_argument(f"--{name}-weights", type=Path, metavar="FILE", help=metrics)
    arguments.add_sampling(parser)
    arguments.add_engine(parser, slots=True)
    parser.set_defaults(slots=SLOTS)
    return run


def run(args: argparse.Namespace) -> int:
    asked = None
    if args.tasks is not None:
        asked = [str(parse_task(name.strip())) for name in args.tasks.split(",")]
    _check_seeds(args.seed, max(args.samples, args.long or 0))
    if (args.samples_per_prompt > 1) != (args.rank_by is not None):
        raise ValueError("--samples-per-prompt (above 1) and --rank-by go together")
    evaluate = load_evaluator(args.evaluator)
    extra = _options(args, evaluate)
    from ..bundle import open_bundle
    from ..engine import load_engine

    engine = load_engine(args.bundle, slots=args.slots, **arguments.engine(args))
    files = open_bundle(args.bundle, verify=False).manifest.files  # load_engine has hashed them
    sampling = arguments.sampling(args)
    ranking = {}
    if args.rank_by is not None:
        _check_ranker(args.rank_by, engine.info)
        ranking = {"samples": args.samples_per_prompt, "rank_by": args.rank_by}
    with LocalClient(engine) as client, _progress_bar() as progress:
        report = evaluate(
            generator(client, sampling, ranking),
            tasks=list(dict.fromkeys(map(str, engine.info.tasks) if asked is None else asked)),
            split=args.split,
            samples=args.samples,
            seed=args.seed,
            out=args.out,
            progress=progress,
            reconstruct=lambda frames: engine.pixels(engine.tokens(frames)),
            concurrency=min(2 * args.slots, MOST_REQUESTS),
            about=_about(args, engine.info, files, sampling),
            ranking=ranking or None,
            **extra,
        )
    print(json.dumps(report, indent=2) if args.json else score_table(report))
    failed = any(bar["holds"] is False for bar in report.get("bars", []))
    return 1 if args.strict and failed else 0


def _check_seeds(first: int, samples: int) -> None:
    if first < 0 or first + samples - 1 > MAX_SEED:
        raise ValueError(
            f"--seed {first} with {samples} samples: seeds {first} to {first + samples - 1} are "
            f"not all in [0, {MAX_SEED}]"
        )


def _options(args: argparse.Namespace, evaluate: Callable[..., dict]) -> dict[str, Any]:
    """What only some evaluators take, where it was asked for; ValueError if this one does not."""
    known = inspect.signature(evaluate).parameters
    settable = [name for name, each in known.items() if isinstance(each.default, str)]
    for name, _ in args.set:
        if name not in settable:
            raise ValueError(
                f"--set {name}: evaluator {args.evaluator!r} has no option {name!r}; "
                f"it has {', '.join(settable) or 'none'}"
            )
    weights = {name: getattr(args, f"{name}_weights") for name in WEIGHTS}
    weights = {name: path for name, path in weights.items() if path is not None}
    further = {"long": args.long, "weights": weights, "overwrite": args.overwrite}
    further = {name: value for name, value in further.items() if value}
    for name in further:
        if name not in known:
            raise ValueError(f"evaluator {args.evaluator!r} has no use for {ASKED_BY[name]}")
    return dict(args.set) | further


def _check_ranker(name: str, info: ModelInfo) -> None:
    if name not in info.rankers:
        there_are = ", ".join(info.rankers) or "none"
        raise ValueError(f"rank_by {name!r} is not one of the bundle's rankers: {there_are}")


def _about(
    args: argparse.Namespace, info: ModelInfo, files: dict[str, str], sampling: dict[str, Any]
) -> dict[str, Any]:
    """What a reader of the report needs to repeat it. files: SHA-256 by name."""
    return {
        "bundle": args.bundle.name,
        "bundle_hash": info.bundle_hash,
        "files": files,
        "model": info.name,
        "precision": info.precision,
        "backend": info.backend,
        "runs_on": info.runs_on,
        "sampling": {
            str(task): dataclasses.asdict(
                dataclasses.replace(info.sampling.get(task, Sampling()), **sampling)
            )
            for task in info.tasks
        },
    }


def load_evaluator(name: str) -> Callable[..., dict]:
    """The evaluator called `name`; ValueError naming those there are otherwise."""
    found = {each.name: each for each in importlib.metadata.entry_points(group=GROUP)}
    if name not in found:
        raise ValueError(f"there is no evaluator {name!r}; installed: {', '.join(found) or 'none'}")
    try:
        return found[name].load()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"evaluator {name!r} needs {error.name}; install it with: "
            "pip install 'nuwa-runtime[train]'"
        ) from error


def generator(
    client: BaseClient, sampling: dict[str, Any], ranking: dict[str, Any]
) -> Callable[..., Any]:
    """What evaluators call, from as many threads as they like: u8 [F, H, W, 3] out.

    With tokens=True, which only clips have, out are these and i32 [F, h, w]. In: a task, a prompt,
    and what the task takes of frames u8 [F, H, W, 3], mask bool [H, W] and sketch u8 [F, H, W].
    ranking: samples and rank_by, used wherever there is a prompt to rank by.
    """

    def generate(
        task: str,
        prompt: str,
        frame_count: int,
        seed: int,
        frames: Pixels | None = None,
        mask: Mask | None = None,
        sketch: npt.NDArray[np.uint8] | None = None,
        tokens: bool = False,
    ) -> Any:
        options = sampling | (ranking if prompt else {})
        options |= {"seed": seed, "mask": mask, "sketch": sketch}
        if parse_task(task).is_video:
            options |= {"frame_count": frame_count, "video": frames, "include_tokens": tokens}
            made = client.generate_video(task, prompt, **options)
            return (made.frames, made.tokens) if tokens else made.frames
        return client.generate_image(task, prompt, image=frames, **options).pixels[None]

    return generate


def score_table(report: dict) -> str:
    """The scores of report["tasks"][TASK]["scores"][SCORE], one line each, then the bars.

    Of a score the numbers are shown, and those that are unknown (None). A bar has part, bar (what
    must hold), value, margin_low, margin_high, samples, verdict, and holds: True, False, or None
    where there was nothing to measure. report["long"][PART]["scores"][SCORE]["model"] is a series.
    """
    rows = []
    for task, result in report["tasks"].items():
        for score, value in result["scores"].items():
            columns = value if isinstance(value, dict) else {"model": value}
            shown = "  ".join(
                f"{name} {_number(number)}"
                for name, number in columns.items()
                if number is None or isinstance(number, int | float)
            )
            rows.append(f"{task:<5} {score:<16} {shown}")
    for bar in report.get("bars", []):
        margin = f"{_number(bar['margin_low'])} .. {_number(bar['margin_high'])}"
        rows.append(
            f"{bar['part']:<5} {bar['bar']}: {_number(bar['value'])} (margin {margin}, "
            f"{bar['samples']} samples) {bar['verdict']}"
        )
    for part, result in report.get("long", {}).items():
        for score, series in result["scores"].items():
            rows.append(f"{part}  {score:<16} {' '.join(map(_number, series['model']))}")
    return "\n".join(rows)


def _number(value: Any) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if isinstance(value, float) else "-"


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Counts samples on stderr, if a person is there to look at it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        shown = bar.add_task("samples", total=None)
        yield lambda done, total: bar.update(shown, completed=done, total=total)
