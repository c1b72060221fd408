"""`nuwa bench sweep`: which settings of a server are worth having on this machine."""

from __future__ import annotations

import argparse
import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuwa.spec.engines import RUNTIMES
from nuwa.spec.files import make_writable, write_text
from nuwa.spec.manifest import PRECISIONS

from ..backends.base import AUTO, BACKENDS

if TYPE_CHECKING:
    from ..bench.running import Settings
    from ..bench.sweep import Choice, Outcome
    from ..bench.workload import Workload

NOT_OF_A_SWEEP = ("server", "metrics", "baseline", "against", "launches", "loadgen")  # options


def add_arguments(group: argparse._ArgumentGroup) -> None:
    from ..bench.sweep import PREFERENCES

    group.add_argument("--backends", default=AUTO, metavar="A,B", help=f"of {', '.join(BACKENDS)}")
    group.add_argument("--threads-of", metavar="N,N", help="(default: one a core)")
    group.add_argument(
        "--slots-of", default="1,2,4,8", metavar="N,N", help="(default: %(default)s)"
    )
    group.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="exported in each of --precision; the bundles are kept in --out",
    )
    group.add_argument(
        "--buckets-of",
        metavar="T,T/T,T",
        help=f"ranges of rows by their upper ends, of {' and '.join(RUNTIMES)}: engines are built "
        "for each, and kept in --out (default: the engines that the bundle has)",
    )
    group.add_argument("--prefer", choices=PREFERENCES, default="balance")


def run(args: argparse.Namespace, settings: Settings, workload: Workload) -> int:
    from ..bench import schema, sweep
    from ..bench.sweep_report import print_outcomes
    from .bench import INTERRUPTED, say

    backends, threads, slots, buckets = _tried(args)
    _check(args, backends)
    began = datetime.now(UTC)
    wanted = list(sweep.choices(_bundles(args), backends, threads, slots, buckets))
    folders = Folders(args.out)
    outcomes = sweep.sweep(
        wanted, workload, args.seconds, say, scores=settings.evaluation, folder=folders
    )
    chosen, problem = None, ""
    try:
        chosen = sweep.best(outcomes, args.prefer)
    except ValueError as error:
        problem = str(error)
    result = _result(args, workload, began, outcomes, chosen)
    try:
        print_outcomes(outcomes, str(workload.task))
        _write(args.out, result, outcomes, chosen, str(workload.task))
    finally:  # whatever cannot be written or shown, it was measured
        print(schema.last_line(result), flush=True)
    if problem:
        say(f"nuwa bench: {problem}")
    if result["interrupted"]:
        return INTERRUPTED
    return 2 if problem else 0


class Folders:
    """Of choices' bundles; for those with buckets of their own, made with engines, once each."""

    def __init__(self, out: Path | None) -> None:
        self._out = out
        self._made: dict[tuple[Any, ...], Path] = {}

    def __call__(self, choice: Choice) -> Path:
        from ..bench import making

        bundle = Path(choice.bundle)
        if choice.buckets is None:
            return bundle
        assert self._out is not None, "checked before"
        key = (choice.bundle, choice.backend, choice.slots, choice.buckets)
        if key not in self._made:
            out = self._out / "engines" / str(len(self._made)) / bundle.resolve().name
            self._made[key] = making.with_engines(
                bundle, out, choice.backend, choice.slots, choice.buckets
            )
        return self._made[key]


def _tried(
    args: argparse.Namespace,
) -> tuple[list[str], list[int | None], list[int], list[tuple[int, ...]]]:
    """Backends, threads, slots, buckets."""
    backends = args.backends.split(",")
    unknown = [name for name in backends if name not in BACKENDS]
    if unknown:
        raise ValueError(f"backend {unknown[0]!r} is not one of {', '.join(BACKENDS)}")
    threads: list[int | None] = [None]
    if args.threads_of:
        threads = [*_numbers(args.threads_of, "--threads-of")]
    lists = args.buckets_of.split("/") if args.buckets_of else []
    buckets = [tuple(_numbers(each, "--buckets-of")) for each in lists]
    return backends, threads, _numbers(args.slots_of, "--slots-of"), buckets


def _check(args: argparse.Namespace, backends: list[str]) -> None:
    """What can be known to be wrong before anything is made or measured."""
    for name in NOT_OF_A_SWEEP:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} is not of a sweep")
    made = args.checkpoint is not None or args.preset is not None
    if not (args.bundle or made):
        raise ValueError(
            "which bundles? name their folders after `sweep`, or a --checkpoint or --preset"
        )
    if args.precision is not None and not made:
        raise ValueError("--precision is of --checkpoint and --preset: a bundle has its own")
    for each in _precisions(args):
        if each not in PRECISIONS:
            raise ValueError(f"--precision {each!r} is not one of {', '.join(PRECISIONS)}")
    if args.buckets_of and not set(backends) & set(RUNTIMES):
        raise ValueError(
            f"--buckets-of is of {' and '.join(RUNTIMES)}; of {', '.join(backends)} steps have any "
            "number of rows"
        )
    if args.out is None and (made or args.buckets_of):
        raise ValueError("--checkpoint, --preset and --buckets-of need --out, to keep what is made")
    if args.scores is not None and not args.scores.exists():
        raise ValueError(f"--scores {args.scores}: there is no such file or folder")
    if args.out is not None:
        make_writable(args.out)


def _bundles(args: argparse.Namespace) -> list[str]:
    """Those that were named, and then those that are made."""
    from ..bench import making
    from .bench import say

    found = list(args.bundle)
    for precision in _precisions(args):
        if args.checkpoint is not None:
            say(f"exporting {args.checkpoint} in {precision}")
            out = args.out / "bundles" / precision
            found.append(str(making.export(args.checkpoint, out, precision)))
        if args.preset is not None:
            say(f"making {args.preset} with random weights in {precision}")
            out = args.out / "bundles" / f"{args.preset}-{precision}"
            found.append(str(making.random_bundle(args.preset, out, precision)))
    return found


def _precisions(args: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys((args.precision or PRECISIONS[0]).split(",")))


def _result(
    args: argparse.Namespace,
    workload: Workload,
    began: datetime,
    outcomes: list[Outcome],
    chosen: Outcome | None,
) -> dict[str, Any]:
    from ..bench import machine, sweep
    from .bench import command_line

    return {
        "schema": sweep.SCHEMA,
        "when": began.isoformat(timespec="seconds"),
        "command": command_line(args),
        "notes": sweep.notes(outcomes),
        "interrupted": any(one.problem == sweep.INTERRUPTED for one in outcomes),
        "machine": machine.describe(),
        "workload": dataclasses.asdict(workload) | {"task": str(workload.task)},
        "seconds": args.seconds,
        "prefer": args.prefer,
        "outcomes": sweep.to_json(outcomes),
        "best": None if chosen is None else sweep.to_json([chosen])[0],
    }


def _write(
    out: Path | None,
    result: dict[str, Any],
    outcomes: list[Outcome],
    chosen: Outcome | None,
    task: str,
) -> None:
    from ..bench import schema, sweep
    from ..bench.sweep_report import page
    from .bench import say

    config = None if chosen is None else sweep.to_toml(chosen)
    if out is None:
        print(config or "", end="")
        return
    schema.write(out / "sweep.json", result)
    write_text(out / "sweep.html", page(outcomes, chosen, result["command"], task))
    if config is not None:
        write_text(out / "server.toml", config)
    told = "sweep.json, sweep.html" + (" and server.toml" if config is not None else "")
    say(f"written: {told} in {out}")


def _numbers(text: str, flag: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text!r} is not N,N,...") from None
    if min(found) < 1:
        raise ValueError(f"{flag} {text!r}: at least 1 each")
    return found
