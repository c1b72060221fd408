"""The four scenarios of MLPerf Inference: in what order, and when, requests are sent.

Source: MLCommons' inference rules (github.com/mlcommons/inference_policies). Each runs in rounds,
of which results tell apart what differs within a machine's minute from what differs between them.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

from .asking import Ask
from .observation import Observation, together

MOST_IN_FLIGHT = 512  # of the server scenario, before requests wait for a thread of ours
BACK_OFF = 0.05  # seconds after a request that failed
RAMP = 0.1  # of the offline scenario's time, before answers count

Rounds = list[list[Observation]]


@dataclass(frozen=True)
class Extent:
    """How long to go on: for `seconds`, but for `least` queries at least and `most` at most, all in
    `rounds` rounds.
    """

    seconds: float
    rounds: int = 10
    least: int = 1
    most: int | None = None

    def each(self) -> Iterator[Extent]:
        """Those of the rounds, which together are this one; a round may have no queries."""
        for index in range(self.rounds):
            least = _share(self.least, index, self.rounds)
            most = None if self.most is None else _share(self.most, index, self.rounds)
            yield Extent(self.seconds / self.rounds, 1, least, most)

    def lasts(self, began: float, done: int) -> bool:
        if self.most is not None and done >= self.most:
            return False
        return done < self.least or time.perf_counter() - began < self.seconds


def _share(total: int, index: int, parts: int) -> int:
    return total * (index + 1) // parts - total * index // parts


def single_stream(ask: Ask, extent: Extent, first: int = 0) -> Rounds:
    """The next query is sent when the one before is answered."""
    numbers = count(first)
    return _in_rounds(extent, lambda: ask(next(numbers), time.perf_counter()))


def multi_stream(ask: Ask, extent: Extent, streams: int, first: int = 0) -> Rounds:
    """A query is `streams` requests at once; it is answered when all of them are."""
    numbers = count(first)
    with ThreadPoolExecutor(streams, "nuwa-bench") as pool:

        def query() -> Observation:
            now = time.perf_counter()
            calls = [pool.submit(ask, next(numbers), now) for _ in range(streams)]
            return together([call.result() for call in calls])

        return _in_rounds(extent, query)


def _in_rounds(extent: Extent, query: Callable[[], Observation]) -> Rounds:
    rounds = []
    for each in extent.each():
        seen: list[Observation] = []
        began = time.perf_counter()
        while each.lasts(began, len(seen)):
            seen.append(query())
            _back_off(seen[-1])
        rounds.append(seen)
    return rounds


def _back_off(seen: Observation) -> None:
    """Who was refused, or found nobody, does not ask again at once."""
    if not seen.ok:
        time.sleep(BACK_OFF)


@dataclass(frozen=True)
class Throughput:
    """rate: answers a second; rates: the same of each round with an answer; rounds: all that was
    observed after the ramp.
    """

    rate: float
    rates: list[float]
    rounds: Rounds


def offline(ask: Ask, extent: Extent, outstanding: int, first: int = 0) -> Throughput:
    """As many answers as there can be, with always `outstanding` requests under way.

    `least` of the extent does not count here.
    """
    numbers, over = count(first), threading.Event()
    seen: list[Observation] = []
    lock = threading.Lock()
    began = time.perf_counter()
    start = began + RAMP * extent.seconds
    end = start + extent.seconds
    last = None if extent.most is None else first + extent.most

    def work() -> None:
        while time.perf_counter() < end and not over.is_set():
            with lock:
                number = next(numbers)
            if last is not None and number >= last:
                return
            seen.append(ask(number, time.perf_counter()))  # of lists, safe among threads
            _back_off(seen[-1])

    threads = [
        threading.Thread(target=work, name="nuwa-bench", daemon=True) for _ in range(outstanding)
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        over.set()
    return sliced(seen, began, start, end, extent.rounds)


def sliced(
    seen: list[Observation], began: float, start: float, end: float, rounds: int
) -> Throughput:
    """By when they ended. A rate is from the last answer before a round to the last one of it, so
    that it does not depend on where the round's edge falls between two answers.

    Where fewer than two answers came after the ramp, that is all there were over all the time.
    """
    answers = sorted(each.ended for each in seen if each.ok)
    before = [moment for moment in answers if moment < start]
    inside = [moment for moment in answers if start <= moment < end]
    base = before[-1] if before else inside[0] if inside else start
    if len(inside) < 2 or inside[-1] <= base:
        rate = len(answers) / (answers[-1] - began) if answers else 0.0
        return Throughput(rate, [], [sorted(seen, key=lambda each: each.ended)])
    length = (end - start) / rounds
    slices: Rounds = [[] for _ in range(rounds)]
    for each in sorted(seen, key=lambda one: one.ended):
        index = int((each.ended - start) // length)
        if 0 <= index < rounds:
            slices[index].append(each)
    rates, earlier = [], base
    for part in slices:
        ended = [each.ended for each in part if each.ok and each.ended > base]
        if ended:
            rates.append(len(ended) / (ended[-1] - earlier))
            earlier = ended[-1]
    counted = sum(moment > base for moment in inside)
    return Throughput(counted / (inside[-1] - base), rates, slices)


def server(ask: Ask, extent: Extent, rate: float, seed: int, first: int = 0) -> Rounds:
    """Poisson arrivals, `rate` a second, sent when they are due, however many are under way."""
    due = list(arrivals(rate, extent, seed))
    pool = ThreadPoolExecutor(MOST_IN_FLIGHT, "nuwa-bench")
    try:
        calls, began = [], time.perf_counter()
        for number, moment in enumerate(due, first):
            scheduled = began + moment
            time.sleep(max(0.0, scheduled - time.perf_counter()))
            calls.append(pool.submit(ask, number, scheduled))
        seen = [call.result() for call in calls]
    finally:
        pool.shutdown(cancel_futures=True)
    size = -(-len(seen) // extent.rounds) or 1
    return [seen[at : at + size] for at in range(0, len(seen), size)]


def arrivals(rate: float, extent: Extent, seed: int) -> Iterator[float]:
    """Seconds from the start; the same for the same seed."""
    draw, moment, done = random.Random(seed), 0.0, 0
    while True:
        moment += draw.expovariate(rate)
        if (extent.most is not None and done >= extent.most) or (
            moment > extent.seconds and done >= extent.least
        ):
            return
        yield moment
        done += 1
