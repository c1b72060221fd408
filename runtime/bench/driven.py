"""A run that LoadGen drives: its verdict beside ours, which is of the same requests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import loadgen, scenarios, statistics, verdict
from .asking import Asker
from .observation import Observation
from .running import Seen, Settings
from .scenarios import Extent, Interrupted, Rounds

GUESS_SECONDS = 10.0  # of an offline run that says how many samples LoadGen's query needs


def by_loadgen(asker: Asker, settings: Settings, folder: Path, outstanding: int) -> Seen:
    """The scenario of the settings; LoadGen's logs go into the folder."""
    extent, rate = settings.extent, settings.rate or 1.0
    if settings.scenario == "offline":
        guess = scenarios.offline(asker, Extent(GUESS_SECONDS, 1), outstanding)
        rate, outstanding = guess.rate or rate, guess.outstanding or outstanding
    try:
        observed, told = loadgen.drive(
            asker,
            settings.scenario,
            folder,
            seconds=extent.seconds,
            least=extent.least,
            most=extent.most,
            rate=rate,
            bound=settings.bound or 1.0,
            share=settings.share,
            streams=settings.streams,
            outstanding=outstanding,
        )
    except Interrupted as ended:
        rounds, throughput = _rounds(ended.rounds[0], settings)
        rate_seen, rates = _known(throughput)
        return Seen(rounds, _taken(ended.rounds[0]), rate_seen, rates, interrupted=True)
    rounds, throughput = _rounds(observed, settings)
    rate_seen, rates = _known(throughput)
    ours = judged(observed, settings)
    found = {
        "valid": told.valid,
        "reasons": told.reasons,
        "ours": ours,
        "agree": told.valid == ours["valid"],
        "figures": told.figures,
        "logs": str(folder),
    }
    return Seen(
        rounds,
        _taken(observed),
        rate_seen,
        rates,
        load=_load(observed, settings),
        loadgen=found,
        notes=_notes(told, ours),
    )


def judged(observed: Sequence[Observation], settings: Settings) -> dict[str, Any]:
    """Our verdict by LoadGen's rules: long enough, enough queries, and by early stopping enough of
    them within the bound, or for the estimate. Beyond these, every request must be answered.
    """
    extent, reasons = settings.extent, []
    found: dict[str, Any] = {"queries": len(observed)}
    latencies = [each.latency for each in observed if each.ok]
    failed = Counter(each.status for each in observed if not each.ok)
    if failed:
        each = ", ".join(f"{number} {status}" for status, number in failed.most_common())
        reasons.append(f"not answered: {each}")
    span = _span(observed, settings)
    enough = extent.most is not None and len(observed) >= extent.most
    if span < extent.seconds and not enough:
        reasons.append(f"took {span:.3g} s of at least {extent.seconds:.3g} s")
    if len(observed) < extent.least:
        reasons.append(f"{len(observed)} of at least {extent.least} queries")
    if settings.scenario == "server":
        assert settings.bound is not None, "checked when settings were made"
        under = sum(latency <= settings.bound for latency in latencies)
        kept = statistics.latency_bound(under, len(observed) - under, settings.share)
        found |= {"met": kept.met, "over": len(observed) - under}
        if not kept.met:
            more = f"; {kept.more} more within it would do" if kept.more else ""
            reasons.append(f"{found['over']} of {len(observed)} queries over the bound{more}")
    elif settings.scenario in statistics.JUDGED_BY and latencies:
        share = statistics.JUDGED_BY[settings.scenario]
        stopped = statistics.early_stopping(latencies, share)
        found[f"early_stopping_p{100 * share:g}"] = stopped.value
        if stopped.needs:
            reasons.append(
                f"{len(latencies)} of at least {stopped.needs} queries for early stopping"
            )
    return {"valid": not reasons, "reasons": reasons, **found}


def _taken(observed: Sequence[Observation]) -> float:
    """Seconds from when the first query was due to the last answer: LoadGen's start and its end,
    when it writes its logs, are nobody's work. 0 without queries.
    """
    if not observed:
        return 0.0
    return max(each.ended for each in observed) - min(each.scheduled for each in observed)


def _span(observed: Sequence[Observation], settings: Settings) -> float:
    """As LoadGen counts it: to the last answer, or where queries have times of their own to the
    last of these, one more of which would have been beyond the duration.
    """
    taken = _taken(observed)
    if observed and settings.scenario == "server" and settings.rate is not None:
        return max(taken, math.ceil(len(observed) + 1) / settings.rate)
    return taken


def _rounds(
    observed: list[Observation], settings: Settings
) -> tuple[Rounds, scenarios.Throughput | None]:
    """By when they ended; offline with the throughput of each round, from when all were sent."""
    rounds = settings.extent.rounds
    if not observed:
        return [[]], None
    if settings.scenario == "offline":
        began = min(each.scheduled for each in observed)
        until = math.nextafter(max(each.ended for each in observed), math.inf)
        found = scenarios.sliced(observed, began, began, until, rounds)
        answers = sum(each.ok for each in observed)
        return found.rounds, scenarios.Throughput(
            answers / (until - began), found.rates, found.rounds, found.beside
        )
    if settings.scenario == "server":
        inorder = sorted(observed, key=lambda each: each.scheduled)
        return scenarios.in_parts(inorder, rounds), scenarios.achieved(inorder, rounds)
    return scenarios.in_parts(observed, rounds), None


def _known(throughput: scenarios.Throughput | None) -> tuple[float | None, list[float]]:
    return (None, []) if throughput is None else (throughput.rate, throughput.rates)


def _load(observed: list[Observation], settings: Settings) -> list[dict[str, Any]]:
    if settings.scenario != "server" or settings.rate is None or settings.bound is None:
        return []
    point = verdict.point(settings.rate, observed, settings.bound, settings.share)
    return [asdict(point) | {"best": True}]


def _notes(told: loadgen.Verdict, ours: dict[str, Any]) -> list[str]:
    noted = []
    if not told.valid:
        noted.append(f"LoadGen: this run is not valid. {_sentence(told.reasons)}".strip())
    if not ours["valid"]:
        agree = " too" if not told.valid else ", which LoadGen takes for valid"
        noted.append(f"By our count it is not valid{agree}: {_sentence(ours['reasons'])}")
    elif not told.valid:
        noted.append("By our count of the same requests it is.")
    return noted


def _sentence(reasons: Sequence[str]) -> str:
    return "; ".join(each.rstrip(".") for each in reasons) + "." if reasons else ""
