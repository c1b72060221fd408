"""`nuwa evaluate`: scores of a bundle, from an evaluator that another package part brings.

Evaluators come from the entry point group `nuwa.evaluators`: runtime never imports training. One is
a function evaluate(generate, *, tasks, split, samples, seed, out, progress, reconstruct,
concurrency, about, ...) -> report. `generate` is what generator() gives; further arguments are what
--set, --long and the weights name.
"""

from __future__ import annotations

import argparse
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

from nuwa.spec.tasks import parse_task

from ..client import BaseClient, LocalClient
from ..core import Mask, ModelInfo, Pixels
from . import arguments

GROUP = "nuwa.evaluators"

DESCRIPTION = """\
Generate many samples with a bundle and score them against the evaluator's data set.

Sample i is generated with seed SEED + i, so the same command gives the same report, whatever
--slots and --threads are."""

EXAMPLES = """\
examples:
  nuwa evaluate demo/bundle --split test --out report
  nuwa evaluate demo/bundle --split novel --tasks t2i,t2v --samples 64 --seed 1000
  nuwa evaluate demo/bundle --tasks v2v --long 128 --out report
  nuwa evaluate demo/bundle --tasks t2v --samples-per-prompt 16 --rank-by clip
  nuwa evaluate demo/bundle --set level=full --set sketch_prompt=none --json > report.json
  nuwa evaluate demo/bundle --inception-weights pt_inception-2015-12-05-6726825d.pth
"""

SLOTS = 8
MOST_REQUESTS = 64  # at a time; the scheduler refuses what no longer fits into its queue
WEIGHTS = {"inception": "FID and IS", "clip": "CLIPSIM", "i3d": "FVD"}


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
        "--long", type=arguments.positive, metavar="N", help="also predict N clips of 100 frames"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first sample (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for report and pictures")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
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
    asked = args.tasks and [str(parse_task(name.strip())) for name in args.tasks.split(",")]
    if (args.samples_per_prompt > 1) != (args.rank_by is not None):
        raise ValueError("--samples-per-prompt (above 1) and --rank-by go together")
    evaluate = load_evaluator(args.evaluator)
    extra = dict(args.set) | _further_options(args)
    _check_options(evaluate, args.evaluator, extra)
    from ..engine import load_engine

    engine = load_engine(args.bundle, slots=args.slots, threads=args.threads)
    sampling = arguments.sampling(args)
    ranking = {}
    if args.rank_by is not None:
        _check_ranker(args.rank_by, engine.info)
        ranking = {"samples": args.samples_per_prompt, "rank_by": args.rank_by}
    with LocalClient(engine) as client, _progress_bar() as progress:
        report = evaluate(
            generator(client, sampling, ranking),
            tasks=asked or [str(task) for task in engine.info.tasks],
            split=args.split,
            samples=args.samples,
            seed=args.seed,
            out=args.out,
            progress=progress,
            reconstruct=lambda frames: engine.pixels(engine.tokens(frames)),
            concurrency=min(2 * args.slots, MOST_REQUESTS),
            about=_about(args, engine.info, sampling),
            **extra,
        )
    print(json.dumps(report, indent=2) if args.json else score_table(report))
    return 0


def _further_options(args: argparse.Namespace) -> dict[str, Any]:
    """What only some evaluators take, where it was asked for."""
    weights = {name: getattr(args, f"{name}_weights") for name in WEIGHTS}
    weights = {name: path for name, path in weights.items() if path is not None}
    options = {"long": args.long, "weights": weights or None}
    return {name: value for name, value in options.items() if value is not None}


def _check_ranker(name: str, info: ModelInfo) -> None:
    if name not in info.rankers:
        there_are = ", ".join(info.rankers) or "none"
        raise ValueError(f"rank_by {name!r} is not one of the bundle's rankers: {there_are}")


def _about(args: argparse.Namespace, info: ModelInfo, sampling: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the report needs to repeat it."""
    return {
        "bundle": args.bundle.name,
        "bundle_hash": info.bundle_hash,
        "model": info.name,
        "precision": info.precision,
        "backend": info.backend,
        "sampling": sampling or "the defaults",
        "samples_per_prompt": args.samples_per_prompt,
        "rank_by": args.rank_by,
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
) -> Callable[..., Pixels]:
    """What evaluators call, from as many threads as they like: u8 [F, H, W, 3] out.

    In: a task, a prompt, and what the task takes of frames u8 [F, H, W, 3], mask bool [H, W] and
    sketch u8 [F, H, W]. ranking: samples and rank_by, used wherever there is a prompt to rank by.
    """

    def generate(
        task: str,
        prompt: str,
        frame_count: int,
        seed: int,
        frames: Pixels | None = None,
        mask: Mask | None = None,
        sketch: npt.NDArray[np.uint8] | None = None,
    ) -> Pixels:
        options = sampling | (ranking if prompt else {})
        options |= {"seed": seed, "mask": mask, "sketch": sketch}
        if parse_task(task).is_video:
            return client.generate_video(
                task, prompt, frame_count=frame_count, video=frames, **options
            ).frames
        return client.generate_image(task, prompt, image=frames, **options).pixels[None]

    return generate


def score_table(report: dict) -> str:
    """The scores of report["tasks"][TASK]["scores"][SCORE], one line each, then the bars."""
    rows = []
    for task, result in report["tasks"].items():
        for score, value in result["scores"].items():
            columns = value if isinstance(value, dict) else {"model": value}
            shown = "  ".join(f"{name} {_number(number)}" for name, number in columns.items())
            rows.append(f"{task:<5} {score:<16} {shown}")
    for bar in report.get("bars", []):
        verdict = "holds" if bar["holds"] else "DOES NOT HOLD"
        rows.append(f"{bar['part']:<5} {bar['bar']}: {_number(bar['value'])} {verdict}")
    for score, series in report.get("long", {}).get("scores", {}).items():
        rows.append(f"long  {score:<16} {' '.join(_number(value) for value in series['model'])}")
    return "\n".join(rows)


def _number(value: Any) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if isinstance(value, float) else "-"


def _check_options(evaluate: Callable[..., dict], name: str, extra: dict[str, str]) -> None:
    known = inspect.signature(evaluate).parameters
    for option in extra:
        if option not in known:
            raise ValueError(
                f"evaluator {name!r} has no option {option!r}; it has {', '.join(known)}"
            )


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
