"""Does `nuwa bench --compare` tell the truth here: `python benchmarks/compare_runs.py BUNDLE`?

Again and again three runs of `nuwa bench`, each in a process of its own as people do it: two of the
same build, of which nothing should compare as "slower" or "faster", and one whose every decode step
takes a tenth longer, which should be found "slower" than the first. The order within a repetition
is turned each time, so that a machine that slowly warms up is not taken for a difference. What has
to hold: each in 19 of 20 repetitions. The last line is JSON, with every verdict; exit status 1 if
it does not hold.

A tenth longer are the steps, and so the requests by a tenth of their share: what is injected is
measured, too, as the share of a request that is spent in steps.
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
from pathlib import Path
from typing import Any

from hardware import hardware

from nuwa.runtime.bench import compare, schema

SHARE = 0.95
SLOW_ENTRY = "--slowed"  # of this script: the entry point of the slow build
A, SAME, SLOWED = "a", "same", "slowed"
ALONE = "not answered"  # a row that is not a metric


def slowed(share: float, words: list[str]) -> int:
    """`nuwa WORDS` with an engine that takes so much longer for a step; the product has no such
    switch.
    """
    from nuwa.runtime.cli import main as nuwa
    from nuwa.runtime.engine import Engine

    step = Engine.step

    def slower(self: Engine) -> Any:
        began = time.perf_counter()
        done = step(self)
        wait = began + (1 + share) * (time.perf_counter() - began)
        while time.perf_counter() < wait:  # a sleep of less than a millisecond is too long
            pass
        return done

    Engine.step = slower
    return nuwa(words)


def measured(build: str, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The result of one run."""
    words = ["bench", str(args.bundle), "--task", args.task, "--scenario", args.scenario]
    words += ["--seconds", str(args.seconds), "--rounds", str(args.rounds), "--no-rates"]
    words += ["--slots", str(args.slots), "--out", str(out), *args.further]
    entry = ["-m", "nuwa.runtime"]
    if build == SLOWED:
        entry = [__file__, SLOW_ENTRY, str(args.slower)]
    subprocess.run(
        [sys.executable, *entry, *words],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return schema.read(out / "result.json")


def orders(repetition: int) -> list[str]:
    builds = [A, SAME, SLOWED]
    return builds[repetition % 3 :] + builds[: repetition % 3]


def judge(found: list[compare.Difference]) -> str:
    """Of a comparison as a whole, as --baseline judges it."""
    verdicts = {each.verdict for each in found if each.name != ALONE}
    for verdict in ("slower", "faster", "no difference"):
        if verdict in verdicts:
            return verdict
    return "unknown"


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
    parser.add_argument("--seconds", type=float, default=20.0, help="of a run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="of a run (%(default)s)")
    parser.add_argument("--threshold", type=float, default=0.05, help="(%(default)s)")
    parser.add_argument(
        "--slower", type=float, default=0.1, metavar="SHARE", help="a step (%(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON as a file, too")
    parser.add_argument("further", nargs="*", help="of `nuwa bench`, after --")
    args = parser.parse_args()
    told: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="nuwa-compare-") as folder:
        for repetition in range(args.repetitions):
            order = orders(repetition)
            results = {build: measured(build, args, Path(folder) / build) for build in order}
            for build in (SAME, SLOWED):
                found = compare.compare_results(results[A], results[build], args.threshold)
                told.append({"repetition": repetition, "order": order, "build": build})
                told[-1] |= {"judged": judge(found)}
                told[-1] |= {"metrics": {each.name: described(each) for each in found}}
                told[-1] |= {"in_steps": {name: in_steps(each) for name, each in results.items()}}
                print(line(told[-1]), flush=True)
    report = summed_up(told, args)
    text = json.dumps(report)
    if args.out is not None:
        schema.replace(args.out, json.dumps(report, indent=2) + "\n")
    print(text)
    return 0 if all(report["holds"].values()) else 1


def described(each: compare.Difference) -> dict[str, Any]:
    return {"verdict": each.verdict, "ratio": each.ratio, "low": each.low, "high": each.high}


def in_steps(result: dict[str, Any]) -> float | None:
    """The share of a request that decoding is."""
    phases, whole = result["phases"], result["metrics"].get("latency", {}).get("mean")
    return phases["decode"]["mean"] / whole if whole and "decode" in phases else None


def line(one: dict[str, Any]) -> str:
    known = (
        f"{name} {each['verdict']}" + (f" {each['ratio']:.3f}" if each["ratio"] else "")
        for name, each in one["metrics"].items()
    )
    return f"{one['repetition']} {one['build']}: {one['judged']} ({', '.join(known)})"


def summed_up(told: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """What has to hold: of a comparison as a whole, which is what --baseline's exit status says."""
    verdicts = {
        build: Counter(one["judged"] for one in told if one["build"] == build)
        for build in (SAME, SLOWED)
    }
    by_metric: dict[str, dict[str, Counter[str]]] = {SAME: {}, SLOWED: {}}
    for one in told:
        for name, each in one["metrics"].items():
            by_metric[one["build"]].setdefault(name, Counter())[each["verdict"]] += 1
    least = math.ceil(SHARE * args.repetitions)
    names = ("task", "scenario", "slots", "seconds", "rounds", "threshold", "slower", "further")
    return {
        "settings": {name: getattr(args, name) for name in names},
        "repetitions": args.repetitions,
        "verdicts": verdicts,
        "by_metric": by_metric,
        "holds": {
            "the same build: no difference": verdicts[SAME]["no difference"] >= least,
            "slowed: found": verdicts[SLOWED]["slower"] >= least,
        },
        "comparisons": told,
        "hardware": hardware(2),
    }


if __name__ == "__main__":
    sys.exit(main())
