"""The pictures of a result of `nuwa bench`, as SVG: places of marks, and no colours.

What a mark looks like is said by its class, in html.py. A picture whose data are missing is None.
Every coordinate lies within the viewBox: axes end where their data do, and beyond is their end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from .schema import PREFIXES, count, percentile, quantity, share
from .table import interval, quantiles, words

WIDTH, LEFT, RIGHT = 640, 64, 620  # of a picture; where its axes begin and end
CHARACTER = 7.2  # width of one, in the 12 units high type of ticks
GAP = 12  # between labels
WIDE = 8  # largest over least value from which an axis is logarithmic
BINS = (6, 60)
CURVE = 300  # points of a distribution that are drawn
REQUESTS = 50
PHASES = ("queue", "encode", "decode", "pixels", "ranking", "client")  # have colours of their own
COLOURS = 9


@dataclass(frozen=True)
class Figure:
    """key: (class of the mark, what it is); about: how to read it."""

    title: str
    svg: str
    key: tuple[tuple[str, str], ...] = ()
    about: str = ""


@dataclass(frozen=True)
class Axis:
    """Takes values of low .. high to places of start .. end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """What lies outside is put at the end that is nearer."""
        low, high, here = (self._even(each) for each in (self.low, self.high, value))
        part = min(max((here - low) / (high - low), 0.0), 1.0)
        return self.start + part * (self.end - self.start)

    def ticks(self, room: Callable[[list[float]], float]) -> list[float]:
        """Round values that are at least room(values) apart; as many as there can be, up to ten."""

        def fit(values: list[float]) -> bool:
            places = [self.at(value) for value in values]
            gaps = [abs(b - a) for a, b in zip(places, places[1:], strict=False)]
            return len(values) <= 10 and min(gaps, default=math.inf) >= room(values)

        fitting = [values for values in self._powers() if fit(values)] if self.log else []
        if max(map(len, fitting), default=0) < 3:
            fitting += [values for values in self._multiples() if fit(values)]
        return max(fitting, key=len, default=[])

    def _even(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.log else value

    def _multiples(self) -> Iterable[list[float]]:
        power = 10.0 ** math.floor(math.log10(self.high - self.low))
        for step in (factor * power for factor in (0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10)):
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            yield [index * step for index in range(first, last + 1)]

    def _powers(self) -> Iterable[list[float]]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for factors, stride in (((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 3), ((1,), 6)):
            powers = range(first - first % stride, last + 1, stride)
            values = [factor * 10.0**power for power in powers for factor in factors]
            yield [value for value in values if self.low <= value * 1.000001 <= self.high * 1.00001]


def axis(values: Iterable[float], start: float, end: float, *, log: bool, zero: bool) -> Axis:
    """One on which all values lie, with some room; zero: from 0, where it is not logarithmic."""
    known = list(values)
    low, high = min(known), max(known)
    if log:
        slack = max((high / low) ** 0.04, 1.1)
        return Axis(low / slack, high * slack, start, end, True)
    slack = 0.04 * (high - (0.0 if zero else low)) or 0.05 * abs(high) or 1.0
    return Axis(0.0 if zero else max(low - slack, 0.0), high + slack, start, end)


def figures(result: dict[str, Any]) -> list[Figure]:
    """Every picture that has data."""
    made = (phases(result), distribution(result), load(result), roofline(result), timeline(result))
    return [figure for figure in made if figure]


def phases(result: dict[str, Any]) -> Figure | None:
    """The mean of each phase, one after the other, beside the mean latency."""
    given = (result.get("phases") or {}).items()
    means = {name: phase["mean"] for name, phase in given if phase and phase.get("mean")}
    if not means:
        return None
    whole = ((result.get("metrics") or {}).get("latency") or {}).get("mean")
    total = sum(means.values())
    factor, unit = _time(max(total, whole or 0.0))
    x, top, bottom = Axis(0.0, factor * max(total, whole or 0.0), LEFT, RIGHT), 40.0, 88.0
    colours, marks, done = _colours(result), "", 0.0
    for name, mean in means.items():
        begin, finish = x.at(factor * done), x.at(factor * (done + mean))
        tip = f"{words(name)} {quantity(mean, 's')}, {share(mean / total)} of all phases"
        marks += _rect(begin, top, finish - begin, bottom - top, colours[name], tip)
        done += mean
    if whole and whole > done:
        rest = f"in no phase {quantity(whole - done, 's')}"
        begin = x.at(factor * done)
        marks += _rect(begin, top, RIGHT - begin, bottom - top, "area rest", rest)
    if whole:
        label = f"mean latency {quantity(whole, 's')}"
        at = x.at(factor * whole)
        (place,) = apart([at], [_width(label)], LEFT, RIGHT)
        marks += _line(at, 30, at, bottom, "mark") + _text(place, 22, label, "middle", "label")
    key = tuple(
        (colours[name], f"{words(name)} {quantity(mean, 's')}") for name, mean in means.items()
    )
    return Figure(
        "Where a request's time goes",
        _svg("Phases", 132, _below(x, 34.0, bottom, f"time, {unit}"), marks),
        key,
        "Means of the phases one after the other, and the mean latency.",
    )


def distribution(result: dict[str, Any], name: str = "latency") -> Figure | None:
    """How many requests took how long, and which share took at most so long, of a metric in s."""
    rounds = (result.get("rounds") or {}).get(name) or []
    seconds = [value for each in rounds for value in each or () if value is not None]
    if not seconds:
        return None
    metric = (result.get("metrics") or {}).get(name) or {}
    known = [(key, entry) for key, entry in quantiles(metric) if entry.get("value") is not None]
    floor = metric.get("floor")
    factor, unit = _time(max(seconds))
    reach = [*seconds, *(entry["value"] for _, entry in known), *([] if floor is None else [floor])]
    log = min(reach) > 0 and max(reach) > WIDE * min(reach)
    x = axis((factor * value for value in reach), LEFT, RIGHT, log=log, zero=False)
    values = np.array(seconds) * factor
    counts, edges = _histogram(values, x)
    top, middle, upper, bottom = 52.0, 172.0, 200.0, 320.0
    y_count = Axis(0.0, max(counts) * 1.05, middle, top)
    y_share = Axis(0.0, 1.0, bottom, upper)

    bars = ""
    for number, begin, finish in zip(counts, edges, edges[1:], strict=False):
        height = y_count.at(number)
        bars += _rect(
            begin, height, max(finish - begin - 1, 1), middle - height, "bar", count(number)
        )
    marks, labels = "", []
    if floor is not None:
        labels.append((x.at(factor * floor), f"floor {quantity(floor, 's')}", "floor"))
    for key, entry in known:
        place, height = x.at(factor * entry["value"]), y_share.at(float(key))
        if entry.get("low") is not None and entry.get("high") is not None:
            low, high = x.at(factor * entry["low"]), x.at(factor * entry["high"])
            marks += _line(low, height, high, height, "whisker")
        tip = f"{percentile(key)} {quantity(entry['value'], 's')} ({interval(entry, 's') or '?'})"
        marks += _dot(place, height, 3.5, "dot", tip)
        labels.append((place, f"{percentile(key)} {quantity(entry['value'], 's')}", "mark"))
    frame = (
        _beside(y_count, _tick)
        + _beside(y_share, lambda value: f"{100 * value:.0f} %")
        + _below(x, top, bottom, f"{words(name)}, {unit}")
        + _line(LEFT, middle, RIGHT, middle, "axis")
    )
    names = _text(LEFT, 14, "requests", "start", "name") + _text(
        LEFT, upper - 8, "share of requests that took at most so long", "start", "name halo"
    )
    curve = f'<path class="line curve" d="{_steps(values, x, y_share)}"/>'
    refused = [
        f"{percentile(key)} needs {count(entry['needs'])} samples"
        for key, entry in quantiles(metric)
        if entry.get("needs")
    ]
    about = [f"{count(len(seconds))} requests; lines through points: 95 % intervals", *refused]
    return Figure(
        words(name).capitalize(),
        _svg(
            "Distribution", 362, frame, bars, _flags(labels, 34, top, bottom), curve, marks, names
        ),
        (("area bar", "requests"), ("line curve", "share")),
        "; ".join(about) + ".",
    )


def load(result: dict[str, Any]) -> Figure | None:
    """Latency over the rate of requests, with the bound that was to be kept."""
    points = sorted(
        (each for each in result.get("load") or () if each.get("rate") is not None),
        key=lambda each: each["rate"],
    )
    scenario = result.get("scenario") or {}
    bound, level = scenario.get("slo_seconds"), percentile(scenario.get("slo_quantile") or "0.99")
    series = {
        name: [(each, each[name]) for each in points if each.get(name)] for name in ("p50", "p99")
    }
    heights = [value for line in series.values() for _, value in line]
    if not heights:
        return None
    heights += [bound] if bound else []
    factor, unit = _time(max(heights))
    log = max(heights) > WIDE * min(heights)
    x = axis((each["rate"] for each in points), LEFT, RIGHT, log=False, zero=True)
    y = axis((factor * value for value in heights), 300.0, 48.0, log=log, zero=True)
    marks = ""
    for (name, line), colour in zip(series.items(), ("line p50", "line p99"), strict=True):
        places = [(x.at(each["rate"]), y.at(factor * value)) for each, value in line]
        marks += _path(places, colour)
        for (each, value), (across, down) in zip(line, places, strict=True):
            tip = (
                f"{quantity(each['rate'], '1/s')} offered, "
                f"{quantity(each.get('achieved'), '1/s')} achieved: {name} {quantity(value, 's')}"
            )
            kind = f"{colour.removeprefix('line ')} {'missed' if each.get('met') is False else ''}"
            marks += _dot(across, down, 4, f"dot {kind}".strip(), tip)
    best = max((each["rate"] for each in points if each.get("met")), default=None)
    kept = (
        ""
        if best is None
        else _flags([(x.at(best), f"{quantity(best, '1/s')} kept", "mark")], 34, 48, 300)
    )
    if bound:
        height = y.at(factor * bound)
        kept += _line(LEFT, height, RIGHT, height, "slo")
        marks += _text(
            LEFT + 6, height - 6, f"{level} at most {quantity(bound, 's')}", "start", "label halo"
        )
    key = [("line p50", "p50"), ("line p99", "p99")]
    key += [("dot missed", "bound not kept")] if any(p.get("met") is False for p in points) else []
    frame = _beside(y, _tick) + _below(x, 48, 300, "requests offered, 1/s")
    names = _text(LEFT, 14, f"latency, {unit}", "start", "name")
    return Figure("Latency against load", _svg("Load", 344, frame, kept, marks, names), tuple(key))


def roofline(result: dict[str, Any]) -> Figure | None:
    """What steps of each size achieve, below the roof that the floor of their time is.

    In FLOP/s where the card says what a row takes, else in rows a second.
    """
    card = result.get("card") or {}
    known = [each for each in result.get("steps") or () if each.get("rows") and each.get("median")]
    if not known:
        return None
    flops = card.get("flops_per_row")
    each_row, unit = (flops, "FLOP/s") if flops else (1.0, "rows/s")

    def rate(rows: float, seconds: float) -> float:
        return rows * each_row / seconds

    roof = [
        (each["rows"], rate(each["rows"], each["seconds"]))
        for each in card.get("floor_by_rows") or ()
        if each.get("rows") and each.get("seconds")
    ] or [(each["rows"], rate(each["rows"], each["floor"])) for each in known if each.get("floor")]
    gemm = [
        (each["rows"], each["flops_per_second"])
        for each in (card.get("rates") or {}).get("gemm") or ()
        if flops and each.get("rows") and each.get("flops_per_second")
    ]
    rows = [each["rows"] for each in known]
    heights = [rate(each["rows"], each["median"]) for each in known]
    slow = [rate(each["rows"], each.get("p99") or each["median"]) for each in known]
    lines = {"line roof": sorted(roof), "line gemm": sorted(gemm)}
    x = axis(
        [*rows, *(r for line in lines.values() for r, _ in line)], LEFT, RIGHT, log=True, zero=False
    )
    y = axis(
        [*heights, *slow, *(v for line in lines.values() for _, v in line)],
        320.0,
        30.0,
        log=True,
        zero=False,
    )
    taken = [(each.get("count") or 1) * each["median"] for each in known]
    marks = "".join(
        _path([(x.at(r), y.at(value)) for r, value in line], kind) for kind, line in lines.items()
    )
    for each, height, low, time in zip(known, heights, slow, taken, strict=True):
        across, part = x.at(each["rows"]), time / sum(taken)
        floor = each.get("floor")
        told = "" if floor is None else f", {share(floor / each['median'])} of the floor"
        tip = (
            f"{count(each['rows'])} rows: median {quantity(each['median'], 's')}{told}, "
            f"{share(part)} of the time in steps"
        )
        marks += _line(across, y.at(height), across, y.at(low), "whisker")
        marks += _dot(across, y.at(height), 3 + 8 * math.sqrt(part), "dot step", tip)
    frame = _beside(y, _tick) + _below(x, 30, 320, "rows in a step")
    names = _text(LEFT, 14, unit, "start", "name")
    key = [("dot step", "steps; area: share of the time; line: down to p99")]
    key += [("line roof", "floor")] if len(roof) > 1 else []
    key += [("line gemm", "matrix multiplication alone")] if len(gemm) > 1 else []
    return Figure(
        "Steps below their roof",
        _svg("Roofline", 362, frame, marks, names),
        tuple(key),
        "The slope is what memory allows, the flat part what arithmetic does.",
    )


def timeline(result: dict[str, Any]) -> Figure | None:
    """Requests one below the other, each with its phases; what overlaps is drawn half as high."""
    given = (result.get("timeline") or {}).get("requests") or ()
    known = [each for each in given if _spanned([each.get("start"), each.get("end")])]
    known = sorted(known, key=lambda each: each["start"])[:REQUESTS]
    if not known:
        return None
    factor, unit = _time(max(each["end"] for each in known))
    x = axis(
        (factor * each[end] for each in known for end in ("start", "end")),
        LEFT,
        RIGHT,
        log=False,
        zero=True,
    )
    top, row = 26.0, min(max(380 / len(known), 9.0), 20.0)
    bottom = top + row * len(known)
    colours, marks, seen = _colours(result), "", dict[str, str]()
    for index, each in enumerate(known):
        above, high = top + row * index + 1, row - 2
        span = _since(each["start"], each["end"])
        begin, finish = x.at(factor * each["start"]), x.at(factor * each["end"])
        marks += _rect(
            begin, above, finish - begin, high, "area span", f"request {index + 1}, {span}"
        )
        until = -math.inf
        pieces = [
            (name, piece) for name, piece in (each.get("phases") or {}).items() if _spanned(piece)
        ]
        for name, (start, end) in sorted(pieces, key=lambda piece: piece[1][0]):
            over = start < until - 1e-9
            begin, finish = x.at(factor * start), x.at(factor * end)
            tip = f"request {index + 1}, {words(name)} {_since(start, end)}"
            marks += _rect(
                begin,
                above + (high / 2 if over else 0),
                finish - begin,
                high / 2 if over else high,
                colours[name],
                tip,
            )
            seen[name] = colours[name]
            until = max(until, end)
    every = 1 if row >= 15 else 5
    numbers = "".join(
        _text(LEFT - 8, top + row * (index + 0.5) + 4, str(index + 1), "end", "tick")
        for index in range(len(known))
        if index == 0 or (index + 1) % every == 0
    )
    frame = _below(x, top, bottom, f"time since the start, {unit}")
    names = _text(LEFT, 14, "request", "end", "name")
    key = [(colour, words(name)) for name, colour in seen.items()] + [("area span", "in no phase")]
    shown = f"The first {len(known)} of {len(given)} requests" if len(known) < len(given) else ""
    return Figure(
        "Requests over time",
        _svg("Timeline", round(bottom + 42), frame, marks, numbers, names),
        tuple(key),
        shown,
    )


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


def _flags(
    labels: Sequence[tuple[float, str, str]], height: float, top: float, bottom: float
) -> str:
    """Upright lines at places, each with its label above and a class."""
    widths = [_width(text) for _, text, _ in labels]
    centres = apart([place for place, _, _ in labels], widths, LEFT, RIGHT)
    return "".join(
        _line(place, top, place, bottom, kind)
        + _line(centre, height + 5, place, top, kind)
        + _text(centre, height, text, "middle", "label")
        for (place, text, kind), centre in zip(labels, centres, strict=True)
    )


def _histogram(values: np.ndarray, x: Axis) -> tuple[list[int], list[float]]:
    """(counts, places of their edges); as many bins as Freedman and Diaconis' rule says."""
    places = np.array([x.at(value) for value in values])
    if np.ptp(places) < 1:
        return [len(places)], [places[0] - 4, places[0] + 4]
    quarter, three = np.quantile(places, (0.25, 0.75))
    wide = 2 * (three - quarter) / len(places) ** (1 / 3)
    bins = int(np.clip(np.ptp(places) / wide if wide else BINS[1], *BINS))
    counts, edges = np.histogram(places, bins)
    return counts.tolist(), edges.tolist()


def _steps(values: np.ndarray, x: Axis, y: Axis) -> str:
    """The empirical distribution function, in CURVE of its steps where it has more."""
    ordered, number = np.sort(values), len(values)
    picked = np.unique(np.linspace(0, number - 1, min(number, CURVE)).astype(int))
    steps = (f"H{x.at(ordered[i]):.1f}V{y.at((i + 1) / number):.1f}" for i in picked)
    return f"M{x.at(ordered[0]):.1f} {y.at(0):.1f}{''.join(steps)}H{RIGHT}"


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


def _time(most: float) -> tuple[float, str]:
    """What seconds are multiplied by for an axis that goes so far, and the unit."""
    return (1000.0, "ms") if most < 1 else (1.0, "s")


def _spanned(pair: Sequence[float | None] | None) -> bool:
    return pair is not None and len(pair) == 2 and None not in pair


def _since(start: float, end: float) -> str:
    return f"{quantity(start, 's')} .. {quantity(end, 's')}"


def _tick(value: float) -> str:
    power = 0 if value < 10_000 else min(int(math.log10(value * 1.000001) // 3), 6)
    return f"{value / 1000**power:.6g} {PREFIXES[power]}".strip()


def _width(text: str) -> float:
    return CHARACTER * len(text)


def _below(x: Axis, top: float, bottom: float, name: str) -> str:
    """The axis at the bottom of a picture: lines upwards, numbers and its name below."""
    values = x.ticks(lambda values: max((_width(_tick(v)) for v in values), default=0.0) + GAP)
    marks = "".join(
        _line(x.at(value), top, x.at(value), bottom, "grid")
        + _text(x.at(value), bottom + 18, _tick(value), "middle", "tick")
        for value in values
    )
    line = _line(x.start, bottom, x.end, bottom, "axis")
    return marks + line + _text(x.end, bottom + 36, name, "end", "name")


def _beside(y: Axis, words: Callable[[float], str]) -> str:
    """The axis at the left: lines across, and numbers."""
    return "".join(
        _line(LEFT, y.at(value), RIGHT, y.at(value), "grid")
        + _text(LEFT - 8, y.at(value) + 4, words(value), "end", "tick")
        for value in y.ticks(lambda _: 26.0)
    )


def _svg(name: str, height: float, *parts: str) -> str:
    begin = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(name)}">'
    return begin + "".join(parts) + "</svg>"


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
