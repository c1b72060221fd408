"""The four scenarios of MLPerf Inference: in what order, and when, requests are sent.

Source: MLCommons' inference rules (github.com/mlcommons/inference_policies). Each runs in rounds,
of which results tell apart what differs within a machine's minute from what differs between them;
where another run takes turns with it, a round is one turn. Queries are built before they are due:
what that takes is the benchmark's, and no latency. Ctrl-C ends each with Interrupted, which has
what was observed until then.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count

from .asking import Ask, prepared
from .observation import Observation, together
from .turns import Turns

MOST_IN_FLIGHT = 512  # of the server scenario, before requests wait for a thread of ours
BACK_OFF = 0.05  # seconds after a request that failed
RAMP = 0.1  # of the time, before answers count for throughput
REFUSED = ("QUEUE_FULL", "RESOURCE_EXHAUSTED")  # of a server that has too much to do

Rounds = list[list[Observation]]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in the middle of a scenario. rounds: what was observed until then; throughput: of it,
    where the scenario is about that.
    """

    def __init__(self, rounds: Rounds, throughput: Throughput | None = None) -> None:
        super().__init__()
        self.rounds, self.throughput = rounds, throughput


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


def single_stream(ask: Ask, extent: Extent, first: int = 0, turns: Turns | None = None) -> Rounds:
    """The next query is sent when the one before is answered."""
    numbers = count(first)
    with workers(1) as pool:

        def query() -> Observation:
            send = prepared(ask, next(numbers))
            return pool.submit(lambda: send(time.perf_counter())).result()

        return _in_rounds(extent, query, turns)


def multi_stream(
    ask: Ask, extent: Extent, streams: int, first: int = 0, turns: Turns | None = None
) -> Rounds:
    """A query is `streams` requests at once; it is answered when all of them are."""
    numbers = count(first)
    with workers(streams) as pool:

        def query() -> Observation:
            sends = [prepared(ask, next(numbers)) for _ in range(streams)]
            now = time.perf_counter()
            calls = [pool.submit(send, now) for send in sends]
            return together([call.result() for call in calls])

        return _in_rounds(extent, query, turns)


@contextmanager
def workers(most: int) -> Iterator[ThreadPoolExecutor]:
    """Who sends requests is never the main thread, even where there is one at a time: Ctrl-C in
    the middle of a call can leave gRPC's channel such that closing it waits forever. Who is under
    way in the end is not waited for; closing the channel ends it.
    """
    pool = ThreadPoolExecutor(most, "nuwa-bench")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _in_rounds(
    extent: Extent, query: Callable[[], Observation], turns: Turns | None = None
) -> Rounds:
    rounds: Rounds = []
    try:
        for each in (turns or Turns()).rounds(extent):
            seen: list[Observation] = []
            rounds.append(seen)
            began = time.perf_counter()
            while each.lasts(began, len(seen)):
                seen.append(query())
                _back_off(seen[-1])
    except KeyboardInterrupt:
        raise Interrupted(rounds) from None
    return rounds


def in_parts(seen: Sequence[Observation], rounds: int) -> Rounds:
    """Rounds of equally many, but for the last."""
    size = -(-len(seen) // rounds) or 1
    return [list(seen[at : at + size]) for at in range(0, len(seen), size)]


def _back_off(seen: Observation) -> None:
    """Who was refused, or found nobody, does not ask again at once."""
    if not seen.ok:
        time.sleep(BACK_OFF)


@dataclass(frozen=True)
class Throughput:
    """rate: answers a second; rates: the same of each round with an answer, in turns of each, 0
    without one; rounds: what ended in the time that counts; beside: what ended before or after;
    outstanding: requests under way in the end, fewer than there were where some were refused.
    """

    rate: float
    rates: list[float]
    rounds: Rounds
    beside: list[Observation] = field(default_factory=list)
    outstanding: int | None = None


def offline(
    ask: Ask, extent: Extent, outstanding: int, first: int = 0, ramp: float = RAMP
) -> Throughput:
    """As many answers as there can be, with `outstanding` requests under way.

    MLPerf's Offline sends all samples at once, and the system has them all to choose from. A server
    with a queue of some length would refuse most of them; here the next request is sent when one is
    answered, a closed loop, which gives the same throughput if `outstanding` keeps the server busy.
    A server that refuses requests all the same has too many: who is refused asks no more, until
    none is, or one is left.

    It lasts for the extent's seconds after a ramp, longer if fewer than `least` ended in these.
    """
    numbers, over = count(first), threading.Event()
    seen: list[Observation] = []
    lock, workers = threading.Lock(), outstanding
    began = time.perf_counter()
    start = began + ramp * extent.seconds
    end = start + extent.seconds
    last = None if extent.most is None else first + extent.most
    counted = 0

    def work() -> None:
        nonlocal counted, end, workers
        while not over.is_set() and (time.perf_counter() < end or counted < extent.least):
            with lock:
                number = next(numbers)
            if last is not None and number >= last:
                return
            one = prepared(ask, number)(time.perf_counter())
            with lock:
                seen.append(one)
                counted += one.ended >= start
                if counted <= extent.least:
                    end = max(end, math.nextafter(one.ended, math.inf))
                if one.status in REFUSED and workers > 1:
                    workers -= 1
                    return
            _back_off(one)

    def found() -> Throughput:
        with lock:
            at, until = list(seen), end
        return replace(sliced(at, began, start, until, extent.rounds), outstanding=workers)

    threads = [
        threading.Thread(target=work, name="nuwa-bench", daemon=True) for _ in range(outstanding)
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        end = min(end, time.perf_counter())
        throughput = found()
        raise Interrupted(throughput.rounds, throughput) from None
    finally:
        over.set()
    return found()


def offline_in_turns(
    ask: Ask, extent: Extent, outstanding: int, turns: Turns, first: int = 0
) -> Throughput:
    """Each round an offline run of its own, all of whose time counts, as it begins with nothing
    under way. The rate is the mean of theirs.
    """
    parts: list[Throughput] = []
    try:
        for each in turns.rounds(extent):
            asked = sum(len(part.rounds[0]) + len(part.beside) for part in parts)
            parts.append(offline(ask, each, outstanding, first + asked, ramp=0.0))
            outstanding = parts[-1].outstanding or outstanding
    except Interrupted as ended:
        assert ended.throughput is not None, "offline says it"
        found = _joined([*parts, ended.throughput])
        raise Interrupted(found.rounds, found) from None
    except KeyboardInterrupt:
        found = _joined(parts)
        raise Interrupted(found.rounds, found) from None
    return _joined(parts)


def _joined(parts: Sequence[Throughput]) -> Throughput:
    parts = [part for part in parts if part.rounds[0] or part.beside]
    rates = [part.rate for part in parts]
    return Throughput(
        sum(rates) / len(rates) if rates else 0.0,
        rates,
        [part.rounds[0] for part in parts],
        [each for part in parts for each in part.beside],
        parts[-1].outstanding if parts else None,
    )


def sliced(
    seen: Sequence[Observation], began: float, start: float, end: float, rounds: int
) -> Throughput:
    """By when they ended. A rate is from the last answer before a round to the last one of it, so
    that it does not depend on where the round's edge falls between two answers; or, where there is
    no ramp, from when it began with nothing under way.

    Where fewer than two answers came after the ramp, that is all there were over all the time.
    """
    inorder = sorted(seen, key=lambda each: each.ended)
    answers = [each.ended for each in inorder if each.ok]
    before = [moment for moment in answers if moment < start]
    inside = [moment for moment in answers if start <= moment < end]
    base = start
    if start > began and (before or inside):
        base = before[-1] if before else inside[0]
    if len(inside) < 2 or inside[-1] <= base:
        taken = answers[-1] - began if answers else 0.0
        rate = len(answers) / taken if taken else 0.0
        return Throughput(rate, [], [inorder])
    length = (end - start) / rounds
    slices: Rounds = [[] for _ in range(rounds)]
    beside = []
    for each in inorder:
        index = int((each.ended - start) // length)
        if start <= each.ended < end:
            slices[min(index, rounds - 1)].append(each)
        else:
            beside.append(each)
    rates, earlier = [], base
    for part in slices:
        ended = [each.ended for each in part if each.ok and each.ended > base]
        if ended and ended[-1] > earlier:
            rates.append(len(ended) / (ended[-1] - earlier))
            earlier = ended[-1]
    counted = sum(moment > base for moment in inside)
    return Throughput(counted / (inside[-1] - base), rates, slices, beside)


def achieved(seen: Sequence[Observation], rounds: int) -> Throughput:
    """Answers a second of requests that came at a rate of their own: until the last was due, as
    later there are no new ones, and after a ramp, in which there are no old ones.
    """
    began = min(each.scheduled for each in seen)
    until = max(each.scheduled for each in seen)
    return sliced(seen, began, began + RAMP * (until - began), until, rounds)


More = Callable[[list[Observation], float], float]


def server(
    ask: Ask, extent: Extent, rate: float, seed: int, first: int = 0, more: More | None = None
) -> Rounds:
    """Poisson arrivals, `rate` a second, sent when they are due, however many are under way.

    more: called when the last was due, with all until then and the time; says for how many seconds
    to go on, 0 for no more. Who is still under way then is told as if it ended at that moment.
    """
    draw = random.Random(seed)
    calls: list[tuple[float, Future[Observation]]] = []
    began = time.perf_counter()
    with workers(MOST_IN_FLIGHT) as pool:
        try:
            due = list(arrivals(rate, extent, draw))
            while due:
                for moment in due:
                    scheduled, send = began + moment, prepared(ask, first + len(calls))
                    time.sleep(max(0.0, scheduled - time.perf_counter()))
                    calls.append((scheduled, pool.submit(send, scheduled)))
                began += len(due) / rate
                left = None if extent.most is None else extent.most - len(calls)
                seconds = 0.0 if more is None or left == 0 else more(*_until_now(calls))
                part = Extent(seconds, 1, 0, left)
                due = list(arrivals(rate, part, draw)) if seconds else []
            seen = [call.result() for _, call in calls]
        except KeyboardInterrupt:  # who is under way may be so for long, or for ever
            done = [call.result() for _, call in calls if call.done()]
            raise Interrupted(in_parts(done, extent.rounds)) from None
    return in_parts(seen, extent.rounds)


def _until_now(calls: list[tuple[float, Future[Observation]]]) -> tuple[list[Observation], float]:
    now = time.perf_counter()
    return [
        call.result() if call.done() else Observation(scheduled, scheduled, now)
        for scheduled, call in calls
    ], now


def arrivals(rate: float, extent: Extent, seed: int | random.Random) -> Iterator[float]:
    """Seconds from the start; the same for the same seed.

    As many as `rate` says for the time, and those at random: what a Poisson process is if it has so
    many. Left to chance their number would scatter, by 3 % of 1000, and with it the rate.
    """
    draw = seed if isinstance(seed, random.Random) else random.Random(seed)
    number = max(round(rate * extent.seconds), extent.least)
    if extent.most is not None:
        number = min(number, extent.most)
    gaps = [draw.expovariate(1.0) for _ in range(number + 1)]
    scale, moment = number / rate / sum(gaps), 0.0
    for gap in gaps[:-1]:
        moment += gap * scale
        yield moment
