"""The server scenario: at the rate that was asked for, or at the highest that keeps the bound."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from . import scenarios, search, statistics, verdict
from .asking import Asker
from .observation import Observation
from .running import Seen, Settings
from .scenarios import Extent, Interrupted, Rounds
from .targets import Target

GUESS_SECONDS = 10.0  # of the offline run that a search for the highest rate begins with
SHOWS = f"whether a queue grows shows in {verdict.LONG:g} times the bound"
PATIENCE = 8.0  # times the time of a rate, that it may take to decide
# Times the least time of a rate: what searches take in all. Of the tests' simulated queues it is
# 16 to 240, as rates near the answer need all of their time, and this about in the middle.
EXPECTED = 50


@dataclass
class Serving:
    """The rates that were tried. say: hears of each; runs: of each what was seen, seconds and
    steps.
    """

    asker: Asker
    target: Target
    settings: Settings
    first: int
    say: Callable[[str], None] = lambda text: None
    points: list[search.Point] = field(default_factory=list)
    runs: dict[float, tuple[Rounds, float, list[tuple[int, float]]]] = field(default_factory=dict)

    @property
    def bound(self) -> float:
        assert self.settings.bound is not None, "checked when settings were made"
        return self.settings.bound

    @property
    def shortest(self) -> float:
        """Seconds that a rate of a search is asked for, however soon it is decided."""
        return max(self.settings.extent.seconds, verdict.LONG * self.bound)

    def least(self, rate: float) -> float:
        """Seconds in which a rate can be shown to keep the bound, if nothing misses it."""
        return max(self.shortest, statistics.least_under(0, self.settings.share) / rate)

    def longest(self, rate: float) -> float:
        """Seconds after which a search leaves a rate undecided."""
        most = self.settings.extent.most
        limit = float("inf") if most is None else most / rate
        return min(PATIENCE * self.least(rate), limit)

    def at(self, rate: float) -> None:
        """Asks at a rate; of a search until it is decided whether the bound is kept there."""
        searching, extent = self.settings.rate is None, self.settings.extent
        if searching:
            extent = replace(extent, seconds=self.shortest)
        longest = self.longest(rate)

        def more(seen: list[Observation], now: float) -> float:
            taken = len(seen) / rate
            if self.point(rate, seen, now - self.bound).met is not None:
                return 0.0
            return min(taken, longest - taken) if taken < 0.99 * longest else 0.0

        began = time.perf_counter()
        self.target.steps.clear()
        try:
            rounds = scenarios.server(
                self.asker,
                extent,
                rate,
                seed=len(self.points),
                first=self.first,
                more=more if searching else None,
            )
        except Interrupted as ended:
            self._keep(rate, ended.rounds, began)
            raise
        self._keep(rate, rounds, began)

    def _keep(self, rate: float, rounds: Rounds, began: float) -> None:
        seen = [each for one in rounds for each in one]
        if seen:
            taken = time.perf_counter() - began
            self.runs[rate] = rounds, taken, list(self.target.steps)
            self.points.append(self.point(rate, seen))
            met = search.VERDICTS[self.points[-1].met]
            self.say(f"{rate:.3g} a second: {met}, after {len(seen)} requests in {_lasting(taken)}")

    def point(
        self, rate: float, seen: list[Observation], until: float = float("inf")
    ) -> search.Point:
        return verdict.point(rate, seen, self.bound, self.settings.share, until)


def serve(
    asker: Asker,
    target: Target,
    settings: Settings,
    outstanding: int,
    first: int,
    say: Callable[[str], None] = lambda text: None,
) -> Seen:
    """The rounds are of the highest rate that kept the bound, or of the lowest if none did."""
    serving, interrupted = Serving(asker, target, settings, first, say), False
    began = time.perf_counter()
    try:
        if settings.rate is not None:
            serving.at(settings.rate)
        else:
            _search(serving, outstanding)
    except Interrupted as ended:
        interrupted = True
        if not serving.runs:
            return _guessed(ended, time.perf_counter() - began)
    found = None if settings.rate is not None else search.found(serving.points)
    best = settings.rate if found is None else found.low
    shown = best if best is not None else min(serving.runs)
    rounds, seconds, steps = serving.runs[shown]
    target.steps[:] = steps
    answered = scenarios.achieved([each for one in rounds for each in one], settings.extent.rounds)
    points = sorted(serving.points, key=lambda point: point.rate)
    return Seen(
        rounds,
        seconds,
        answered.rate,
        answered.rates,
        load=[asdict(each) | {"best": each.rate == best} for each in points],
        notes=_notes(points, found, shown, serving),
        search=None if found is None else found.to_json(),
        interrupted=interrupted,
    )


def _guessed(ended: Interrupted, seconds: float) -> Seen:
    """What there is of a search that was interrupted while it guessed where to begin."""
    found = ended.throughput or scenarios.Throughput(0.0, [], ended.rounds)
    return Seen(
        found.rounds,
        seconds,
        found.rate,
        found.rates,
        notes=["No rate was asked for yet: these requests were under way as if offline."],
        beside=found.beside,
        interrupted=True,
    )


def _search(serving: Serving, outstanding: int) -> None:
    extent = Extent(GUESS_SECONDS, 1)
    guess = scenarios.offline(serving.asker, extent, outstanding, serving.first).rate
    if not guess:
        raise ValueError("no request was answered, so there is no rate to search for")
    serving.say(_lasts(serving, guess))
    rate: float | None = guess
    while rate is not None:
        serving.at(rate)
        rate = search.next_rate(serving.points, guess)


def _lasts(serving: Serving, guess: float) -> str:
    """How long a search takes that begins there."""
    least, longest = serving.least(guess), serving.longest(guess)
    expected = min(EXPECTED * least, search.MOST * longest)
    return (
        f"{search.MOST} rates at the most, the first {guess:.3g} a second, each for up to "
        f"{_lasting(longest)} (lower ones for longer): usually some {_lasting(expected)} in all, "
        f"{_lasting(search.MOST * longest)} if all took that long; Ctrl-C keeps what there is"
    )


def _lasting(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _notes(
    points: list[search.Point], found: search.Found | None, shown: float, serving: Serving
) -> list[str]:
    noted = []
    growing = [
        each.rate for each in points if each.met is False and (each.growth or 0) > verdict.GROWTH
    ]
    if found is None:
        (point,) = points
        if not point.sustained:
            noted.append(_unsustained(point, serving.bound))
        return noted
    if found.low is None:
        noted.append(
            f"No rate was shown to keep the bound; what follows is of {shown:.3g} a second."
        )
    if found.high is None:
        noted.append("No rate that was tried missed the bound; the highest may be higher.")
    undecided = [
        each for each in points if each.met is None and (found.low is None or each.rate > found.low)
    ]
    if undecided:
        told = ", ".join(f"{each.rate:.3g}" for each in undecided)
        most = serving.settings.extent.most
        more = "longer (--seconds) would tell"
        if most is not None and any(each.queries >= most for each in undecided):
            more = f"more than {most} requests of each would tell (--queries, or its --profile)"
        noted.append(
            f"Undecided, after as long as a rate is asked for, whether the bound is kept at {told} "
            f"a second: {more}."
        )
    if growing:
        noted.append(f"From {min(growing):.3g} a second on the queue grew, and no rate counts.")
    if verdict.LONG * serving.bound > serving.settings.extent.seconds:
        noted.append(
            f"Each rate was asked for {verdict.LONG * serving.bound:.3g} s at least: {SHOWS}."
        )
    return noted


def _unsustained(point: search.Point, bound: float) -> str:
    if point.queries / point.rate < (verdict.LONG - 2) * bound:
        return f"Too short to say whether the system can do {point.rate:.3g} a second: {SHOWS}."
    grown = "" if point.growth is None else f" (latency by {point.growth:.2g} s each second)"
    surely = (
        "The queue grew" if point.met is False else "It was not shown that the queue did not grow"
    )
    return f"{surely} at {point.rate:.3g} a second{grown}."
