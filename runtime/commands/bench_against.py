"""`nuwa bench --against`: two things measured in turns, and compared round by round."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WORD = "--in-turns"  # of the other run, which this one starts
OTHER = "against"  # its folder within --out
# What is not said to the other run, as it is of this one alone.
NOT_PASSED_ON = ("--against", "--out", "--baseline", "--metrics", "--scores")


def run(args: argparse.Namespace, measure: Callable[..., int]) -> int:
    """measure: of bench.py. The other's result is a = the one before, this one's is b."""
    from ..bench import schema
    from ..bench.turns import Leading

    if args.baseline is not None or args.loadgen is not None:
        given = "--baseline" if args.baseline is not None else "--loadgen"
        raise ValueError(f"--against and {given}: one of them")
    program, words = other_command(args)
    with tempfile.TemporaryDirectory(prefix="nuwa-against-") as scratch:
        folder = Path(scratch) if args.out is None else args.out / OTHER

        def command(word: str) -> Sequence[str]:
            return [*program, "bench", *words, "--no-rates", "--out", str(folder), WORD, word]

        turns = Leading(command)

        def other() -> dict[str, Any] | None:
            path = folder / "result.json"
            return schema.read(path) if turns.end() and path.exists() else None

        try:
            return measure(args, turns, other)
        finally:
            turns.end()


def other_command(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The program, and what it is told: as this one, but for what is measured.

    ValueError for what is nothing that can be.
    """
    what = args.against
    words, program = _without(args.words, NOT_PASSED_ON), [sys.executable, "-m", "nuwa.runtime"]
    if args.server or Path(what).is_dir():
        rest = _without(words, ("--server", "--preset", "--precision"))
        for bundle in args.bundle:
            rest.remove(bundle)
        return program, [*(("--server",) if args.server else ()), what, *rest]
    if (found := shutil.which(what)) is not None:
        return [found], words
    raise ValueError(
        f"--against {what}: neither a bundle's folder nor a program; beside --server it is another "
        "HOST:PORT"
    )


def _without(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """Each of the names takes one value."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(name)
    return parser.parse_known_args(list(words))[1]
