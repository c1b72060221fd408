"""The search for the highest rate, on simulated queues whose highest rate is known."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from nuwa.runtime.bench import figures, running, scenarios, search, serving, statistics, verdict
from nuwa.runtime.bench.observation import Observation
from nuwa.runtime.bench.running import Settings
from nuwa.runtime.bench.scenarios import Extent, Interrupted
from nuwa.runtime.bench.search import Found, Point
from nuwa.runtime.bench.targets import IN_PROCESS, Target
from nuwa.runtime.bench.workload import Workload
from nuwa.spec.tasks import Task

REPETITIONS = 10


@dataclass
class Queue:
    """First come, first served, by `servers`, each with `draw()` seconds of work a request; in a
    time of its own. room: how many may wait. asked: the time that each rate took.
    """

    draw: Callable[[], float]
    servers: int = 1
    room: int | None = None
    asked: dict[float, float] = field(default_factory=dict)
    seed: int = 0

    def run(self, due: Iterable[float], free: list[float]) -> Iterator[Observation]:
        """free: when each of the servers is, which is kept up."""
        starts: deque[float] = deque()
        for moment in due:
            if self.room is not None:
                while starts and starts[0] <= moment:
                    starts.popleft()
                if len(starts) > self.room:
                    yield Observation(moment, moment, moment, "QUEUE_FULL")
                    continue
            start = max(moment, heapq.heappop(free))
            starts.append(start)
            end = start + self.draw()
            heapq.heappush(free, end)
            yield Observation(moment, moment, end)

    def offline(self, ask, extent, outstanding, first=0):
        count = 2000
        rate = self.servers / (sum(self.draw() for _ in range(count)) / count)
        return scenarios.Throughput(rate, [], [])

    def server(self, ask, extent, rate, seed, first=0, more=None):
        """As scenarios.server, in no time."""
        draw, seen, began = random.Random(1000 * self.seed + seed), [], 0.0
        free, part = [0.0] * self.servers, extent
        while True:
            block = [began + moment for moment in scenarios.arrivals(rate, part, draw)]
            began += len(block) / rate
            seen += self.run(block, free)
            now, seconds = block[-1], 0.0
            if more is not None:
                seconds = more(
                    [
                        each if each.ended <= now else Observation(each.scheduled, each.sent, now)
                        for each in seen
                    ],
                    now,
                )
            if not seconds:
                self.asked[rate] = began
                return scenarios.in_parts(seen, extent.rounds)
            part = Extent(seconds, 1, 0)


RANDOM = random.Random()


def uniform(mean: float):
    return lambda: RANDOM.uniform(0.5 * mean, 1.5 * mean)


def exponential(mean: float):
    return lambda: RANDOM.expovariate(1 / mean)


def always(mean: float):
    return lambda: mean


def searched(queue: Queue, settings: Settings, monkeypatch, say=lambda text: None) -> running.Seen:
    RANDOM.seed(f"work {queue.seed}")
    monkeypatch.setattr(scenarios, "server", queue.server)
    monkeypatch.setattr(scenarios, "offline", queue.offline)
    target = Target(None, None, IN_PROCESS, None, 1, None)
    return serving.serve(None, target, settings, 2, 0, say)


def settings_of(bound: float, share: float, seconds: float, **other) -> Settings:
    return Settings("server", Extent(seconds), bound=bound, share=share, **other)


def true_rate(queue: Queue, capacity: float, bound: float, share: float) -> float:
    """Of a run that is long enough for no doubt."""
    low, high = 0.0, capacity
    for _ in range(9):
        middle = (low + high) / 2
        RANDOM.seed(8)
        arrivals = list(scenarios.arrivals(middle, Extent(100_000 / middle), 7))
        seen = list(queue.run(arrivals, [0.0] * queue.servers))
        late = sum(each.latency > bound for each in seen) / len(seen)
        low, high = (middle, high) if late <= 1 - share else (low, middle)
    return low


CASES = {
    "M/M/1": (Queue(exponential(0.05)), 20.0, 0.2, 0.8, 60.0),
    "M/G/1": (Queue(uniform(0.05)), 20.0, 0.2, 0.9, 60.0),
    "M/D/1": (Queue(always(0.05)), 20.0, 0.5, 0.9, 60.0),
    "M/D/3": (Queue(always(0.15), servers=3), 20.0, 0.3, 0.9, 60.0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_highest_rate_of_a_queue_is_found(case, monkeypatch):
    """Within a few percent in nearly all repetitions, and in the interval in most of them."""
    queue, capacity, bound, share, seconds = CASES[case]
    truth = true_rate(queue, capacity, bound, share)
    assert 0.4 * capacity < truth < capacity
    lows, spans = [], []
    for repetition in range(REPETITIONS):
        queue.seed = repetition
        seen = searched(queue, settings_of(bound, share, seconds), monkeypatch)
        found = seen.search
        lows.append(found["low"] / truth)
        spans.append(found["low"] <= 1.03 * truth and 0.97 * truth <= found["high"])
        best = [each for each in seen.load if each["best"]]
        assert [each["rate"] for each in best] == [found["low"]]
        assert best[0]["met"] and best[0]["sustained"]
        assert best[0]["achieved"] == pytest.approx(found["low"], rel=0.05)
        assert found["low"] < capacity
    assert sum(0.9 < each < 1.05 for each in lows) >= REPETITIONS - 2, sorted(lows)
    assert np.median(lows) == pytest.approx(1, abs=0.05)
    assert sum(spans) >= REPETITIONS - 2


@pytest.mark.parametrize(("seconds", "bound"), [(4.0, 3.0), (30.0, 10.0), (60.0, 10.0)])
@pytest.mark.parametrize("share", [0.8, 0.99])
def test_no_rate_beyond_what_the_system_can_do(seconds, bound, share, monkeypatch):
    """However wide the bound is beside the time that was asked for."""
    for repetition in range(2):
        queue = Queue(always(0.05), seed=repetition)
        seen = searched(queue, settings_of(bound, share, seconds), monkeypatch)
        assert 0.85 * 20 < seen.search["low"] < 20.2
        assert seen.search["high"] is None or seen.search["high"] > 19
        (best,) = [each for each in seen.load if each["best"]]
        assert best["achieved"] == pytest.approx(best["rate"], rel=0.03)
        for each in seen.load:
            assert not (each["rate"] > 20.2 and (each["met"] or each["sustained"])), each
        if verdict.LONG * bound > seconds:
            assert any("10 times the bound" in note for note in seen.notes)


def test_who_refuses_does_not_keep_up(monkeypatch):
    """A short queue keeps latency low; a fifth may miss a bound of p80, but not go unserved."""
    queue = Queue(always(0.05), room=2)
    seen = searched(queue, settings_of(1.0, 0.8, 120.0), monkeypatch)
    assert seen.search["low"] < 20
    refused = [each for each in seen.load if each["rate"] > 19]
    assert refused and not any(each["met"] for each in refused)


def test_a_rate_that_is_given_is_told_to_grow_or_to_be_short(monkeypatch):
    def given(rate: float, bound: float, seconds: float) -> running.Seen:
        return searched(
            Queue(always(0.05)), settings_of(bound, 0.8, seconds, rate=rate), monkeypatch
        )

    grown = given(25.0, 3.0, 60.0)
    (point,) = grown.load
    assert point["met"] is False and not point["sustained"]
    assert point["growth"] == pytest.approx(0.25, rel=0.1), "25 of 20"
    assert point["achieved"] == pytest.approx(20, rel=0.02)
    assert any("queue grew at 25" in note for note in grown.notes)
    short = given(15.0, 10.0, 20.0)
    assert short.load[0]["met"] is None and any("Too short" in note for note in short.notes)
    assert short.search is None
    fine = given(15.0, 3.0, 60.0)
    assert fine.load[0]["met"] and fine.notes == []
    assert fine.rate == pytest.approx(15, rel=0.03) == fine.load[0]["achieved"]
    low, high = statistics.mean_interval(fine.rates)
    assert low < fine.rate < high and len(fine.rates) == 10


def test_a_rate_is_asked_for_until_it_is_decided(monkeypatch):
    queue = Queue(exponential(0.05))
    settings = settings_of(0.4, 0.95, 30.0)
    seen = searched(queue, settings, monkeypatch)
    least = max(30.0, 90 / min(queue.asked))
    longest = max(queue.asked.values())
    assert min(queue.asked.values()) < 35 and 60 < longest <= serving.PATIENCE * least * 1.01
    undecided = [each["rate"] for each in seen.load if each["met"] is None]
    found = seen.search
    within = [rate for rate in undecided if found["low"] < rate < found["high"]]
    assert found["decided"] == (not within)
    if within:
        assert any("Undecided" in note for note in seen.notes)


def at_capacity(capacity: float, doubt: float = 0.0):
    def at(rate: float) -> Point:
        sure = abs(rate - capacity) > doubt * capacity
        return Point(rate, min(rate, capacity), 0.1, 0.2, rate <= capacity if sure else None)

    return at


def walked(at, guess: float) -> list[Point]:
    points: list[Point] = []
    while (rate := search.next_rate(points, guess)) is not None:
        points.append(at(rate))
    return points


@pytest.mark.parametrize("capacity", [0.4, 3.0, 77.0])
@pytest.mark.parametrize("guess", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("doubt", [0.0, 0.05, 0.15])
def test_the_interval_closes_around_what_is_doubtful(capacity, guess, doubt):
    points = walked(at_capacity(capacity, doubt), guess * capacity)
    found = search.found(points)
    assert found.low <= capacity <= found.high
    assert found.low >= (1 - doubt) * capacity * 0.93
    assert found.high <= (1 + doubt) * capacity * 1.1
    assert found.decided == (not any(each.met is None for each in points))
    assert len(points) < search.MOST


def test_no_rate_may_keep_the_bound_or_every_one():
    def undecided(rate: float) -> Point:
        return Point(rate, rate, 1.0, 1.0, None, 100)

    points = walked(undecided, 8.0)
    assert search.found(points) == Found(None, None, False)
    assert len(points) == search.DOUBLINGS + 1
    points = walked(at_capacity(math.inf), 8.0)
    assert search.found(points).high is None and not search.found(points).decided
    assert len(points) == search.DOUBLINGS + 1


def test_a_rate_keeps_its_bound_only_if_enough_were_asked():
    def point(good: int, bad: int, failed: int = 0) -> Point:
        seen = [Observation(i, i, i + 0.03) for i in range(good)]
        seen += [Observation(i, i, i + 0.3) for i in range(bad)]
        seen += [Observation(i, i, i + 0.01, "QUEUE_FULL") for i in range(failed)]
        return verdict.point(1.0, seen, 0.1, 0.99)

    assert point(458, 0).met is None and point(458, 0).needed == 1
    assert point(459, 0).met is True and point(459, 0).sustained
    assert point(459, 1).met is None
    assert point(200, 0).p99 is None and point(200, 0).p50 == pytest.approx(0.03)
    assert point(100, 60).met is False
    assert point(100, 0, failed=60).met is False, "who is refused is not served in time"
    found = verdict.point(1.0, [Observation(i, i, i + 0.05) for i in range(100)], 0.1, 0.8)
    assert found.quantile == pytest.approx(0.05) and found.p99 is None


def test_late_ones_side_by_side_count_for_less():
    """1 % late, one by one or in one heap: the heap may have been chance."""
    count, late = 4000, 20
    alone = [index % (count // late) == 0 for index in range(count)]
    heap = [index < late for index in range(count)]
    assert verdict.bound_kept(alone, alone, 0.99).met is True
    kept = verdict.bound_kept(heap, heap, 0.99)
    assert kept.met is None and kept.more > 0


def test_a_design_effect():
    draw = np.random.default_rng(0)
    alone = [statistics.design_effect(draw.random(4000) < 0.1) for _ in range(50)]
    clumps = [statistics.design_effect(np.repeat(draw.random(400) < 0.1, 10)) for _ in range(50)]
    assert np.mean(alone) == pytest.approx(1.1, abs=0.15)
    assert np.mean(clumps) == pytest.approx(10, rel=0.15)
    assert statistics.design_effect([1.0] * 100) == statistics.design_effect([0.0] * 3) == 1


def test_a_slope_with_its_interval():
    draw = np.random.default_rng(0)
    times = np.arange(1000.0)
    assert statistics.slope(times, 0.5 * times) == pytest.approx((0.5, 0.5, 0.5))
    assert statistics.slope(times[:19], times[:19]) is None
    covered = 0
    for _ in range(200):
        _, low, high = statistics.slope(times, 0.01 * times + draw.normal(size=1000))
        covered += low <= 0.01 <= high
    assert covered >= 180


def test_arrivals_are_as_many_as_the_rate_says():
    found = np.array(list(scenarios.arrivals(20.0, Extent(200.0), 3)))
    assert len(found) == 4000 and found[-1] < 200 and np.all(np.diff(found) > 0)
    counts = np.histogram(found, bins=800, range=(0, 200))[0]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.2), "as a Poisson process has it"
    assert len(list(scenarios.arrivals(20.0, Extent(1.0, least=50), 3))) == 50
    assert len(list(scenarios.arrivals(20.0, Extent(10.0, most=50), 3))) == 50


def test_ctrl_c_leaves_the_points_there_are(monkeypatch):
    queue = Queue(always(0.05))
    whole = queue.server

    def server(*arguments, **named):
        if len(queue.asked) == 3:
            raise Interrupted([[Observation(0.0, 0.0, 0.1)]])
        return whole(*arguments, **named)

    queue.server = server
    seen = searched(queue, settings_of(0.5, 0.9, 30.0), monkeypatch)
    assert seen.interrupted and len(seen.load) == 4
    assert seen.search["low"] in queue.asked and seen.asked
    queue.asked.clear()

    def guess(*arguments, **named):
        raise Interrupted([[]])

    settings = settings_of(0.5, 0.9, 30.0, outstanding=1)
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(scenarios, "offline", guess)
        running.run(None, Target(None, None, IN_PROCESS, None, 1, None), settings, 0)


@pytest.mark.parametrize("ended", [0.1, 0.0])
def test_ctrl_c_while_it_guesses_where_to_begin_leaves_figures(monkeypatch, ended):
    """Also where no time has passed at all."""
    seen = [[Observation(0.0, 0.0, ended), Observation(0.0, 0.0, ended)]]

    def guess(*arguments, **named):
        raise Interrupted(seen, scenarios.sliced(seen[0], 0.0, 0.0, 1.0, 1) if ended else None)

    monkeypatch.setattr(scenarios, "offline", guess)
    settings = settings_of(0.5, 0.9, 30.0, outstanding=1)
    target = Target(None, None, IN_PROCESS, None, 1, None)
    told = running.run(None, target, settings, 0)
    assert told.interrupted and told.seconds > 0 and len(told.asked) == 2
    workload = Workload(Task.T2I)
    found = figures.metrics(told, workload, settings, figures.Surroundings())
    assert found["latency"]["count"] == 2 and "highest_rate" not in found
    assert figures.in_rounds(told, workload, settings) == {}, "nothing is compared"
    assert any("No rate was asked for yet" in note for note in told.notes)
    none = running.Seen(seen, 0.0)
    assert figures.metrics(none, workload, Settings(), figures.Surroundings())["throughput"]


def test_a_search_tells_how_long_it_takes_and_how_it_goes_on(monkeypatch):
    said = []
    queue = Queue(always(0.05))
    seen = searched(queue, settings_of(0.5, 0.9, 30.0), monkeypatch, said.append)
    assert "the first 20 a second, each for up to 4 min (" in said[0]
    assert "usually some 25 min in all, 64 min if all took" in said[0]
    assert len(said) == 1 + len(seen.load)
    assert said[1].startswith("20 a second: ") and "requests in" in said[1]
    assert {each.split(": ")[1].split(",")[0] for each in said[1:]} <= {*search.VERDICTS.values()}


def test_who_lets_a_rate_have_few_queries_is_told_so(monkeypatch):
    queue, said = Queue(always(0.05)), []
    settings = Settings("server", Extent(30.0, most=400), bound=0.4, share=0.99)
    seen = searched(queue, settings, monkeypatch, said.append)
    assert all(each["queries"] <= 400 for each in seen.load)
    assert "each for up to 20 s (" in said[0], "no longer than the queries take"
    (note,) = [each for each in seen.notes if each.startswith("Undecided")]
    assert "more than 400 requests of each would tell (--queries" in note
