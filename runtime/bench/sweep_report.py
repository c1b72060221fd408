"""What a sweep found, as a table and as a page with the settings that are worth having."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from . import html
from .drawing import (
    LEFT,
    RIGHT,
    Figure,
    axis,
    draw_below,
    draw_beside,
    draw_dot,
    draw_figure,
    draw_path,
    draw_text,
)
from .schema import quantity
from .sweep import Outcome, told
from .table import Section, drawn

HEIGHT, TOP, BOTTOM = 344, 30, 300


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """The table."""
    Console().print(drawn(section(outcomes)))


def section(outcomes: Sequence[Outcome]) -> Section:
    """All that was tried, the lowest latency first."""
    heads = ("settings", "precision", "one request alone", "requests a second", "worth having")
    rows = tuple(
        (
            told(one.choice),
            one.precision,
            quantity(one.latency, "s"),
            quantity(one.throughput, "1/s"),
            one.problem or ("yes" if one.worth else "no"),
        )
        for one in outcomes
    )
    return Section("Settings", heads, rows)


def page(outcomes: Sequence[Outcome], chosen: Outcome, command: str) -> str:
    """As HTML."""
    picture = pareto(outcomes, chosen)
    return html.document(
        "Settings of a server",
        [command, f"chosen: {told(chosen.choice)}"],
        [f"{told(one.choice)}: {one.problem}" for one in outcomes if one.problem],
        "",
        [] if picture is None else [picture],
        [section(outcomes)],
        "Point at a mark to read its settings.",
    )


def pareto(outcomes: Sequence[Outcome], chosen: Outcome) -> Figure | None:
    """Latency of one request alone over throughput; below and to the right is better."""
    known = [
        (one, one.latency, one.throughput)
        for one in outcomes
        if one.latency is not None and one.throughput is not None
    ]
    if not known:
        return None
    x = axis((throughput for _, _, throughput in known), LEFT, RIGHT)
    y = axis((latency for _, latency, _ in known), BOTTOM, TOP, seconds=True)
    front = sorted(
        (x.at(throughput), y.at(latency)) for one, latency, throughput in known if one.worth
    )
    dots = []
    for one, latency, throughput in known:
        kind = (
            "dot p99" if one.choice == chosen.choice else "dot p50" if one.worth else "dot missed"
        )
        tip = f"{told(one.choice)}: {quantity(latency, 's')}, {quantity(throughput, '1/s')}"
        dots.append(draw_dot(x.at(throughput), y.at(latency), 5, kind, tip))
    parts = (
        draw_beside(y),
        draw_below(x, TOP, BOTTOM, "requests a second, slots full"),
        draw_path(front, "line p50"),
        *dots,
        draw_text(LEFT, 14, f"one request alone, {y.seconds}", "start", "name"),
    )
    key = [("dot p50", "worth having"), ("dot p99", "chosen"), ("dot missed", "beaten by another")]
    return draw_figure("Latency against throughput", HEIGHT, parts, key)
