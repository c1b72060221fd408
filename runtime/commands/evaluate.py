"""`nuwa evaluate`: scores of a bundle, from an evaluator that another package part brings.

Evaluators come from the entry point group `nuwa.evaluators`: runtime never imports training.
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

from nuwa.spec.tasks import parse_task

from ..client import BaseClient, LocalClient
from ..core import Pixels
from . import arguments

GROUP = "nuwa.evaluators"

DESCRIPTION = """\
Generate many samples with a bundle and score them against the evaluator's data set.

Sample i is generated with seed SEED + i, so the same command gives the same report."""

EXAMPLES = """\
examples:
  nuwa evaluate demo/bundle --samples 64
  nuwa evaluate demo/bundle --split test --samples 512 --tasks t2i,t2v --seed 0 --out report
  nuwa evaluate demo/bundle --set level=full --json > report.json
"""


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("bundle", type=Path, help="folder made by `nuwa export`")
    parser.add_argument(
        "--split", default="test", help="part of the data set (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=arguments.positive, default=512, metavar="N", help="a task (default: 512)"
    )
    parser.add_argument(
        "--tasks", default="t2i,t2v", metavar="A,B", help="tasks to score (default: %(default)s)"
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
    arguments.add_sampling(parser)
    arguments.add_engine(parser, slots=False)
    return run


def run(args: argparse.Namespace) -> int:
    tasks = [str(parse_task(name.strip())) for name in args.tasks.split(",")]
    evaluate = load_evaluator(args.evaluator)
    extra = dict(args.set)
    _check_options(evaluate, args.evaluator, extra)
    from ..engine import load_engine

    engine = load_engine(args.bundle, slots=1, threads=args.threads)
    with LocalClient(engine) as client, _progress_bar() as progress:
        report = evaluate(
            generator(client, arguments.sampling(args)),
            tasks=tasks,
            split=args.split,
            samples=args.samples,
            seed=args.seed,
            out=args.out,
            progress=progress,
            reconstruct=lambda frames: engine.pixels(engine.tokens(frames)),
            **extra,
        )
    print(json.dumps(report, indent=2) if args.json else score_table(report))
    return 0


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


def generator(client: BaseClient, sampling: dict[str, Any]) -> Callable[..., Pixels]:
    """What evaluators call: a task, a prompt and given frames in, u8 [F, H, W, 3] out."""

    def generate(
        task: str, prompt: str, frame_count: int, seed: int, frames: Pixels | None = None
    ) -> Pixels:
        if parse_task(task).is_video:
            return client.generate_video(
                task, prompt, seed=seed, frame_count=frame_count, video=frames, **sampling
            ).frames
        image = None if frames is None else np.asarray(frames)
        return client.generate_image(task, prompt, seed=seed, image=image, **sampling).pixels[None]

    return generate


def score_table(report: dict) -> str:
    """The scores of report["tasks"][TASK]["scores"][SCORE], one line each."""
    rows = []
    for task, result in report["tasks"].items():
        for score, value in result["scores"].items():
            columns = value if isinstance(value, dict) else {"model": value}
            shown = "  ".join(f"{name} {_number(number)}" for name, number in columns.items())
            rows.append(f"{task:<5} {score:<16} {shown}")
    return "\n".join(rows)


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


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
