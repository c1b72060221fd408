"""`nuwa bench --against`: two things measured in turns, and compared round by round.

This process measures nothing: it starts one for each of the two, and several times over, as what a
process has of the machine's memory is its own and stays so (launches.py).
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nuwa.spec.files import make_writable

if TYPE_CHECKING:
    from ..bench.launches import Pair
    from ..bench.scenarios import Extent

# Of the runs that are started: how they take turns, and what one measures instead of this command.
WORD, INSTEAD = "--in-turns", "--instead"
LAUNCHES = 6  # unless it is said; of servers one, as they are not launched
PYTHON = [sys.executable, "-m", "nuwa.runtime"]
FILE = "comparison.json"
# What is not said to the runs as it was said to this command ...
OWN = (
    *("--against", "--threshold", "--out"),
    *("--launches", "--seconds", "--rounds", "--least", "--queries"),
)
NEW_ONES = ("--metrics", "--scores")  # ... and to that of WHAT neither
# What is always said, as another version may have other defaults.
ALWAYS = ("slots", "queue_size")


@dataclass(frozen=True)
class Side:
    """One of the two, `a` (--against) or `b` (this). program: that measures it; words: it is told;
    rates: whether to measure the machine's, once.
    """

    name: str
    title: str
    program: Sequence[str]
    words: Sequence[str]
    rates: bool = False


def run(args: argparse.Namespace, extent: Extent, say: Callable[[str], None]) -> int:
    """extent: of all launches together. Prints the comparison; the exit status."""
    launches = _launches(args)
    sides = other(args), Side("b", "this", PYTHON, words_of(args, (*OWN,)), not args.no_rates)
    if args.out is not None:
        make_writable(args.out)
    with tempfile.TemporaryDirectory(prefix="nuwa-against-") as scratch:
        folder = Path(scratch) if args.out is None else args.out
        pairs, interrupted = _measured(sides, each_launch(extent, launches), folder, say)
        return _tell(pairs, interrupted, args, launches, say)


def other(args: argparse.Namespace) -> Side:
    """What this is compared with. ValueError for what is nothing that can be."""
    what, words = args.against, words_of(args, (*OWN, *NEW_ONES))
    if what and (args.server or Path(what).is_dir()):
        return Side("a", what, PYTHON, [INSTEAD, what, *words])
    if (found := shutil.which(what)) is not None:
        return Side("a", what, [found], words)
    raise ValueError(
        f"--against {what}: neither a bundle's folder nor a program; beside --server it is another "
        "HOST:PORT"
    )


def measure_instead(args: argparse.Namespace) -> None:
    """Has a run measure what it was told to, instead of what this command measures."""
    args.bundle = []
    if args.server:
        args.server = args.instead
    else:
        args.bundle, args.preset, args.precision = [args.instead], None, None


def of_servers(launches: int) -> ValueError:
    return ValueError(
        f"--launches {launches}: servers are launched by who has them; compare results of several "
        "launches of them"
    )


def _launches(args: argparse.Namespace) -> int:
    if args.server and (args.launches or 1) > 1:
        raise of_servers(args.launches)
    return 1 if args.server else args.launches or LAUNCHES


def each_launch(extent: Extent, launches: int) -> list[Extent]:
    """One for each launch; ValueError if there are more launches than queries."""
    if extent.most is not None and extent.most < launches:
        raise ValueError(
            f"--queries {extent.most} are of all {launches} launches together; ask for as many "
            "queries at least, or for fewer --launches"
        )
    rounds = -(-extent.rounds // launches)
    return [
        replace(each, rounds=rounds, least=min(each.least, each.most or each.least))
        for each in replace(extent, rounds=launches).each()
    ]


def _measured(
    sides: tuple[Side, Side], parts: Sequence[Extent], folder: Path, say: Callable[[str], None]
) -> tuple[list[Pair], bool]:
    """The results of each launch in which both have one; whether Ctrl-C left some out."""
    pairs: list[Pair] = []
    for number, extent in enumerate(parts, 1):
        launch = Launch(sides, folder / f"launch-{number}", extent, first=number == 1)
        # Who starts, and goes first: the one, then the other one.
        try:
            interrupted = not launch.measure(reverse=number % 2 == 1)
        except ValueError as error:
            if not pairs:
                raise
            say(str(error))  # and the launches before are compared
            return pairs, False
        pair = launch.results()
        told = f"launch {number} of {len(parts)}: {launch.pairs} pairs of rounds"
        say(told if pair else f"{told}, and not both have a result")
        if pair is not None:
            pairs.append(pair)
        if interrupted or pair is None:
            return pairs, interrupted
    return pairs, False


class Launch:
    """Both once. pairs: of rounds that they had."""

    def __init__(
        self, sides: tuple[Side, Side], folder: Path, extent: Extent, *, first: bool
    ) -> None:
        self.pairs, self._sides, self._folder, self._extent = 0, sides, folder, extent
        self._first, self._id = first, uuid.uuid4().hex

    def measure(self, *, reverse: bool) -> bool:
        """False if it was interrupted. ValueError, with what a run said, if it did not begin."""
        from ..bench.turns import Run, take_turns

        self._folder.mkdir(parents=True, exist_ok=True)
        runs: list[Run] = []
        try:
            try:
                for side in self._sides[::-1] if reverse else self._sides:
                    said = self._folder / f"{side.name}.log"
                    with said.open("w") as file:
                        runs.append(Run(partial(self._command, side), self._id, file))
                    if not runs[-1].warmed():
                        runs[-1].end()
                        raise ValueError(
                            f"{side.title} ended before it began: {said.read_text().strip()}"
                        )
                self.pairs = take_turns(self._extent, runs)
                ended = True
            except KeyboardInterrupt:
                ended = False
            for run in runs:
                run.end()
            return ended
        finally:
            for run in runs:
                run.kill()

    def results(self) -> Pair | None:
        """None if one has none."""
        from ..bench import schema

        found = []
        for side in self._sides:
            path = self._folder / side.name / "result.json"
            result = schema.read(path) if path.exists() else {}
            if (result.get("turns") or {}).get("id") == self._id:  # not of an earlier command
                found.append(result)
        return (found[0], found[1]) if len(found) == len(self._sides) else None

    def _command(self, side: Side, word: str) -> list[str]:
        extent = self._extent
        words = ["bench", WORD, word, "--out", str(self._folder / side.name)]
        words += ["--seconds", str(extent.seconds), "--rounds", str(extent.rounds)]
        words += ["--least", str(max(1, extent.least))]
        words += [] if extent.most is None else ["--queries", str(extent.most)]
        words += [] if side.rates and self._first else ["--no-rates"]
        return [*side.program, *words, *side.words]


def _tell(
    pairs: list[Pair],
    interrupted: bool,
    args: argparse.Namespace,
    launches: int,
    say: Callable[[str], None],
) -> int:
    from ..bench import compare, schema
    from ..bench.launches import compare_launches

    differing: list[str] = []
    differences: list[compare.Difference] = []
    try:
        differing = compare.differs(*pairs[0]) if pairs else []
        differences = compare_launches(pairs, args.threshold)
    except ValueError as error:  # such as a metric that only one of them has
        differing.append(str(error))
        say(f"not compared: {error}")
    else:
        compare.print_differences(differences, differing)
    found = compare.to_json(differences, differing, args.threshold)
    found |= {"a": args.against, "b": "this", "asked_launches": launches, "launches": len(pairs)}
    found["notes"] = _notes(pairs)
    found["interrupted"] = interrupted
    # Who fails in one of its launches is not as good as before, however fast.
    found["status"] = max(compare.baseline_exit(differences), int(len(pairs) < launches))
    for note in found["notes"]:
        say(note)
    try:
        if args.out is not None:
            schema.write(args.out / FILE, found)
            say(f"written: {args.out / FILE}, and beside it what each launch gave")
    finally:
        print(schema.last_line(found), flush=True)
    return 128 + signal.SIGINT if interrupted else found["status"]


def _notes(pairs: Sequence[Pair]) -> list[str]:
    """What a reader has to know of the results, each once."""
    said = (
        f"{name}: {note}"
        for pair in pairs
        for name, result in zip("ab", pair, strict=True)
        for note in result.get("notes") or ()
    )
    return list(dict.fromkeys(said))


def words_of(args: argparse.Namespace, without: Sequence[str]) -> list[str]:
    """What this command was told, but for some options that take a value."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in without:
        parser.add_argument(name)
    words = parser.parse_known_args(list(args.words))[1]
    for name in () if args.server else ALWAYS:
        if (value := getattr(args, name)) is not None:
            words = [f"--{name.replace('_', '-')}", str(value), *words]
    return words
