"""Axes, marks and texts of pictures as SVG: where they are, and no colours.

What a mark looks like is said by its class, in html.py. Every coordinate lies within the viewBox:
axes end where their data do, and beyond is their end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from .schema import PREFIXES

WIDTH, LEFT, RIGHT = 640, 64, 620  # of a picture; where its axes begin and end
CHARACTER = 7.2  # width of one, in the 12 units high type of ticks
GAP = 12  # between labels
TICKS = 10  # on an axis, at most


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
            yield {self.at(number / self.factor): tick_text(number) for number in shown}

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


def tick_text(value: float) -> str:
    power = 0 if value < 10_000 else min(int(math.log10(value * 1.000001) // 3), 6)
    shown = np.format_float_positional(float(f"{value / 1000**power:.6g}"), trim="-")
    return f"{shown} {PREFIXES[power]}".strip()


def text_width(text: str) -> float:
    return CHARACTER * len(text)


def _fit(marks: dict[float, str], room: Callable[[list[str]], float]) -> bool:
    gaps = [abs(b - a) for a, b in itertools.pairwise(marks)]
    return len(marks) <= TICKS and min(gaps, default=math.inf) >= room(list(marks.values()))


def draw_below(x: Axis, top: float, bottom: float, name: str) -> str:
    """The axis at the bottom of a picture: lines upwards, numbers and its name below."""
    marks = x.ticks(lambda texts: max(map(text_width, texts), default=0.0) + GAP)
    return (
        "".join(
            draw_line(place, top, place, bottom, "grid")
            + draw_text(place, bottom + 18, text, "middle", "tick")
            for place, text in marks.items()
        )
        + draw_line(x.start, bottom, x.end, bottom, "axis")
        + draw_text(x.end, bottom + 36, name, "end", "name")
    )


def draw_beside(y: Axis) -> str:
    """The axis at the left: lines across, and numbers."""
    return "".join(
        draw_line(LEFT, place, RIGHT, place, "grid")
        + draw_text(LEFT - 8, place + 4, text, "end", "tick")
        for place, text in y.ticks(lambda _: 26.0).items()
    )


def draw_figure(
    title: str,
    height: float,
    parts: Iterable[str],
    key: Sequence[tuple[str, str]],
    about: str = "",
) -> Figure:
    begin = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
    return Figure(title, f"{begin}{''.join(parts)}</svg>", height, tuple(key), about)


def draw_bar(
    x: Axis, begin: float, end: float, top: float, height: float, kind: str, tip: str
) -> str:
    """From one value to another."""
    return draw_rect(x.at(begin), top, x.at(end) - x.at(begin), height, kind, tip)


def draw_text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def draw_line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def draw_rect(x: float, y: float, width: float, height: float, kind: str, tip: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" '
        f'height="{max(height, 0):.1f}"><title>{escape(tip)}</title></rect>'
    )


def draw_dot(x: float, y: float, radius: float, kind: str, tip: str) -> str:
    return (
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">'
        f"<title>{escape(tip)}</title></circle>"
    )


def draw_path(places: Sequence[tuple[float, float]], kind: str) -> str:
    if len(places) < 2:
        return ""
    points = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return f'<path class="{kind}" d="M{points}"/>'
