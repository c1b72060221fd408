"""Does `nuwa bench --compare` tell the truth here: `python benchmarks/compare_runs.py BUNDLE`?

Again and again three runs of the same requests, one after another: two of the same build, which
should compare as "no difference", and one in which every request takes a tenth longer, which should
be found "slower" than the first. What has to hold: each in 19 of 20 repetitions. The last line is
JSON; exit status 1 if it does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from hardware import hardware

from nuwa.runtime.bench import compare, scenarios
from nuwa.runtime.bench.asking import Ask, Asker
from nuwa.runtime.bench.observation import Observation
from nuwa.runtime.bench.running import warmed
from nuwa.runtime.bench.scenarios import Extent
from nuwa.runtime.bench.targets import in_process
from nuwa.runtime.bench.workload import Workload
from nuwa.spec.tasks import parse_task

SLOWER = 0.10
SHARE = 0.95


@dataclass(frozen=True)
class Slowed:
    """Asks, and waits for a tenth of what that took."""

    ask: Ask

    def __call__(self, number: int, scheduled: float) -> Observation:
        seen = self.ask(number, scheduled)
        time.sleep(SLOWER * (seen.ended - seen.sent))
        return replace(seen, ended=time.perf_counter())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--task", default="t2i", help="(%(default)s)")
    parser.add_argument("--repetitions", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="of a run (%(default)s)")
    args = parser.parse_args()
    extent, verdicts, ratios = Extent(args.seconds, args.rounds), Counter(), {}
    with in_process(args.bundle, slots=1, threads=None, backend="auto", queue_size=8) as target:
        asker = Asker(target.client, Workload(parse_task(args.task)), target.info)
        asker.check()
        warmed(asker, 40)

        def rounds(ask: Ask) -> list[list[float]]:
            seen = scenarios.single_stream(ask, extent)
            return [[each.latency for each in one] for one in seen]

        for repetition in range(args.repetitions):
            first, same, slow = rounds(asker), rounds(asker), rounds(Slowed(asker))
            for name, other in (("same", same), ("slowed", slow)):
                found = compare.compare(first, other)
                verdicts[f"{name}: {found.verdict}"] += 1
                ratios.setdefault(name, []).append(found.ratio)
                interval = f"{found.low:.3f} .. {found.high:.3f}"
                print(f"{repetition} {name}: {found.verdict}, {found.ratio:.3f} ({interval})")
    least = math.ceil(SHARE * args.repetitions)
    holds = {
        "the same build: no difference": verdicts["same: no difference"] >= least,
        "a tenth slower: found": verdicts["slowed: slower"] >= least,
    }
    settings = {"task": args.task, "seconds": args.seconds, "rounds": args.rounds}
    report = {
        "settings": settings,
        "repetitions": args.repetitions,
        "verdicts": dict(verdicts),
        "ratios": ratios,
        "holds": holds,
        "hardware": hardware(2),
    }
    print(json.dumps(report))
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
