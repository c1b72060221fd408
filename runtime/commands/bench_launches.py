"""`nuwa bench --launches N`: a run in several processes one after the other, kept as one result.

This process measures nothing: how fast a process is depends on how it came to lie in memory, and
stays so (bench/launches.py), and what differs so shows in several alone.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuwa.spec.files import make_writable

from . import bench_against

if TYPE_CHECKING:
    from ..bench.scenarios import Extent

# What is not said to the launches as it was said to this command.
OWN = (*bench_against.OWN, "--baseline")


def check(args: argparse.Namespace) -> None:
    """ValueError for what has no launches."""
    if args.server:
        raise bench_against.of_servers(args.launches)
    if args.loadgen is not None:
        raise ValueError("--launches: LoadGen's logs are of one; --launches or --loadgen")
    if args.scenario == "server" and args.rate is None:
        raise ValueError("--launches: a search for the highest rate is of one; name a --rate")


def run(
    args: argparse.Namespace,
    extent: Extent,
    before: Mapping[str, Any] | None,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], bool]:
    """The result, and whether all launches have one. extent: of all launches together; before: a
    result that the first launch must be comparable with, or the others are not started.

    ValueError if the first launch has no result; what was wrong it said on stderr. After Ctrl-C the
    result is of what there is, marked so; KeyboardInterrupt if that is nothing.
    """
    from ..bench import compare
    from ..bench.launches import together

    parts = bench_against.each_launch(extent, args.launches)
    results: list[dict[str, Any]] = []
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="nuwa-launches-") as scratch:
        folder = Path(scratch) if args.out is None else args.out
        for number, part in enumerate(parts, 1):
            say(f"launch {number} of {len(parts)}")
            result, interrupted = _launched(args, part, folder / f"launch-{number}")
            if result is not None:
                results.append(result)
            elif not interrupted:
                say(f"launch {number} of {len(parts)} has no result")
            if result is None or interrupted:
                break
            if number == 1 and before is not None:
                compare.check_comparable(before, result)
    if interrupted and not results:
        raise KeyboardInterrupt
    if not results:
        raise ValueError("the first launch has no result")
    found = together(results) | ({"interrupted": True} if interrupted else {})
    return found, len(results) == len(parts)


def _launched(
    args: argparse.Namespace, extent: Extent, folder: Path
) -> tuple[dict[str, Any] | None, bool]:
    """The result of a process of its own, None if it has none; and whether Ctrl-C ended it."""
    from ..bench import schema

    path = folder / "result.json"
    make_writable(folder)
    path.unlink(missing_ok=True)  # of an earlier command
    words = ["bench", "--out", str(folder), "--seconds", str(extent.seconds)]
    words += ["--rounds", str(extent.rounds), "--least", str(max(1, extent.least))]
    words += [] if extent.most is None else ["--queries", str(extent.most)]
    interrupted = _waited([*bench_against.PYTHON, *words, *bench_against.words_of(args, OWN)])
    result = schema.read(path) if path.exists() else None
    return result, interrupted or bool(result and result.get("interrupted"))


def _waited(command: Sequence[str]) -> bool:
    """Until it has ended. Ctrl-C is passed on, and what it has by then is its result; whether that
    was so.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # or it would hear Ctrl-C twice
    )
    try:
        try:
            process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            return True
        return False
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
