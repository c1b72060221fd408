"""What a sweep found, as a table and as a page with the settings that are worth having."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from . import html
from .cells import Section, between
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
from .sweep import Outcome, notes, told
from .table import drawn

HEIGHT, TOP, BOTTOM = 344, 30, 300


def print_outcomes(outcomes: Sequence[Outcome], task: str = "") -> None:
    """The tables, and what must be known to believe them."""
    console = Console()
    for each in sections(outcomes, task):
        console.print(Text(each.title, style="bold"))
        console.print(drawn(each))
        console.print()
    for note in notes(outcomes):
        console.print(Text(note, style="yellow"))


def sections(outcomes: Sequence[Outcome], task: str = "") -> list[Section]:
    """All that was tried, the lowest latency first; and where any are known, scores of the bundles
    for the task, as what is faster may be worse.
    """
    heads = (
        *("settings", "precision", "one request alone", "95 % interval"),
        *("requests a second", "95 % interval", "worth having"),
    )
    rows = tuple(
        (
            told(one.choice),
            one.precision,
            quantity(one.latency, "s"),
            between(one.latency_low, one.latency_high, "s"),
            quantity(one.throughput, "1/s"),
            between(one.throughput_low, one.throughput_high, "1/s"),
            one.problem or ("yes" if one.worth else "no"),
        )
        for one in outcomes
    )
    settings = Section("Settings", heads, rows)
    bundles = {one.choice.bundle: one for one in outcomes if one.model}
    if not any(_scores(one, task) for one in bundles.values()):
        return [settings]
    scored = tuple(
        (name, one.precision, _scores(one, task) or "not known") for name, one in bundles.items()
    )
    return [settings, Section("Scores", ("bundle", "precision", task), scored)]


def _scores(one: Outcome, task: str) -> str:
    """Those of `nuwa evaluate` for the task: "joint 0.953, fid 4.1"."""
    known = (one.model.get("evaluation") or {}).items()
    of_task = ((name.removeprefix(f"{task} "), value) for name, value in known if _of(name, task))
    return ", ".join(f"{name} {value:.3f}" for name, value in of_task if value is not None)


def _of(name: str, task: str) -> bool:
    return name.startswith(f"{task} ")


def page(outcomes: Sequence[Outcome], chosen: Outcome | None, command: str, task: str = "") -> str:
    """As HTML. chosen: None where there is nothing to choose from."""
    picture = pareto(outcomes, chosen)
    problems = [f"{told(one.choice)}: {one.problem}" for one in outcomes if one.problem]
    return html.document(
        "Settings of a server",
        [command, *([] if chosen is None else [f"chosen: {told(chosen.choice)}"])],
        [*notes(outcomes), *problems],
        "",
        [] if picture is None else [picture],
        sections(outcomes, task),
        "Point at a mark to read its settings.",
    )


def pareto(outcomes: Sequence[Outcome], chosen: Outcome | None) -> Figure | None:
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
        first = chosen is not None and one.choice == chosen.choice
        kind = "dot p99" if first else "dot p50" if one.worth else "dot missed"
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
