"""What MLPerf has a scenario judged by, of results in JSON: a quantile of latency, and whether the
bound was kept. Medians of rounds show neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .statistics import JUDGED_BY, needed, quantile

Rounds = Sequence[Sequence[float | None]]

SLO_QUANTILE = "0.99"  # of results that do not say it


def is_search(result: Mapping[str, Any]) -> bool:
    """Whether it is of a search for the highest rate."""
    scenario = result.get("scenario") or {}
    return scenario.get("name") == "server" and scenario.get("rate") is None


def found_none(result: Mapping[str, Any]) -> bool:
    """Whether it is of a search in which no rate was shown to keep the bound."""
    return is_search(result) and (result.get("search") or {}).get("low") is None


def own_quantile(result: Mapping[str, Any]) -> float | None:
    """That the scenario is judged by; None of offline."""
    scenario = result.get("scenario") or {}
    if scenario.get("name") == "server":
        return float(scenario.get("slo_quantile") or SLO_QUANTILE)
    return JUDGED_BY.get(str(scenario.get("name")))


def with_quantile(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """A result of the server scenario that says which quantile was to keep the bound."""
    scenario = result.get("scenario") or {}
    if scenario.get("name") != "server":
        return result
    return {**result, "scenario": {"slo_quantile": SLO_QUANTILE, **scenario}}


def tails(share: float, *sides: Rounds) -> list[Rounds]:
    """Of each of the sides its quantile in rounds, as many neighbours of which are taken together
    as have enough values for it (`statistics.needed`) on all sides. Those of the same index belong
    together.
    """
    groups: list[list[list[float]]] = []
    whole = True
    for each in zip(*sides, strict=False):
        if whole:
            groups.append([[] for _ in sides])
        for held, more in zip(groups[-1], each, strict=True):
            held += [value for value in more if value is not None]
        whole = min(map(len, groups[-1])) >= needed(share)
    if groups and not whole:  # the last, which go with those before them
        rest = groups.pop()
        for held, more in zip(groups[-1] if groups else (), rest, strict=False):
            held += more
    return [[[quantile(group[side], share)] for group in groups] for side in range(len(sides))]


def rate_kept(result: Mapping[str, Any]) -> bool | None:
    """Whether the rate that was given kept its bound: False if a launch missed it, None where it is
    not shown of all, or none was given.
    """
    if is_search(result) or not (points := loads(result)):
        return None
    met = [each.get("met") for each in points]
    return False if False in met else True if all(met) else None


def loads(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rates that were asked for, of all launches."""
    launches = result.get("each_launch") or ()
    found = [point for launch in launches for point in launch.get("load") or ()]
    return found or list(result.get("load") or ())
