"""Tables of what a server was asked for: rates that were tried, and what it counted itself."""

from __future__ import annotations

from typing import Any

from .cells import NOTHING, Section, between, words
from .schema import count, percentile, quantity, several, share


def server(result: dict[str, Any]) -> Section:
    """What the server counted itself; of quantiles it knows between which edges they are."""
    counted = result.get("server") or {}
    told = {words(name): each for name, each in (counted.get("phases") or {}).items()}
    if counted.get("steps"):
        told["a decode step"] = counted["steps"]
    rows = [
        (
            name,
            count(each.get("count")),
            quantity(each.get("mean"), "s"),
            *(_edges((each.get("quantiles") or {}).get(key)) for key in ("0.5", "0.99")),
        )
        for name, each in told.items()
    ]
    heads = ("of its own metrics", "count", "mean", "p50 within", "p99 within")
    about = f"All that it was asked by anyone: {several(counted.get('requests') or 0, 'request')}."
    return Section("What the server counted", heads, tuple(rows), (about,))


def _edges(entry: dict[str, Any] | None) -> str:
    if not entry:
        return NOTHING
    if entry.get("high") is None:
        return f"above {quantity(entry.get('low'), 's')}"
    return between(entry.get("low"), entry["high"], "s")


def server_steps(result: dict[str, Any]) -> Section:
    """How many steps were between one edge and the next; without those at the ends that are 0."""
    steps = (result.get("server") or {}).get("steps") or {}
    before, low, rows = 0, 0.0, []
    total = steps.get("count") or 0
    for high, until in steps.get("buckets") or ():
        if until > before:
            name = _edges({"low": low, "high": high})
            rows.append((name, count(until - before), share((until - before) / total)))
        before, low = until, high
    return Section("Decode steps on the server", ("duration", "steps", "share"), tuple(rows))


def asked(result: dict[str, Any]) -> str | None:
    """The name of the quantile that was to keep the bound, where it is not p99: "p95"."""
    name = percentile((result.get("scenario") or {}).get("slo_quantile") or "0.99")
    return None if name == "p99" else name


def load(result: dict[str, Any]) -> Section:
    points = [point for point in result.get("load") or () if point.get("rate") is not None]
    names = {"p50": "p50", "p99": "p99"}
    if (other := asked(result)) is not None and other not in names:
        names[other] = "quantile"
    rows = [
        (
            quantity(point["rate"], "1/s"),
            quantity(point.get("achieved"), "1/s"),
            *(quantity(point.get(field), "s") for field in names.values()),
            _verdict(point),
        )
        for point in sorted(points, key=lambda point: point["rate"])
    ]
    return Section("Load", ("requests offered", "achieved", *names, "target met"), tuple(rows))


def _verdict(point: dict[str, Any]) -> str:
    if point.get("met") is not None:
        return "yes" if point["met"] else "no"
    return f"needs {count(point['needed'])} more" if point.get("needed") else NOTHING
