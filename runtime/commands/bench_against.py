"""`nuwa bench --against`: two things measured in turns, and compared round by round."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Of the other run, which this one starts: how they take turns, and what it measures instead.
WORD, INSTEAD = "--in-turns", "--instead"
PYTHON = [sys.executable, "-m", "nuwa.runtime"]
OTHER = "against"  # its folder within --out
# What is not said to the other run, as it is of this one alone.
NOT_PASSED_ON = ("--against", "--out", "--metrics", "--scores")
# What is always said, as another version may have other defaults.
ALWAYS = ("seconds", "rounds", "slots", "queue_size", "queries")


def run(args: argparse.Namespace, measure: Callable[..., int]) -> int:
    """measure: of bench.py. The other's result is a, this one's is b."""
    from ..bench import schema
    from ..bench.turns import Leading

    program, words = other_command(args)
    with tempfile.TemporaryDirectory(prefix="nuwa-against-") as scratch:
        folder = Path(scratch) if args.out is None else args.out / OTHER

        def command(word: str) -> Sequence[str]:
            return [*program, "bench", WORD, word, "--no-rates", "--out", str(folder), *words]

        turns = Leading(command)

        def other() -> dict[str, Any] | None:
            turns.end()
            path = folder / "result.json"
            found = schema.read(path) if path.exists() else {}
            mine = (found.get("turns") or {}).get("id") == turns.id  # not of an earlier run
            return found if mine else None

        try:
            return measure(args, turns, other)
        finally:
            turns.end()


def other_command(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The program, and what it is told: as this one, but for what is measured.

    ValueError for what is nothing that can be.
    """
    what, words = args.against, _without(args.words, NOT_PASSED_ON)
    for name in ALWAYS:
        if (value := getattr(args, name)) is not None:
            words = [f"--{name.replace('_', '-')}", str(value), *words]
    if what and (args.server or Path(what).is_dir()):
        return PYTHON, [INSTEAD, what, *words]
    if (found := shutil.which(what)) is not None:
        return [found], words
    raise ValueError(
        f"--against {what}: neither a bundle's folder nor a program; beside --server it is another "
        "HOST:PORT"
    )


def replace(args: argparse.Namespace) -> None:
    """Has the other run measure what it was told to, instead of what this one measures."""
    args.bundle = []
    if args.server:
        args.server = args.instead
    else:
        args.bundle, args.preset, args.precision = [args.instead], None, None


def _without(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """Each of the names takes one value."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(name)
    return parser.parse_known_args(list(words))[1]
