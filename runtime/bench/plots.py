"""The pictures of a result of `nuwa bench`, as SVG: places of marks, and no colours.

What a mark looks like is said by its class, in html.py. A picture whose data are missing is None.
Every coordinate lies within the viewBox: axes end where their data do, and beyond is their end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from .schema import PREFIXES, percentile, quantity, several, share
from .table import INSIDE, OVERLAP, between, interval, quantiles, words

WIDTH, LEFT, RIGHT = 640, 64, 620  # of a picture; where its axes begin and end
CHARACTER = 7.2  # width of one, in the 12 units high type of ticks
GAP = 12  # between labels
TICKS = 10  # on an axis, at most
WIDE = 8  # largest over least value from which an axis is logarithmic
BINS = (6, 60)
CURVE = 300  # points of a distribution that are drawn
REQUESTS = 50
PHASES = ("queue", "encode", "decode", "pixels", "ranking", "client")  # have colours of their own
COLOURS = 9

Part = dict[str, Any]
Flag = tuple[float, str, str]  # place, text, class


@dataclass(frozen=True)
class Figure:
    """key: (class of the mark, what it is); about: how to read it."""

    title: str
    svg: str
    height: float  # of the viewBox
    key: tuple[tuple[str, str], ...] = ()
    about: str = ""


@dataclass(frozen=True)
class Axis:
    """Takes values of low .. high to places of start .. end; ticks show factor times a value.

    whole: ticks are whole numbers.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    factor: float = 1.0
    whole: bool = False

    @property
    def seconds(self) -> str:
        """The unit of an axis whose values are seconds."""
        return "s" if self.factor == 1 else "ms"

    def at(self, value: float) -> float:
        """What lies outside is put at the end that is nearer."""
        low, high, here = (self._even(each) for each in (self.low, self.high, value))
        part = min(max((here - low) / (high - low), 0.0), 1.0)
        return self.start + part * (self.end - self.start)

    def value(self, place: float) -> float:
        """What is put there."""
        low, high = self._even(self.low), self._even(self.high)
        here = low + (place - self.start) / (self.end - self.start) * (high - low)
        return 10.0**here if self.log else here

    def ticks(self, room: Callable[[list[str]], float]) -> dict[float, str]:
        """Texts by place: round numbers at least room(texts) apart, as many as there can be."""
        fitting = [marks for marks in self._marks(self._powers()) if _fit(marks, room)]
        if max(map(len, fitting), default=0) < 3:
            fitting += [marks for marks in self._marks(self._multiples()) if _fit(marks, room)]
        return max(fitting, key=len, default={})

    def _even(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.log else value

    def _marks(self, choices: Iterable[list[float]]) -> Iterator[dict[float, str]]:
        for numbers in choices:
            shown = [number for number in numbers if not self.whole or number == round(number)]
            yield {self.at(number / self.factor): _tick(number) for number in shown}

    def _multiples(self) -> Iterator[list[float]]:
        low, high = self.low * self.factor, self.high * self.factor
        power = 10.0 ** math.floor(math.log10(high - low))
        for step in (factor * power for factor in (0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10)):
            first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
            yield [index * step for index in range(first, last + 1)]

    def _powers(self) -> Iterator[list[float]]:
        """Of ten, with 2 and 5 times them or without, or only some; none of an even axis."""
        low, high = self.low * self.factor, self.high * self.factor
        for factors, stride in (((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 3), ((1,), 6)):
            if self.log:
                first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
                powers = range(first - first % stride, last + 1, stride)
                numbers = [factor * 10.0**power for power in powers for factor in factors]
                yield [
                    number for number in numbers if low <= number * (1 + 1e-9) <= high * (1 + 2e-9)
                ]


def axis(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    log: bool = False,
    zero: bool = True,
    seconds: bool = False,
    whole: bool = False,
) -> Axis:
    """One on which all values lie, with some room. zero: from 0, where it is not logarithmic;
    seconds: the values are, and are shown in ms if all are below one.
    """
    known = list(values)
    low, high = min(known), max(known)
    factor = 1000.0 if seconds and high < 1 else 1.0
    if log:
        slack = max((high / low) ** 0.04, 1.1)
        return Axis(low / slack, high * slack, start, end, True, factor, whole)
    slack = 0.04 * (high - (0.0 if zero else low)) or 0.05 * abs(high) or 1.0
    low = 0.0 if zero else max(low - slack, 0.0)
    return Axis(low, high + slack, start, end, False, factor, whole)


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
        bars += _bar(x, end - mean, end, 40, 48, colours[name], tip)
    if whole > total:
        rest = f"in no phase {quantity(whole - total, 's')}"
        bars += _bar(x, total, whole, 40, 48, "area rest", rest)
    mean = [(x.at(whole), f"mean latency {quantity(whole, 's')}", "mark")] if whole else []
    return _figure(
        "Where a request's time goes",
        132,
        (_below(x, 34, 88, f"time, {x.seconds}"), bars, _flags(mean, 20, 34, 88)),
        [(colours[name], text) for name, text in told.items()],
        OVERLAP if total > 1.01 * whole > 0 else "Means of the phases, one after the other.",
    )


def distribution(result: Part, name: str = "latency") -> Figure | None:
    """How many requests took how long, and which share took at most so long, of a metric in s."""
    rounds = (result.get("rounds") or {}).get(name) or []
    seconds = [value for each in rounds for value in each or () if value is not None]
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
    names = _text(LEFT, 14, "requests", "start", "name")
    names += _text(LEFT, 192, "% of requests that took at most so long", "start", "name halo")
    frame = _below(x, 52, 320, f"{words(name)}, {x.seconds}") + _beside(y)
    marks = _histogram(seconds, x, 172, 52) + _flags(flags, 34, 52, 320)
    marks += _curve(seconds, x, y) + "".join(_quantile(x, y, *each) for each in known)
    return _figure(
        words(name).capitalize(),
        362,
        (frame, marks, names),
        [("area bar", "requests"), ("line curve", "% of requests")],
        "; ".join(_remarks(len(seconds), metric)) + ".",
    )


def _remarks(number: int, metric: Part) -> list[str]:
    refused = [(key, entry["needs"]) for key, entry in quantiles(metric) if entry.get("needs")]
    return [several(number, "request"), "lines through points: 95 % intervals"] + [
        f"{percentile(key)} needs {several(needs, 'sample')}" for key, needs in refused
    ]


def _quantile(x: Axis, y: Axis, key: str, entry: Part) -> str:
    """A point on the distribution, and its interval."""
    height, whisker = y.at(float(key)), ""
    if entry.get("low") is not None and entry.get("high") is not None:
        whisker = _line(x.at(entry["low"]), height, x.at(entry["high"]), height, "whisker")
    tip = f"{percentile(key)} {quantity(entry['value'], 's')} {interval(entry, 's')}".strip()
    return whisker + _dot(x.at(entry["value"]), height, 3.5, "dot", tip)


def _histogram(values: Sequence[float], x: Axis, bottom: float, top: float) -> str:
    """Bars and their axis."""
    counts, edges = _bins(np.array([x.at(value) for value in values]))
    y = Axis(0.0, 1.05 * max(counts), bottom, top, whole=True)
    bars = ""
    for number, begin, end in zip(counts, edges, edges[1:], strict=False):
        tip = f"{several(number, 'request')} of {between(x.value(begin), x.value(end), 's')}"
        height = bottom - y.at(number)
        bars += _rect(begin, y.at(number), max(end - begin - 1, 1), height, "area bar", tip)
    return _beside(y) + bars + _line(LEFT, bottom, RIGHT, bottom, "axis")


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


def load(result: Part) -> Figure | None:
    """Latency over the rate of requests, with the bound that was to be kept."""
    points = [each for each in result.get("load") or () if each.get("rate") is not None]
    points.sort(key=lambda each: each["rate"])
    bound = (result.get("scenario") or {}).get("slo_seconds")
    heights = [each[name] for each in points for name in ("p50", "p99") if each.get(name)]
    if not heights:
        return None
    heights += [bound] if bound else []
    x = axis((each["rate"] for each in points), LEFT, RIGHT)
    y = axis(heights, 300, 48, log=_wide(heights), seconds=True)
    kept = [each["rate"] for each in points if each.get("met")][-1:]
    flags = [(x.at(rate), f"{quantity(rate, '1/s')} kept", "mark") for rate in kept]
    key = [("line p50", "p50"), ("line p99", "p99")]
    if any(each.get("met") is False for each in points):
        key.append(("dot missed", "bound not kept"))
    frame = _beside(y) + _below(x, 48, 300, "requests offered, 1/s")
    marks = _flags(flags, 34, 48, 300) + _series(points, "p50", x, y) + _series(points, "p99", x, y)
    names = _text(LEFT, 14, f"latency, {y.seconds}", "start", "name")
    above = _bound(result["scenario"], y) if bound else ""
    return _figure("Latency against load", 344, (frame, marks, above, names), key)


def _series(points: Sequence[Part], name: str, x: Axis, y: Axis) -> str:
    known = [each for each in points if each.get(name)]
    places = [(x.at(each["rate"]), y.at(each[name])) for each in known]
    dots = ""
    for each, place in zip(known, places, strict=True):
        offered, achieved = (quantity(each.get(rate), "1/s") for rate in ("rate", "achieved"))
        tip = f"{offered} offered, {achieved} achieved: {name} {quantity(each[name], 's')}"
        dots += _dot(*place, 4, f"dot {name}{' missed' if each.get('met') is False else ''}", tip)
    return _path(places, f"line {name}") + dots


def _bound(scenario: Part, y: Axis) -> str:
    seconds = scenario["slo_seconds"]
    height, level = y.at(seconds), percentile(scenario.get("slo_quantile") or "0.99")
    text = f"{level} at most {quantity(seconds, 's')}"
    return _line(LEFT, height, RIGHT, height, "slo") + _text(
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
    floors = _rates(card.get("floor_by_rows") or (), "seconds", flops or 1.0)
    lines = {
        "line roof": floors or _rates(steps, "floor", flops or 1.0),
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
        _path([(x.at(rows), y.at(rate)) for rows, rate in line], kind)
        for kind, line in lines.items()
    ]
    frame = _beside(y) + _below(x, 30, 320, "rows in a step")
    names = _text(LEFT, 14, "FLOP/s" if flops else "rows/s", "start", "name")
    told = {"line roof": "floor", "line gemm": "matrix multiplication alone"}
    return _figure(
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
        marks += _line(x.at(rows), y.at(reached), x.at(rows), y.at(least), "whisker")
        marks += _dot(x.at(rows), y.at(reached), 3 + 8 * math.sqrt(part), "dot step", tip)
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
            marks += _text(LEFT - 8, top + row / 2 + 4, str(number), "end", "tick")
    seen = [name for name in colours if any(name in (each.get("phases") or {}) for each in known)]
    key = [*((colours[name], words(name)) for name in seen), ("area span", "in no phase")]
    if any(each.get("status", "ok") != "ok" for each in known):
        key.append(("area failed", "did not end ok"))
    few = len(known) < len(given)
    return _figure(
        "Requests over time",
        round(bottom + 42),
        (
            _below(x, 26, bottom, f"time since the start, {x.seconds}"),
            marks,
            _text(LEFT, 14, "request", "start", "name"),
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
        return _bar(x, begin, end, top + height - high, high, kind, tip)

    spans = (each.get("phases") or {}).items()
    known = sorted((*span, name) for name, span in spans if _spanned(span))
    ended = each.get("status") or "ok"
    whole, what = ("area span", "") if ended == "ok" else ("area failed", f" {ended}")
    marks, until = bar(what, each["start"], each["end"], False, whole), -math.inf
    for begin, end, name in known:
        marks += bar(f" {words(name)}", begin, end, begin < until - 1e-9, colours[name])
        until = max(until, end)
    return marks


def apart(
    centres: Sequence[float], widths: Sequence[float], low: float, high: float
) -> list[float]:
    """Centres of labels in a row that do not touch and lie within low .. high, where they must have
    room; moved to the right first, then to the left.
    """
    order = sorted(range(len(centres)), key=lambda index: centres[index])
    places = [0.0] * len(centres)
    edge = low
    for index in order:
        places[index] = max(centres[index], edge + widths[index] / 2)
        edge = places[index] + widths[index] / 2 + GAP
    edge = high
    for index in reversed(order):
        places[index] = min(places[index], edge - widths[index] / 2)
        edge = places[index] - widths[index] / 2 - GAP
    return places


def _flags(labels: Sequence[Flag], height: float, top: float, bottom: float) -> str:
    """Upright lines at places, each with its label above and a class."""
    widths = [_width(text) for _, text, _ in labels]
    centres = apart([place for place, _, _ in labels], widths, LEFT, RIGHT)
    return "".join(
        _line(place, top, place, bottom, kind)
        + _line(centre, height + 5, place, top, kind)
        + _text(centre, height, text, "middle", "label")
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


def _tick(value: float) -> str:
    power = 0 if value < 10_000 else min(int(math.log10(value * 1.000001) // 3), 6)
    shown = np.format_float_positional(float(f"{value / 1000**power:.6g}"), trim="-")
    return f"{shown} {PREFIXES[power]}".strip()


def _width(text: str) -> float:
    return CHARACTER * len(text)


def _fit(marks: dict[float, str], room: Callable[[list[str]], float]) -> bool:
    gaps = [abs(b - a) for a, b in itertools.pairwise(marks)]
    return len(marks) <= TICKS and min(gaps, default=math.inf) >= room(list(marks.values()))


def _below(x: Axis, top: float, bottom: float, name: str) -> str:
    """The axis at the bottom of a picture: lines upwards, numbers and its name below."""
    marks = x.ticks(lambda texts: max(map(_width, texts), default=0.0) + GAP)
    return (
        "".join(
            _line(place, top, place, bottom, "grid")
            + _text(place, bottom + 18, text, "middle", "tick")
            for place, text in marks.items()
        )
        + _line(x.start, bottom, x.end, bottom, "axis")
        + _text(x.end, bottom + 36, name, "end", "name")
    )


def _beside(y: Axis) -> str:
    """The axis at the left: lines across, and numbers."""
    return "".join(
        _line(LEFT, place, RIGHT, place, "grid") + _text(LEFT - 8, place + 4, text, "end", "tick")
        for place, text in y.ticks(lambda _: 26.0).items()
    )


def _figure(
    title: str,
    height: float,
    parts: Iterable[str],
    key: Sequence[tuple[str, str]],
    about: str = "",
) -> Figure:
    begin = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
    return Figure(title, f"{begin}{''.join(parts)}</svg>", height, tuple(key), about)


def _bar(x: Axis, begin: float, end: float, top: float, height: float, kind: str, tip: str) -> str:
    """From one value to another."""
    return _rect(x.at(begin), top, x.at(end) - x.at(begin), height, kind, tip)


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _rect(x: float, y: float, width: float, height: float, kind: str, tip: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" '
        f'height="{max(height, 0):.1f}"><title>{escape(tip)}</title></rect>'
    )


def _dot(x: float, y: float, radius: float, kind: str, tip: str) -> str:
    return (
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">'
        f"<title>{escape(tip)}</title></circle>"
    )


def _path(places: Sequence[tuple[float, float]], kind: str) -> str:
    if len(places) < 2:
        return ""
    points = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return f'<path class="{kind}" d="M{points}"/>'
