"""`nuwa bench sweep`: which settings of a server are worth having on this machine."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Hashable, Mapping
from datetime import UTC, datetime
from functools import partial
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

FILE = "sweep.json"


def add_arguments(group: argparse._ArgumentGroup) -> None:
    from ..bench.sweep import PREFERENCES

    group.add_argument(
        "--backends",
        default=AUTO,
        metavar="A,B",
        help=f"of {', '.join(BACKENDS)} (default: %(default)s)",
    )
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
    group.add_argument(
        "--prefer",
        choices=PREFERENCES,
        default="balance",
        help="what the best is by, balance by latency over throughput (default: %(default)s)",
    )


def run(args: argparse.Namespace, settings: Settings, workload: Workload) -> int:
    from ..bench import machine, schema, sweep
    from ..bench.sweep_report import print_outcomes
    from .bench import INTERRUPTED, command_line, say

    backends, threads, slots, buckets = _tried(args)
    _check(args, backends)
    made = _made(args)
    wanted = list(sweep.choices([*args.bundle, *made], backends, threads, slots, buckets))
    about = {
        "schema": sweep.SCHEMA,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(args),
        "machine": machine.describe(),
        "workload": dataclasses.asdict(workload) | {"task": str(workload.task)},
        "seconds": args.seconds,
        "prefer": args.prefer,
    }

    def keep(outcomes: list[Outcome]) -> None:
        """So that whatever ends this process leaves what was measured."""
        if args.out is None:
            return
        chosen, _ = _best(outcomes, args.prefer)
        try:
            schema.write(args.out / FILE, _result(about, outcomes, chosen))
        except OSError as error:
            say(f"not written yet: {error}")

    outcomes = sweep.sweep(
        wanted,
        workload,
        args.seconds,
        say,
        scores=settings.evaluation,
        folder=Folders(args.out, made),
        keep=keep,
    )
    chosen, problem = _best(outcomes, args.prefer)
    result = _result(about, outcomes, chosen)
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
    """Of choices' bundles. Those of `made`, and those with engines for buckets of their own, are
    made when they are asked for: once each, also where that fails.
    """

    def __init__(self, out: Path | None, made: Mapping[str, Callable[[], Path]]) -> None:
        self._out, self._make = out, made
        self._bundles: dict[Hashable, Path | Exception] = {}
        self._engines: dict[Hashable, Path | Exception] = {}

    def __call__(self, choice: Choice) -> Path:
        from ..bench import making

        name, buckets = choice.bundle, choice.buckets
        make = self._make.get(name)
        bundle = Path(name) if make is None else _once(self._bundles, name, make)
        if buckets is None:
            return bundle
        assert self._out is not None, "checked before"
        out = self._out / "engines" / str(len(self._engines)) / bundle.resolve().name
        key = (name, choice.backend, choice.slots, buckets)
        return _once(
            self._engines,
            key,
            lambda: making.with_engines(bundle, out, choice.backend, choice.slots, buckets),
        )


def _once(found: dict[Hashable, Path | Exception], key: Hashable, make: Callable[[], Path]) -> Path:
    """What was made; what went wrong when it was is raised again."""
    if key not in found:
        try:
            found[key] = make()
        except Exception as error:
            found[key] = error
    made = found[key]
    if isinstance(made, Exception):
        raise made
    return made


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


def _made(args: argparse.Namespace) -> dict[str, Callable[[], Path]]:
    """By its folder, how each bundle of --checkpoint and --preset is made."""
    found: dict[str, Callable[[], Path]] = {}
    for precision in _precisions(args):
        if args.checkpoint is not None:
            out = args.out / "bundles" / precision
            found[str(out)] = partial(_exported, args.checkpoint, out, precision)
        if args.preset is not None:
            out = args.out / "bundles" / f"{args.preset}-{precision}"
            found[str(out)] = partial(_random, args.preset, out, precision)
    return found


def _exported(checkpoint: Path, out: Path, precision: str) -> Path:
    from ..bench import making
    from .bench import say

    say(f"exporting {checkpoint} in {precision}")
    return making.export(checkpoint, out, precision)


def _random(preset: str, out: Path, precision: str) -> Path:
    from ..bench import making
    from .bench import say

    say(f"making {preset} with random weights in {precision}")
    return making.random_bundle(preset, out, precision)


def _precisions(args: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys((args.precision or PRECISIONS[0]).split(",")))


def _best(outcomes: list[Outcome], prefer: str) -> tuple[Outcome | None, str]:
    """The one that is chosen, or why there is none."""
    from ..bench import sweep

    try:
        return sweep.best(outcomes, prefer), ""
    except ValueError as error:
        return None, str(error)


def _result(
    about: Mapping[str, Any], outcomes: list[Outcome], chosen: Outcome | None
) -> dict[str, Any]:
    from ..bench import sweep

    return {
        **about,
        "notes": sweep.notes(outcomes),
        "interrupted": any(one.problem == sweep.INTERRUPTED for one in outcomes),
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
    schema.write(out / FILE, result)
    write_text(out / "sweep.html", page(outcomes, chosen, result["command"], task))
    if config is not None:
        write_text(out / "server.toml", config)
    told = f"{FILE}, sweep.html" + (" and server.toml" if config is not None else "")
    say(f"written: {told} in {out}")


def _numbers(text: str, flag: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text!r} is not N,N,...") from None
    if min(found) < 1:
        raise ValueError(f"{flag} {text!r}: at least 1 each")
    return found
