"""The server scenario: at the rate that was asked for, or at the highest that keeps the bound."""

from __future__ import annotations

import time
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


@dataclass
class Serving:
    """The rates that were tried. runs: of each rate what was seen, seconds, steps."""

    asker: Asker
    target: Target
    settings: Settings
    first: int
    points: list[search.Point] = field(default_factory=list)
    runs: dict[float, tuple[Rounds, float, list[tuple[int, float]]]] = field(default_factory=dict)

    @property
    def bound(self) -> float:
        assert self.settings.bound is not None, "checked when settings were made"
        return self.settings.bound

    def at(self, rate: float) -> None:
        """Asks at a rate; of a search until it is decided whether the bound is kept there."""
        searching, extent = self.settings.rate is None, self.settings.extent
        if searching:
            extent = replace(extent, seconds=max(extent.seconds, verdict.LONG * self.bound))
        enough = statistics.least_under(0, self.settings.share) / rate
        longest = PATIENCE * max(extent.seconds, enough)

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
            self.runs[rate] = rounds, time.perf_counter() - began, list(self.target.steps)
            self.points.append(self.point(rate, seen))

    def point(
        self, rate: float, seen: list[Observation], until: float = float("inf")
    ) -> search.Point:
        return verdict.point(rate, seen, self.bound, self.settings.share, until)


def serve(asker: Asker, target: Target, settings: Settings, outstanding: int, first: int) -> Seen:
    """The rounds are of the highest rate that kept the bound, or of the lowest if none did."""
    serving, interrupted = Serving(asker, target, settings, first), False
    try:
        if settings.rate is not None:
            serving.at(settings.rate)
        else:
            _search(serving, outstanding)
    except Interrupted as ended:
        interrupted = True
        if not serving.runs:  # it was still guessing where to begin
            return Seen(ended.rounds, 0.0, interrupted=True)
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


def _search(serving: Serving, outstanding: int) -> None:
    settings = serving.settings
    extent = Extent(GUESS_SECONDS, 1)
    guess = scenarios.offline(serving.asker, extent, outstanding, serving.first).rate
    if not guess:
        raise ValueError("no request was answered, so there is no rate to search for")
    rate: float | None = guess
    while rate is not None:
        serving.at(rate)
        rate = search.next_rate(serving.points, guess)
    assert settings.rate is None


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
        each.rate
        for each in points
        if each.met is None and (found.low is None or each.rate > found.low)
    ]
    if undecided:
        told = ", ".join(f"{rate:.3g}" for rate in undecided)
        noted.append(
            f"Undecided, after as long as a rate is asked for, whether the bound is kept at {told} "
            "a second: longer (--seconds) would tell."
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
