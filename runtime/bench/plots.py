"""The pictures of a result of `nuwa bench`, as SVG: places of marks, and no colours.

A picture whose data are missing is None.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .cells import between, interval, quantiles, words
from .drawing import (
    LEFT,
    RIGHT,
    Axis,
    Figure,
    apart,
    axis,
    draw_bar,
    draw_below,
    draw_beside,
    draw_dot,
    draw_figure,
    draw_line,
    draw_path,
    draw_rect,
    draw_text,
    text_width,
)
from .load_tables import asked
from .schema import percentile, quantity, several, share
from .table import INSIDE, OVERLAP

WIDE = 8  # largest over least value from which an axis is logarithmic
BINS = (6, 60)
CURVE = 300  # points of a distribution that are drawn
REQUESTS = 50
PHASES = ("queue", "encode", "decode", "pixels", "ranking", "client")  # have colours of their own
COLOURS = 9

Part = dict[str, Any]
Flag = tuple[float, str, str]  # place, text, class


def figures(result: Part) -> list[Figure]:
    """Every picture that has data."""
    made = (phases(result), distribution(result), load(result), roofline(result), timeline(result))
    return [figure for figure in made if figure]


def phases(result: Part) -> Figure | None:
    """The mean of each phase, one after the other, beside the mean latency."""
    given = (result.get("phases") or {}).items()
    known = ((name, phase) for name, phase in given if phase and name not in INSIDE)
    means = {name: phase["mean"] for name, phase in known if phase.get("mean")}
    if not means:
        return None
    total, whole = sum(means.values()), _metric(result, "latency").get("mean") or 0.0
    x = axis([total, whole], LEFT, RIGHT, seconds=True)
    colours = _colours(result)
    told = {name: f"{words(name)} {quantity(mean, 's')}" for name, mean in means.items()}
    bars = ""
    for (name, mean), end in zip(means.items(), itertools.accumulate(means.values()), strict=True):
        tip = f"{told[name]}, {share(mean / total)} of all phases"
        bars += draw_bar(x, end - mean, end, 40, 48, colours[name], tip)
    key = [(colours[name], text) for name, text in told.items()]
    if whole > total:
        rest = f"in no phase {quantity(whole - total, 's')}"
        key.append(("area rest", rest))
        bars += draw_bar(x, total, whole, 40, 48, "area rest", rest)
    mean = [(x.at(whole), f"mean latency {quantity(whole, 's')}", "mark")] if whole else []
    return draw_figure(
        "Where a request's time goes",
        132,
        (draw_below(x, 34, 88, f"time, {x.seconds}"), bars, _flags(mean, 20, 34, 88)),
        key,
        OVERLAP if total > 1.01 * whole > 0 else "Means of the phases, one after the other.",
    )


def distribution(result: Part, name: str = "latency") -> Figure | None:
    """How many requests took how long, and which share took at most so long, of a metric in s."""
    seconds, number = _values(result, name)
    if not seconds:
        return None
    metric = _metric(result, name)
    known = [(key, entry) for key, entry in quantiles(metric) if entry.get("value") is not None]
    marked = [("floor", metric["floor"], "floor")] if metric.get("floor") is not None else []
    marked += [(percentile(key), entry["value"], "mark") for key, entry in known]
    reach = [*seconds, *(value for _, value, _ in marked)]
    x = axis(reach, LEFT, RIGHT, log=_wide(reach), zero=False, seconds=True)
    y = Axis(0.0, 1.0, 320, 200, factor=100)
    flags = [(x.at(value), f"{what} {quantity(value, 's')}", kind) for what, value, kind in marked]
    names = draw_text(LEFT, 14, "requests", "start", "name")
    names += draw_text(LEFT, 192, "% of requests that took at most so long", "start", "name halo")
    frame = draw_below(x, 52, 320, f"{words(name)}, {x.seconds}") + draw_beside(y)
    marks = _histogram(seconds, x, 172, 52) + _flags(flags, 34, 52, 320)
    marks += _curve(seconds, x, y) + "".join(_quantile(x, y, *each) for each in known)
    return draw_figure(
        words(name).capitalize(),
        362,
        (frame, marks, names),
        [("area bar", "requests"), ("line curve", "% of requests")],
        "; ".join(_remarks(len(seconds), number, metric)) + ".",
    )


def _values(result: Part, name: str) -> tuple[list[float], int]:
    """(values of a metric, of how many they are): those kept for the picture, or the rounds'."""
    kept = result.get("latencies") or {}
    if name == "latency" and kept.get("values"):
        values = [value for value in kept["values"] if value is not None]
        return values, max(kept.get("count") or 0, len(values))
    rounds = (result.get("rounds") or {}).get(name) or []
    values = [value for each in rounds for value in each or () if value is not None]
    return values, len(values)


def _remarks(drawn: int, number: int, metric: Part) -> list[str]:
    few = "" if drawn == number else f", {drawn} of which are drawn, evenly apart by rank"
    refused = [(key, entry["needs"]) for key, entry in quantiles(metric) if entry.get("needs")]
    return [several(number, "request") + few, "lines through points: 95 % intervals"] + [
        f"{percentile(key)} needs {several(needs, 'sample')}" for key, needs in refused
    ]


def _quantile(x: Axis, y: Axis, key: str, entry: Part) -> str:
    """A point on the distribution, and its interval."""
    height, whisker = y.at(float(key)), ""
    if entry.get("low") is not None and entry.get("high") is not None:
        whisker = draw_line(x.at(entry["low"]), height, x.at(entry["high"]), height, "whisker")
    tip = f"{percentile(key)} {quantity(entry['value'], 's')} {interval(entry, 's')}".strip()
    return whisker + draw_dot(x.at(entry["value"]), height, 3.5, "dot", tip)


def _histogram(values: Sequence[float], x: Axis, bottom: float, top: float) -> str:
    """Bars and their axis."""
    counts, edges = _bins(np.array([x.at(value) for value in values]))
    y = Axis(0.0, 1.05 * max(counts), bottom, top, whole=True)
    bars = ""
    for number, begin, end in zip(counts, edges, edges[1:], strict=False):
        tip = f"{several(number, 'request')} of {between(x.value(begin), x.value(end), 's')}"
        height = bottom - y.at(number)
        bars += draw_rect(begin, y.at(number), max(end - begin - 1, 1), height, "area bar", tip)
    return draw_beside(y) + bars + draw_line(LEFT, bottom, RIGHT, bottom, "axis")


def _bins(places: np.ndarray) -> tuple[list[int], list[float]]:
    """(counts, edges); as many as Freedman and Diaconis' rule says."""
    if np.ptp(places) < 1:
        return [len(places)], [places[0] - 4, places[0] + 4]
    quarter, three = np.quantile(places, (0.25, 0.75))
    wide = 2 * (three - quarter) / len(places) ** (1 / 3)
    counts, edges = np.histogram(
        places, int(np.clip(np.ptp(places) / wide if wide else BINS[1], *BINS))
    )
    return counts.tolist(), edges.tolist()


def _curve(values: Sequence[float], x: Axis, y: Axis) -> str:
    """The empirical distribution function, in CURVE of its steps where it has more."""
    ordered, number = sorted(values), len(values)
    picked = np.unique(np.linspace(0, number - 1, min(number, CURVE)).astype(int))
    steps = (f"H{x.at(ordered[i]):.1f}V{y.at((i + 1) / number):.1f}" for i in picked)
    begin = f"M{x.at(ordered[0]):.1f} {y.at(0):.1f}"
    return f'<path class="line curve" d="{begin}{"".join(steps)}H{RIGHT}"/>'


# How dots of rates look that did not keep the bound, and what that says.
MARKED = {" missed": "bound not kept", " undecided": "not decided"}


def load(result: Part) -> Figure | None:
    """Latency over the rate of requests, with the bound that was to be kept."""
    points = [each for each in result.get("load") or () if each.get("rate") is not None]
    points.sort(key=lambda each: each["rate"])
    bound = (result.get("scenario") or {}).get("slo_seconds")
    # Beside the median the quantile that was to keep the bound.
    other = asked(result)
    fields = {"p50": "p50"} | ({other: "quantile"} if other and other != "p50" else {"p99": "p99"})
    heights = [each[name] for each in points for name in fields.values() if each.get(name)]
    if not heights:
        return None
    heights += [bound] if bound else []
    x = axis((each["rate"] for each in points), LEFT, RIGHT)
    y = axis(heights, 300, 48, log=_wide(heights), seconds=True)
    kept = [each["rate"] for each in points if each.get("met")][-1:]
    flags = [(x.at(rate), f"{quantity(rate, '1/s')} kept", "mark") for rate in kept]
    kinds = dict(zip(fields, ("p50", "p99"), strict=False))
    key = [(f"line {kinds[name]}", name) for name in fields]
    marked = {_marked(each) for each in points}
    key += [(f"dot{mark}", said) for mark, said in MARKED.items() if mark in marked]
    frame = draw_beside(y) + draw_below(x, 48, 300, "requests offered, 1/s")
    marks = _flags(flags, 34, 48, 300)
    for name, field in fields.items():
        marks += _series(points, name, field, kinds[name], x, y)
    names = draw_text(LEFT, 14, f"latency, {y.seconds}", "start", "name")
    above = _bound(result["scenario"], y) if bound else ""
    return draw_figure("Latency against load", 344, (frame, marks, above, names), key)


def _series(points: Sequence[Part], name: str, field: str, kind: str, x: Axis, y: Axis) -> str:
    known = [each for each in points if each.get(field)]
    places = [(x.at(each["rate"]), y.at(each[field])) for each in known]
    dots = ""
    for each, place in zip(known, places, strict=True):
        offered, achieved = (quantity(each.get(rate), "1/s") for rate in ("rate", "achieved"))
        tip = f"{offered} offered, {achieved} achieved: {name} {quantity(each[field], 's')}"
        dots += draw_dot(*place, 4, f"dot {kind}{_marked(each)}", tip)
    return draw_path(places, f"line {kind}") + dots


def _marked(point: Part) -> str:
    """Of MARKED, or nothing: a rate that was asked for alone knows no bound."""
    met = point.get("met", True)
    return " undecided" if met is None else "" if met else " missed"


def _bound(scenario: Part, y: Axis) -> str:
    seconds = scenario["slo_seconds"]
    height, level = y.at(seconds), percentile(scenario.get("slo_quantile") or "0.99")
    text = f"{level} at most {quantity(seconds, 's')}"
    return draw_line(LEFT, height, RIGHT, height, "slo") + draw_text(
        LEFT + 6, height - 6, text, "start", "label halo"
    )


def roofline(result: Part) -> Figure | None:
    """What steps of each size achieve, below the roof that the floor of their time is.

    In FLOP/s where the card says what a row takes, else in rows a second.
    """
    card = result.get("card") or {}
    steps = [each for each in result.get("steps") or () if each.get("rows") and each.get("median")]
    if not steps:
        return None
    flops, most = card.get("flops_per_row"), 2 * max(each["rows"] for each in steps)
    gemm = (card.get("rates") or {}).get("gemm") or () if flops else ()
    # Steps of several generations have rows that one alone never has.
    floors = _rates(steps, "floor", flops or 1.0)
    if len(floors) < len(steps) or len(floors) < 2:
        floors = _rates(card.get("floor_by_rows") or (), "seconds", flops or 1.0) or floors
    lines = {
        "line roof": floors,
        "line gemm": [
            (each["rows"], each["flops_per_second"])
            for each in sorted(gemm, key=lambda each: each["rows"])
            if each["rows"] <= most and each.get("flops_per_second")
        ],
    }
    reached = _rates(steps, "median", flops or 1.0)
    known = [*reached, *_rates(steps, "p99", flops or 1.0), *itertools.chain(*lines.values())]
    x = axis((rows for rows, _ in known), LEFT, RIGHT, log=True, whole=True)
    y = axis((rate for _, rate in known), 320, 30, log=True)
    drawn = [
        draw_path([(x.at(rows), y.at(rate)) for rows, rate in line], kind)
        for kind, line in lines.items()
    ]
    frame = draw_beside(y) + draw_below(x, 30, 320, "rows in a step")
    names = draw_text(LEFT, 14, "FLOP/s" if flops else "rows/s", "start", "name")
    told = {"line roof": "floor", "line gemm": "matrix multiplication alone"}
    return draw_figure(
        "Steps below their roof",
        362,
        (frame, *drawn, _steps(steps, x, y, flops or 1.0), names),
        [("dot step", "steps; area: share of the time; line: down to p99")]
        + [(kind, text) for kind, text in told.items() if len(lines[kind]) > 1],
        "The slope is what memory allows, the flat part what arithmetic does.",
    )


def _rates(entries: Iterable[Part], name: str, each_row: float) -> list[tuple[float, float]]:
    """(rows, rate) where so many rows take the seconds of that name; by rows."""
    known = [(each["rows"], each[name]) for each in entries if each.get("rows") and each.get(name)]
    return [(rows, rows * each_row / seconds) for rows, seconds in sorted(known)]


def _steps(steps: Sequence[Part], x: Axis, y: Axis, each_row: float) -> str:
    taken = [(each.get("count") or 1) * each["median"] for each in steps]
    marks = ""
    for each, time in zip(steps, taken, strict=True):
        rows, median, part = each["rows"], each["median"], time / sum(taken)
        reached, least = (
            rows * each_row / (each.get(name) or median) for name in ("median", "p99")
        )
        floor = each.get("floor")
        of_floor = "" if floor is None else f", {share(floor / median)} of the floor"
        tip = f"{several(rows, 'row')}: median {quantity(median, 's')}{of_floor}, "
        tip += f"{share(part)} of the time in steps"
        marks += draw_line(x.at(rows), y.at(reached), x.at(rows), y.at(least), "whisker")
        marks += draw_dot(x.at(rows), y.at(reached), 3 + 8 * math.sqrt(part), "dot step", tip)
    return marks


def timeline(result: Part) -> Figure | None:
    """Requests one below the other, each with its phases; what overlaps is drawn half as high."""
    given = (result.get("timeline") or {}).get("requests") or ()
    known = [each for each in given if _spanned([each.get("start"), each.get("end")])]
    known = sorted(known, key=lambda each: each["start"])[:REQUESTS]
    if not known:
        return None
    x = axis((each["end"] for each in known), LEFT, RIGHT, seconds=True)
    row = min(max(380 / len(known), 9.0), 20.0)
    bottom, every = 26 + row * len(known), 1 if row >= 15 else 5
    colours = _colours(result)
    marks = ""
    for index, each in enumerate(known):
        number, top = index + 1, 26 + row * index
        marks += _request(each, number, x, top + 1, row - 2, colours)
        if number == 1 or number % every == 0:
            marks += draw_text(LEFT - 8, top + row / 2 + 4, str(number), "end", "tick")
    seen = [name for name in colours if any(name in (each.get("phases") or {}) for each in known)]
    key = [*((colours[name], words(name)) for name in seen), ("area span", "in no phase")]
    if any(each.get("status", "ok") != "ok" for each in known):
        key.append(("area failed", "did not end ok"))
    few = len(known) < len(given)
    return draw_figure(
        "Requests over time",
        round(bottom + 42),
        (
            draw_below(x, 26, bottom, f"time since the start, {x.seconds}"),
            marks,
            draw_text(LEFT, 14, "request", "start", "name"),
        ),
        key,
        f"The first {len(known)} of {len(given)} requests." if few else "",
    )


def _request(
    each: Part, number: int, x: Axis, top: float, height: float, colours: dict[str, str]
) -> str:
    def bar(what: str, begin: float, end: float, half: bool, kind: str) -> str:
        tip = f"request {number}{what}, {between(begin, end, 's')}"
        high = height / 2 if half else height
        return draw_bar(x, begin, end, top + height - high, high, kind, tip)

    spans = (each.get("phases") or {}).items()
    known = sorted((*span, name) for name, span in spans if _spanned(span))
    ended = each.get("status") or "ok"
    whole, what = ("area span", "") if ended == "ok" else ("area failed", f" {ended}")
    marks, until = bar(what, each["start"], each["end"], False, whole), -math.inf
    for begin, end, name in known:
        marks += bar(f" {words(name)}", begin, end, begin < until - 1e-9, colours[name])
        until = max(until, end)
    return marks


def _flags(labels: Sequence[Flag], height: float, top: float, bottom: float) -> str:
    """Upright lines at places, each with its label above and a class."""
    widths = [text_width(text) for _, text, _ in labels]
    centres = apart([place for place, _, _ in labels], widths, LEFT, RIGHT)
    return "".join(
        draw_line(place, top, place, bottom, kind)
        + draw_line(centre, height + 5, place, top, kind)
        + draw_text(centre, height, text, "middle", "label")
        for (place, text, kind), centre in zip(labels, centres, strict=True)
    )


def _metric(result: Part, name: str) -> Part:
    return (result.get("metrics") or {}).get(name) or {}


def _wide(values: Sequence[float]) -> bool:
    return 0 < WIDE * min(values) < max(values)


def _colours(result: dict[str, Any]) -> dict[str, str]:
    """The class of each phase, wherever it occurs: its own, or one of those that are left."""
    requests = (result.get("timeline") or {}).get("requests") or ()
    names = list(result.get("phases") or {})
    names += [name for each in requests for name in each.get("phases") or {}]
    others = sorted({name for name in names if name not in PHASES})
    spare = COLOURS - len(PHASES)
    colours = {name: f"area c{index}" for index, name in enumerate(PHASES)}
    return colours | {
        name: f"area c{len(PHASES) + index % spare}" for index, name in enumerate(others)
    }


def _spanned(pair: Sequence[float | None] | None) -> bool:
    return pair is not None and len(pair) == 2 and None not in pair
