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

    def each(self) -> Extent:
        """That of one round."""
        share = -(-self.least // self.rounds)
        most = None if self.most is None else max(1, self.most // self.rounds)
        return Extent(self.seconds / self.rounds, 1, share, most)

    def lasts(self, began: float, done: int) -> bool:
        if self.most is not None and done >= self.most:
            return False
        return done < self.least or time.perf_counter() - began < self.seconds


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
    rounds, each = [], extent.each()
    for _ in range(extent.rounds):
        seen: list[Observation] = []
        began = time.perf_counter()
        while each.lasts(began, len(seen)):
            seen.append(query())
        rounds.append(seen)
    return rounds


@dataclass(frozen=True)
class Throughput:
    """Answers a second in each round, and all that was observed after the ramp."""

    rates: list[float]
    rounds: Rounds


def offline(ask: Ask, extent: Extent, outstanding: int, first: int = 0) -> Throughput:
    """As many answers as there can be, with always `outstanding` requests under way."""
    numbers, seen, lock = count(first), [], threading.Lock()
    began = time.perf_counter()
    start = began + RAMP * extent.seconds
    end = start + extent.seconds

    def work() -> None:
        while time.perf_counter() < end:
            with lock:
                number = next(numbers)
            seen.append(ask(number, time.perf_counter()))  # of lists, safe among threads

    threads = [threading.Thread(target=work, name="nuwa-bench") for _ in range(outstanding)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _sliced(seen, start, end, extent.rounds)


def _sliced(seen: list[Observation], start: float, end: float, rounds: int) -> Throughput:
    """By when they ended. A rate is from the last answer of a round before to the last of it, so
    that it does not depend on where the round's edge falls between two answers.
    """
    length = (end - start) / rounds
    slices: Rounds = [[] for _ in range(rounds)]
    for each in sorted(seen, key=lambda one: one.ended):
        index = int((each.ended - start) // length)
        if 0 <= index < rounds:
            slices[index].append(each)
    rates = []
    before = max((one.ended for one in seen if one.ok and one.ended < start), default=start)
    for part in slices:
        answered = [one.ended for one in part if one.ok]
        if answered and answered[-1] > before:
            rates.append(len(answered) / (answered[-1] - before))
            before = answered[-1]
        else:
            rates.append(0.0)
    return Throughput(rates, slices)


def server(ask: Ask, extent: Extent, rate: float, seed: int, first: int = 0) -> Rounds:
    """Poisson arrivals, `rate` a second, sent when they are due, however many are under way."""
    due = list(arrivals(rate, extent, seed))
    with ThreadPoolExecutor(MOST_IN_FLIGHT, "nuwa-bench") as pool:
        calls, began = [], time.perf_counter()
        for number, moment in enumerate(due, first):
            scheduled = began + moment
            time.sleep(max(0.0, scheduled - time.perf_counter()))
            calls.append(pool.submit(ask, number, scheduled))
        seen = [call.result() for call in calls]
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
