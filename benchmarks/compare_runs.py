"""Does `nuwa bench --against` tell the truth here: `python benchmarks/compare_runs.py BUNDLE`?

Again and again two comparisons in turns, as people do it: of the same build
with itself, of which nothing should be told "slower" or "faster", and of a build whose work takes a
tenth longer, text, steps and pixels, with the plain one, which should be told "slower". What has to
hold: each in 19 of 20 repetitions. The last line is JSON, with every verdict; exit status 1 if it
does not hold.

Beside it, of the same runs, the verdicts of comparisons that ignore that there were launches.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hardware import hardware

from nuwa.runtime.bench import compare, schema

SHARE = 0.95
SLOW_ENTRY = "--slowed"  # of this script: the entry point of the slow build
PLAIN = [sys.executable, "-m", "nuwa.runtime"]
SAME, SLOWED = "same", "slowed"
ALONE = "not answered"  # a row that is not a metric


def slowed(share: float, words: list[str]) -> int:
    """`nuwa WORDS` with an engine that takes so much longer for all it does; the product has no
    such switch.
    """
    from nuwa.runtime.cli import main as nuwa
    from nuwa.runtime.commands import bench_against
    from nuwa.runtime.engine import Engine

    def slower(work: Callable[..., Any]) -> Callable[..., Any]:
        def done(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            found = work(*args, **options)
            until = began + (1 + share) * (time.perf_counter() - began)
            while time.perf_counter() < until:  # a sleep of less than a millisecond is too long
                pass
            return found

        return done

    for name in ("prepare", "step", "pixels"):
        setattr(Engine, name, slower(getattr(Engine, name)))
    bench_against.PYTHON = [sys.executable, __file__, SLOW_ENTRY, str(share)]
    return nuwa(words)


def compared(build: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Of the build with the plain one: what each metric was told to be, and the exit status."""
    plain, out = folder / "nuwa-plain", folder / build
    plain.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m nuwa.runtime "$@"\n')
    plain.chmod(0o755)
    words = ["bench", str(args.bundle), "--against", str(plain), "--task", args.task]
    words += ["--scenario", args.scenario, "--slots", str(args.slots), "--no-rates"]
    words += ["--seconds", str(args.seconds), "--rounds", str(args.rounds)]
    words += ["--launches", str(args.launches)]
    words += ["--threshold", str(args.threshold), "--out", str(out), *args.further]
    program = PLAIN if build == SAME else [sys.executable, __file__, SLOW_ENTRY, str(args.slower)]
    ended = subprocess.run([*program, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    told = json.loads(ended.stdout.splitlines()[-1])
    launches = sorted(out.glob("launch-*"))[: told["launches"]]
    pairs = [[schema.read(one / side / "result.json") for side in "ab"] for one in launches]
    as_one = compare.compare_results(*map(joined, zip(*pairs, strict=True)), args.threshold)
    return {
        "build": build,
        "status": ended.returncode,
        "judged": judge({each["name"]: each["verdict"] for each in told["differences"]}),
        "judged_as_one_launch": judge({each.name: each.verdict for each in as_one}),
        "metrics": {each.pop("name"): each for each in told["differences"]},
    }


def joined(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result with the rounds of all, in which pairs are still pairs."""
    rounds = {
        name: [each for one in results for each in one["rounds"][name]]
        for name in results[0]["rounds"]
    }
    return results[0] | {"rounds": rounds, "turns": {"id": "all"}}


def judge(verdicts: dict[str, str]) -> str:
    """Of a comparison as a whole, as its exit status does."""
    known = {verdict for name, verdict in verdicts.items() if name != ALONE}
    return next(
        (each for each in ("slower", "faster", "no difference") if each in known), "unknown"
    )


def main() -> int:
    if sys.argv[1:2] == [SLOW_ENTRY]:
        return slowed(float(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--task", default="t2i", help="(%(default)s)")
    parser.add_argument("--scenario", default="single-stream", help="(%(default)s)")
    parser.add_argument("--slots", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--repetitions", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each (%(default)s)")
    parser.add_argument("--rounds", type=int, default=200, help="of each (%(default)s)")
    parser.add_argument("--launches", type=int, default=6, help="of each (%(default)s)")
    parser.add_argument("--threshold", type=float, default=0.05, help="(%(default)s)")
    parser.add_argument("--slower", type=float, default=0.1, metavar="SHARE", help="(%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON as a file, too")
    parser.add_argument("further", nargs="*", help="of `nuwa bench`, after --")
    args = parser.parse_args()
    told: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="nuwa-compare-") as folder:
        for repetition in range(args.repetitions):
            for build in (SAME, SLOWED):
                told.append({"repetition": repetition} | compared(build, args, Path(folder)))
                print(line(told[-1]), flush=True)
    report = summed_up(told, args)
    if args.out is not None:
        schema.replace(args.out, json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    return 0 if all(report["holds"].values()) else 1


def line(one: dict[str, Any]) -> str:
    known = (
        f"{name} {each['verdict']} {each['ratio']:.3f} ({each['low']:.3f} .. {each['high']:.3f})"
        for name, each in one["metrics"].items()
        if each["low"] is not None
    )
    return (
        f"{one['repetition']} {one['build']}: {', '.join(known)}; "
        f"as one launch {one['judged_as_one_launch']}"
    )


def summed_up(told: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """What has to hold: of a comparison as a whole, which is what the exit status says."""

    def counted(key: str) -> dict[str, Counter[str]]:
        return {
            build: Counter(one[key] for one in told if one["build"] == build)
            for build in (SAME, SLOWED)
        }

    verdicts, least = counted("judged"), math.ceil(SHARE * args.repetitions)
    names = (
        "task",
        "scenario",
        "slots",
        "seconds",
        "rounds",
        "launches",
        "threshold",
        "slower",
        "further",
    )
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "settings": {name: getattr(args, name) for name in (*names, "further")},
        "repetitions": args.repetitions,
        "verdicts": verdicts,
        "verdicts_as_one_launch": counted("judged_as_one_launch"),
        "holds": {
            "the same build: no difference": verdicts[SAME]["no difference"] >= least,
            "slowed: found": verdicts[SLOWED]["slower"] >= least,
        },
        "comparisons": told,
        "hardware": hardware(2),
    }


if __name__ == "__main__":
    sys.exit(main())
