"""Tables of a result as text, and what values look like in their cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .schema import quantity, several

NOTHING = "–"


@dataclass(frozen=True)
class Section:
    """A table: its heads (none where a row is a name and a value), its cells, remarks below it.

    The first column is words, the others are numbers.
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def estimate(entry: dict[str, Any] | None, unit: str) -> str:
    """A quantile as it is shown: its value, or how many samples it needs."""
    if entry and entry.get("needs"):
        return f"needs {several(entry['needs'], 'sample')}"
    return quantity((entry or {}).get("value"), unit)


def interval(entry: dict[str, Any], unit: str) -> str:
    """Its 95 % interval, or nothing: a value may have none."""
    return between(entry.get("low"), entry.get("high"), unit)


def between(low: float | None, high: float | None, unit: str) -> str:
    """42.4 .. 43.7 ms; nothing where an end is missing."""
    if low is None or high is None:
        return ""
    first, last = quantity(low, unit), quantity(high, unit)
    number, _, named = first.rpartition(" ")
    return f"{number if unit and last.endswith(f' {named}') else first} .. {last}"


def quantiles(metric: dict[str, Any] | None) -> list[tuple[str, dict[str, Any]]]:
    """The metric's quantiles by key, lowest first."""
    found = ((metric or {}).get("quantiles") or {}).items()
    return sorted(((key, entry or {}) for key, entry in found), key=lambda each: float(each[0]))


def words(name: str) -> str:
    """A field's name for people."""
    return name.replace("_", " ")
