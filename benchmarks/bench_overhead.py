"""What measuring costs: requests with all of `nuwa bench`'s instruments on, and in a bare loop.

In one process, rounds of the one and of the other take turns, so that what drifts falls on both.
With instruments: observations, the hook of decode steps, the sampler. The overhead is what the
ratios of a round with to one without lie around, less 1, by Wilcoxon's signed-rank test of all
pairs. It must stay below 1 %. The last line is JSON.

    python benchmarks/bench_overhead.py BUNDLE --task t2i
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path

from hardware import hardware

from nuwa.runtime.bench.asking import Asker
from nuwa.runtime.bench.running import warmed
from nuwa.runtime.bench.sampler import Sampler
from nuwa.runtime.bench.statistics import signed_rank_interval
from nuwa.runtime.bench.workload import Workload
from nuwa.runtime.client import LocalClient
from nuwa.runtime.engine import Engine, load_engine
from nuwa.spec.tasks import parse_task

MOST = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--task", default="t2i")
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--round-seconds", type=float, default=1.0, help="about")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    workload = Workload(parse_task(options.task))
    pairs: list[tuple[float, float]] = []
    engine = load_engine(options.bundle, slots=1, threads=options.threads)
    with LocalClient(engine, queue_size=4) as client:
        asker = Asker(client, workload, engine.info)
        warmed(asker, 20)
        requests = max(1, math.ceil(options.round_seconds / bare(engine, asker, 3)))
        until = time.perf_counter() + options.seconds
        while time.perf_counter() < until:
            first = len(pairs) % 2  # who begins takes turns, too
            taken = [0.0, 0.0]
            for instruments in (first, 1 - first):
                taken[instruments] = (measured if instruments else bare)(engine, asker, requests)
            pairs.append((taken[0], taken[1]))
    ratios = [math.log(with_all / without) for without, with_all in pairs]
    found = signed_rank_interval(ratios)
    if found is None:
        parser.error(f"--seconds {options.seconds}: too few for an interval")
    middle, low, high = (math.expm1(each) for each in found)
    report = {
        "hardware": hardware(options.threads),
        "bundle": options.bundle.name,
        "task": options.task,
        "pairs": len(pairs),
        "requests": requests,
        "seconds_bare": statistics.median(without for without, _ in pairs),
        "seconds_measured": statistics.median(with_all for _, with_all in pairs),
        "overhead": middle,
        "overhead_interval": [low, high],
        "most": MOST,
    }
    print(
        f"{len(pairs)} pairs of rounds: measuring costs {100 * middle:.2f} % "
        f"({100 * low:.2f} .. {100 * high:.2f})"
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    return 0


def measured(engine: Engine, asker: Asker, requests: int) -> float:
    """Seconds of a request as `nuwa bench` asks for it."""
    steps: list[tuple[int, float]] = []
    engine.on_step = lambda rows, seconds: steps.append((rows, seconds))
    sampler = Sampler()
    sampler.start()
    began = time.perf_counter()
    for number in range(requests):
        assert asker(number, time.perf_counter()).ok
    sampler.stop()  # with the look that a longer run would take by now
    engine.on_step = None
    return (time.perf_counter() - began) / requests


def bare(engine: Engine, asker: Asker, requests: int) -> float:
    """Seconds of the same request by the client alone."""
    queries = [asker.workload.query(number, asker.info) for number in range(requests)]
    began = time.perf_counter()
    for query in queries:
        if query.task.is_video:
            for _ in asker.client.stream_video(query.task, query.prompt, **query.options):
                pass
        else:
            asker.client.generate_image(query.task, query.prompt, **query.options)
    return (time.perf_counter() - began) / requests


if __name__ == "__main__":
    raise SystemExit(main())
