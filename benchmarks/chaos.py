"""Clients that behave badly: `python benchmarks/chaos.py BUNDLE --requests 10000`.

Client processes (chaos_client.py) ask a server process for images, images with previews, and clips:
over nuwa.v1, and 30 % of them over streams of KServe v2, which may ask for two at a time. Of their
requests 30 % are cancelled, cut off with their connection, given a deadline that is too short, or
not read, or are beside one in their stream that has too little time; now and then a whole client
process is killed. Every answer that arrives is compared, tokens and pixels, with what nuwa.v1 gave
for the same when the server was quiet. In the end no slot may be taken, nothing may wait,
memory may not grow any more in the second half (it does while threads come to be and the
allocator's pools fill), cancellations must have had their effect within a step and 20 ms (p95 of
both, by the server's own histograms), and some of those who do not read must have been cut off, by
the server's log. The last line is JSON; exit status 1 if something does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import queue
import random
import signal
import sys
import time
from collections import Counter
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
from chaos_client import (
    AT_A_TIME,
    RIGHT,
    SLOW_READER_TIMEOUT,
    OverKServe,
    OverV1,
    Place,
    find_place,
    references,
    run_client,
)
from hardware import hardware
from server_process import ServerProcess

CLIENTS = 4
KILLED_EVERY = 5.0  # seconds
LATE_SECONDS = 0.020  # that a cancellation may take beside a step
MOST_GROWTH = 0.005  # of memory, in 1000 requests of the second half, by a line through it
QUEUES = 4 * CLIENTS  # of clients, the latest, that are read
READINGS = 60  # of memory, that are kept
CUT = "its reader took nothing"  # how the log tells of who does not read
SURE = 20  # readers of streams that do not read, one of which at least is cut off

GOOD = {over.PREFIX + RIGHT for over in (OverV1, OverKServe)}
KNOWN = GOOD | {over.PREFIX + kind for over in (OverV1, OverKServe) for kind in over.KINDS}


def drive(
    server: ServerProcess, place: Place, requests: int
) -> tuple[Counter[str], list[float], int]:
    """(what became of requests, memory on the way, clients killed)."""
    expected = asyncio.run(references(place))
    spawn = multiprocessing.get_context("spawn")
    counts: Counter[str] = Counter()
    memory: list[float] = []
    draw, started, killed, clients = random.Random(0), 0, 0, []
    next_kill = time.monotonic() + KILLED_EVERY
    queues: list[Queue] = []
    while sum(counts.values()) < requests:
        while len(clients) < CLIENTS:
            # A queue of its own: who is killed while it writes would leave a common one locked.
            done, told = spawn.Event(), spawn.Queue()
            queues.append(told)
            share = max(AT_A_TIME, requests // (4 * CLIENTS))
            arguments = (place, share, started, expected, told, done)
            process = spawn.Process(target=run_client, args=arguments, daemon=True)
            process.start()
            clients.append((process, done))
            started += 1
        for told in queues:
            with contextlib.suppress(queue.Empty):
                while True:
                    counts[told.get(timeout=0.001)] += 1
        if time.monotonic() > next_kill:
            victim, done = draw.choice(clients)
            if victim.is_alive() and not done.is_set():
                os.kill(victim.pid, signal.SIGKILL)
                killed += 1
            next_kill = time.monotonic() + KILLED_EVERY
        clients = [(process, done) for process, done in clients if process.is_alive()]
        queues = queues[-QUEUES:]
        memory.append(server.resident_megabytes)
        time.sleep(0.2)
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.process.returncode}")
    for process, _ in clients:
        process.kill()
    return counts, memory, killed


def growth(memory: list[float], requests: int) -> float:
    """Megabytes in 1000 requests, of the line through the second half of the readings."""
    half = memory[len(memory) // 2 :]
    at = np.linspace(0.0, requests / 2 / 1000, len(half))
    return float(np.polyfit(at, half, 1)[0])


def percentile(metrics_text: str, name: str, share: float) -> float:
    """Within the bucket that holds it, as Prometheus' histogram_quantile."""
    buckets = []
    for line in metrics_text.splitlines():
        if line.startswith(f"{name}_bucket"):
            bound = line.partition('le="')[2].partition('"')[0]
            buckets.append((float(bound), float(line.rpartition(" ")[2])))
    wanted = share * buckets[-1][1] if buckets else 0.0
    low = below = 0.0
    for bound, count in buckets:
        if wanted and count >= wanted:
            return low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    return 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=10_000, help="(%(default)s)")
    parser.add_argument("--slots", type=int, default=4, help="(%(default)s)")
    args = parser.parse_args()
    settings = {
        "slots": args.slots,
        "queue_size": 64,
        "slow_reader_timeout": SLOW_READER_TIMEOUT,
    }
    started = time.perf_counter()
    with ServerProcess(args.bundle, **settings) as server:
        place = asyncio.run(find_place(server.address))
        counts, memory, killed = drive(server, place, args.requests)
        end = time.monotonic() + 30
        while any(server.gauges().values()) and time.monotonic() < end:
            time.sleep(0.2)
        left, text = server.gauges(), server.metrics_text()
        again = asyncio.run(references(place)) == asyncio.run(references(place))
        log, status = server.log_text(), server.stop()
    cut, streams_cut = log.count(CUT), log.count(f"a stream: {CUT}")
    step = percentile(text, "nuwa_step_duration_seconds", 0.95)
    cancel = percentile(text, "nuwa_cancel_latency_seconds", 0.95)
    grown, median = growth(memory, sum(counts.values())), float(np.median(memory))
    holds = {
        "nothing is left": not any(left.values()),
        "answers are right": set(counts) <= KNOWN and all(counts[each] for each in GOOD),
        "memory is flat": grown <= median * MOST_GROWTH,
        "cancelled within a step and 20 ms (p95)": 0 < cancel <= step + LATE_SECONDS,
        "who does not read is cut off": cut > 0
        and (streams_cut > 0 or counts[f"{OverKServe.PREFIX}slow reader"] < SURE),
        "it serves on, and ends when told": again and status == 0,
    }
    report = {
        "requests": sum(counts.values()),
        "outcomes": dict(counts),
        "clients_killed": killed,
        "readers_cut_off": cut,
        "of_them_streams": streams_cut,
        "left": left,
        "megabytes": {"median": median, "peak": max(memory), "growth_in_1000_requests": grown},
        "megabytes_on_the_way": [
            round(float(part[-1]), 1) for part in np.array_split(memory, READINGS) if len(part)
        ],
        "cancel_p95": cancel,
        "step_p95": step,
        "seconds": time.perf_counter() - started,
        "settings": settings,
        "holds": holds,
        "hardware": hardware(2),
    }
    print(json.dumps(report))
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
