"""A result of `nuwa bench` in tables: what the terminal prints, and the page repeats.

Every cell is text. Knows the result's shape, and neither colours nor pictures; any part of a result
may be missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cells import Section, between, estimate, interval, quantiles, words
from .load_tables import load, server, server_steps
from .schema import count, percentile, quantity, several, share

STEPS = 10  # sizes of a step that are shown, of those that took most of the time
UNITS = {"_bytes": "B", "_seconds": "s", "_watts": "W", "_joules": "J"}  # by a field's last word
SHARES = ("_share", "slower")  # how names of shares of 1 end
PARTS = (
    *("warm_up", "conditions", "loadgen", "memory", "power"),
    *("model", "workload", "scenario", "machine"),
)
LABELS = {"measuring": "measuring takes"}  # of metrics, where their names say too little
INSIDE = ("media_encoding", "prefill")  # phases that are part of another: of client, of decode
OVERLAP = "Phases overlap: together they are longer than a request."
INDENT = "\u00a0\u00a0"  # of a name that belongs to the one above


def print(result: dict[str, Any], console: Console) -> None:
    """Prints the result: what must be known to believe it, what has to be moved and done, and then
    what was measured.
    """
    console.print(Text(heading(result), style="bold"))
    for line in subtitle(result):
        console.print(Text(line, style="dim"))
    for note in result.get("notes") or ():
        console.print(Text(str(note), style="yellow"))
    for section in sections(result):
        console.print()
        console.print(Text(section.title, style="bold"))
        console.print(drawn(section))
        for note in section.notes:
            console.print(Text(note, style="dim"))


def heading(result: dict[str, Any]) -> str:
    """What was measured, in a few words: "sprites, t2v, single-stream"."""
    model, workload, scenario = (
        result.get(part) or {} for part in ("model", "workload", "scenario")
    )
    names = (model.get("name"), workload.get("task"), scenario.get("name"))
    return ", ".join(str(name) for name in names if name) or "nuwa bench"


def subtitle(result: dict[str, Any]) -> list[str]:
    """Where it was measured, and when."""
    model, machine = result.get("model") or {}, result.get("machine") or {}
    cores = machine.get("cores")
    what = (
        " on ".join(str(model[name]) for name in ("precision", "backend") if model.get(name)),
        machine.get("processor"),
        several(cores, "core") if cores else None,
        *(gpu.get("name") if isinstance(gpu, dict) else gpu for gpu in machine.get("gpus") or ()),
        (result.get("workload") or {}).get("target"),
    )
    lines = (", ".join(str(each) for each in what if each), result.get("when"))
    return [line for line in lines if line]


def sections(result: dict[str, Any]) -> list[Section]:
    """Every table that has rows, the card first."""
    measured = (_results, _launches, _phases, _steps, server, server_steps, load, _outcomes)
    made = (_card, *measured, _conditions)
    return [section for section in (make(result) for make in made) if section.rows]


def _card(result: dict[str, Any]) -> Section:
    card = result.get("card") or {}
    rates = card.get("rates") or {}
    rows: list[tuple[str, str | None]] = [
        ("steps", _steps_of(card)),
        ("rows in a step", _span(card.get("rows_per_step"))),
        ("weights, read at every step", _given(card, "weights_bytes", "B")),
        ("operations of a row", _given(card, "flops_per_row", "FLOP")),
        ("cache of a sequence", _given(card, "cache_bytes_per_sequence", "B")),
        ("a generation moves", _given(card, "generation_bytes", "B")),
        ("a generation computes", _computes(card)),
        ("copying, measured", _given(rates, "copy_bytes_per_second", "B/s")),
        ("multiplying, measured", _by_rows(rates.get("gemm"), "flops_per_second", "FLOP/s")),
        ("floor of a step", _by_rows(card.get("floor_by_rows"), "seconds", "s")),
        ("floor of a generation", _floor(card)),
        ("floor of one among several", _among(card.get("floor_together"))),
        ("floor until the first frame", _first_frame(card)),
    ]
    notes = (str(card["floor_note"]),) if card.get("floor_note") else ()
    known = tuple((name, value) for name, value in rows if value)
    return Section("What it takes", (), known, notes)


def _among(together: dict[str, Any] | None) -> str | None:
    """Only where they are several: else it is that of a generation, or less."""
    if not together or together.get("seconds") is None or together["generations"] <= 1:
        return None
    return f"{quantity(together['seconds'], 's')} ({together['generations']:.3g} at a time)"


def _first_frame(card: dict[str, Any]) -> str | None:
    if (card.get("frames") or 1) < 2:
        return None
    return _given(card, "floor_first_frame_seconds", "s")


def _steps_of(card: dict[str, Any]) -> str | None:
    steps, alone = card.get("steps"), card.get("one_by_one_steps")
    if steps is None:
        return None
    return count(steps) + (f" (one by one: {count(alone)})" if alone else "")


def _computes(card: dict[str, Any]) -> str | None:
    flops, moved = card.get("generation_flops"), card.get("generation_bytes")
    if flops is None:
        return None
    density = f", {quantity(flops / moved, 'FLOP/B')}" if moved else ""
    return quantity(flops, "FLOP") + density


def _given(part: dict[str, Any], name: str, unit: str) -> str | None:
    return None if part.get(name) is None else quantity(part[name], unit)


def _span(rows: list[int] | None) -> str | None:
    if not rows:
        return None
    return f"{count(min(rows))} .. {count(max(rows))}, mean {sum(rows) / len(rows):.1f}"


def _by_rows(entries: list[dict[str, Any]] | None, name: str, unit: str) -> str | None:
    """The values of the fewest and of the most rows."""
    known = [entry for entry in entries or () if entry.get(name) is not None and entry.get("rows")]
    known.sort(key=lambda entry: entry["rows"])
    ends = known[:1] + known[1:][-1:]
    return " .. ".join(
        f"{quantity(entry[name], unit)} ({several(entry['rows'], 'row')})" for entry in ends
    )


def _floor(card: dict[str, Any]) -> str | None:
    """The floor, and what moving and computing would take alone, where the card says it."""
    if card.get("floor_seconds") is None:
        return None
    alone = {"moving": "floor_bytes_seconds", "computing": "floor_products_seconds"}
    parts = [f"{name} {_given(card, key, 's')}" for name, key in alone.items() if card.get(key)]
    return quantity(card["floor_seconds"], "s") + (f" ({', '.join(parts)})" if parts else "")


def _results(result: dict[str, Any]) -> Section:
    metrics = (result.get("metrics") or {}).items()
    rows = tuple(
        row
        for name, metric in metrics
        for row in _metric(LABELS.get(name, words(name)), metric or {})
    )
    return Section("Results", ("metric", "value", "95 % interval", "at best", "of that"), rows)


def _launches(result: dict[str, Any]) -> Section:
    """Each launch of several beside the others."""
    launches = [each for each in result.get("each_launch") or () if each]
    rows = tuple(_launch(number, each) for number, each in enumerate(launches, 1))
    heads = ("launch", "answered", "latency, p50", "throughput")
    return Section("Launches", heads, rows if len(rows) > 1 else ())


def _launch(number: int, launch: dict[str, Any]) -> tuple[str, ...]:
    metrics = launch.get("metrics") or {}
    latency, throughput = (metrics.get(name) or {} for name in ("latency", "throughput"))
    return (
        str(number),
        count((launch.get("outcomes") or {}).get("ok") or 0),
        estimate((latency.get("quantiles") or {}).get("0.5"), latency.get("unit", "s")),
        quantity(throughput.get("value"), throughput.get("unit", "1/s")),
    )


def _metric(name: str, metric: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The rows of a metric, the first with its name; the floor stands beside what it is a share of:
    the median, the mean where the median was refused, or else the one value.
    """
    unit, value = metric.get("unit", ""), metric.get("value")
    floor, fraction = metric.get("floor"), metric.get("floor_fraction")
    beside = (
        "" if floor is None else quantity(floor, unit),
        "" if fraction is None else share(fraction),
    )
    statistics = list(_statistics(metric))
    median = ((metric.get("quantiles") or {}).get("0.5") or {}).get("value")
    least = "p50" if median is not None else "mean" if metric.get("mean") is not None else ""
    first = ("", "") if least else beside
    if value is not None or metric.get("needs"):
        shown = share(value) if value is not None and not unit else estimate(metric, unit)
        yield name, shown, interval(metric, unit), *first
    elif statistics:
        samples = metric.get("count")
        yield name, "" if samples is None else several(samples, "sample"), "", *first
    for statistic, *cells in statistics:
        yield INDENT + statistic, *cells, *(beside if statistic == least else ("", ""))
    if metric.get("of"):
        yield INDENT + str(metric["of"]), quantity(metric.get("watts"), "W"), "", "", ""
    if metric.get("idle_watts") is not None:
        yield INDENT + "idle", quantity(metric["idle_watts"], "W"), "", "", ""


def _statistics(metric: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    unit = metric.get("unit", "")
    if metric.get("mean") is not None:
        yield "mean", quantity(metric["mean"], unit), ""
    for key, entry in quantiles(metric):
        yield percentile(key), estimate(entry, unit), interval(entry, unit)
    span = between(metric.get("least"), metric.get("most"), unit)
    if span:
        yield "range", span, ""
    if metric.get("deviation") is not None:
        yield "deviation", quantity(metric["deviation"], unit), ""


def _phases(result: dict[str, Any]) -> Section:
    phases = {name: phase for name, phase in (result.get("phases") or {}).items() if phase}
    whole = ((result.get("metrics") or {}).get("latency") or {}).get("mean")
    rows = [_phase(name, phase, whole) for name, phase in phases.items()]
    total = sum(phase.get("mean") or 0.0 for name, phase in phases.items() if name not in INSIDE)
    overlap = whole is not None and total > 1.01 * whole
    notes = (OVERLAP,) if overlap else ()
    heads = ("phase", "mean", "p50", "p99", "most", "of latency")
    return Section("Phases of a request", heads, tuple(rows), notes)


def _phase(name: str, phase: dict[str, Any], whole: float | None) -> tuple[str, ...]:
    unit, mean = phase.get("unit", "s"), phase.get("mean")
    found = phase.get("quantiles") or {}
    return (
        words(name),
        quantity(mean, unit),
        estimate(found.get("0.5"), unit),
        estimate(found.get("0.99"), unit),
        quantity(phase.get("most"), unit),
        share(mean / whole if mean is not None and whole else None),
    )


def _steps(result: dict[str, Any]) -> Section:
    steps = [step for step in result.get("steps") or () if step.get("rows") is not None]

    def taken(step: dict[str, Any]) -> float:
        return (step.get("count") or 0) * (step.get("median") or 0.0)

    shown = sorted(sorted(steps, key=taken)[-STEPS:], key=lambda step: step["rows"])
    notes: tuple[str, ...] = ()
    if len(shown) < len(steps):
        part = sum(map(taken, shown)) / (sum(map(taken, steps)) or 1.0)
        notes = (f"{len(shown)} of {len(steps)} sizes, {share(part)} of the time in steps.",)
    heads = ("rows in a step", "steps", "median", "p99", "floor", "of floor")
    return Section("Steps", heads, tuple(map(_step, shown)), notes)


def _step(step: dict[str, Any]) -> tuple[str, ...]:
    median, floor = step.get("median"), step.get("floor")
    return (
        count(step["rows"]),
        count(step.get("count")),
        quantity(median, "s"),
        quantity(step.get("p99"), "s"),
        quantity(floor, "s"),
        share(floor / median if floor is not None and median else None),
    )


def _outcomes(result: dict[str, Any]) -> Section:
    outcomes = result.get("outcomes") or {}
    total = sum(outcomes.values())
    rows = [
        (name, count(number), share(number / total if total else None))
        for name, number in outcomes.items()
    ]
    return Section("Outcomes", ("outcome", "requests", "share"), tuple(rows))


def _conditions(result: dict[str, Any]) -> Section:
    """All that the numbers depend on, as it is."""
    rows: list[tuple[str, str]] = []
    for part in PARTS:
        told = _warm_up(result) if part == "warm_up" else None
        rows += [told] if told else _pairs(result.get(part) or {}, words(part))
    if result.get("command"):
        rows.append(("command", result["command"]))
    return Section("Conditions", (), tuple(rows))


def _warm_up(result: dict[str, Any]) -> tuple[str, str] | None:
    warm_up = result.get("warm_up") or {}
    if warm_up.get("requests") is None:
        return None
    taken = _given(warm_up, "seconds", "s")
    steady = warm_up.get("steady")
    state = None if steady is None else "steady" if steady else "not steady"
    parts = (several(warm_up["requests"], "request"), taken, state)
    return "warm-up", ", ".join(part for part in parts if part)


def _pairs(part: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """A part's values by name, without those that could not be had."""
    for name, value in part.items():
        if value is not None and value != {}:
            yield f"{prefix}, {words(name)}", _plain(value, name)


def _plain(value: Any, name: str = "") -> str:
    """A value in words; what is within an object, or a list of them, one after the other."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        unit = next((unit for end, unit in UNITS.items() if name.endswith(end)), None)
        if unit:
            return quantity(value, unit)
        if name == "parameters":
            return count(value)
        if name.endswith(SHARES):
            return share(value)
        return f"{value:.4g}" if isinstance(value, float) and abs(value) < 10_000 else str(value)
    if isinstance(value, dict):
        known = ((key, inner) for key, inner in value.items() if inner is not None)
        return ", ".join(f"{words(key)} {_plain(inner, key)}" for key, inner in known)
    if isinstance(value, list):
        return "; ".join(_plain(inner) for inner in value) or "none"
    return str(value)


def drawn(section: Section) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, show_header=bool(section.heads), show_edge=False, pad_edge=False
    )
    for index, head in enumerate(section.heads or ("", "")):
        numbers = index > 0 and bool(section.heads)
        table.add_column(Text(head), justify="right" if numbers else "left", overflow="fold")
    for row in section.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
