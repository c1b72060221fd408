"""A page for people: what a server does now, and did in the last minutes. HTML without scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from prometheus_client import CollectorRegistry

from .history import MEMORY, Buckets, Point, buckets_of

REFRESH_SECONDS = 5
SMOOTHED = 5  # points over which a rate is taken
WIDTH, HEIGHT = 320, 96
COLOURS = ("#3b7dd8", "#d8743b", "#3ba272", "#b04fc4", "#8a8f98")
PHASES = ("queue", "encode", "decode", "pixels", "request")
ANSWERED = ("ok", "kept")  # outcomes of requests; kept: an answer that was given before

STYLE = """
:root { color-scheme: light dark; --faint: color-mix(in srgb, currentColor 12%, transparent); }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; }
body { padding: 0 1rem; }
h1 { font-size: 1.35rem; display: flex; gap: .8rem; align-items: center; margin: 0; }
h2 { font-size: 1rem; margin: 2rem 0 .6rem; }
.pill { font-size: .8rem; padding: .1rem .7rem; border-radius: 1rem; color: white; }
.yes { background: #2c8a5b; } .no { background: #b83a3a; }
.about { opacity: .7; margin: .2rem 0 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .7rem .8rem; border: 1px solid var(--faint); border-radius: .5rem; }
figcaption { display: flex; justify-content: space-between; font-size: .85rem; }
figure svg { width: 100%; height: auto; display: block; margin-top: .4rem; }
.key { font-size: .78rem; display: flex; gap: .9rem; flex-wrap: wrap; min-height: 1.2rem; }
.key i { display: inline-block; width: .7rem; height: .2rem; margin-right: .3rem; }
.key i { vertical-align: middle; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--faint); }
td { white-space: nowrap; } .left { text-align: left; }
th { font-weight: 600; font-size: .85rem; } th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; }
""".strip()


@dataclass(frozen=True)
class ModelRow:
    """A model as the page shows it."""

    title: str
    tasks: str
    backend: str
    precision: str
    slots: int
    used: int
    waiting: int
    queue_size: int
    bundle: str


@dataclass(frozen=True)
class Facts:
    """What a server says of itself now. uptime in seconds, memory in 10**6 bytes."""

    version: str
    address: str
    ready: bool
    uptime: float
    megabytes: float
    models: Sequence[ModelRow]


def page(facts: Facts, points: Sequence[Point], registry: CollectorRegistry) -> str:
    """The whole document."""
    state, name = ("yes", "ready") if facts.ready else ("no", "not ready")
    minutes = (points[-1].time - points[0].time) / 60 if points else 0.0
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>NÜWA on {escape(facts.address)}</title>
<meta name="viewport" content="width=device-width"><meta http-equiv="refresh"
content="{REFRESH_SECONDS}"><style>{STYLE}</style></head><body>
<h1>nuwa-runtime <span class="pill {state}">{name}</span></h1>
<p class="about">{escape(facts.address)} · version {escape(facts.version)} · up
{_duration(facts.uptime)} · {facts.megabytes:.0f} MB</p>
<h2>Models</h2>{_models(facts.models)}
<h2>The last {_duration(60 * minutes)}</h2><div class="charts">{_charts(points)}</div>
<h2>By task, since the start</h2>{_tasks(registry)}
<h2>Errors that clients were told of</h2>{_errors(registry)}
<p class="about">The same for Prometheus: <a href="metrics">metrics</a>. This page is loaded anew
every {REFRESH_SECONDS} s.</p></body></html>
"""


def _models(rows: Sequence[ModelRow]) -> str:
    return _table(
        ("model", "tasks", "backend", "precision", "slots used", "waiting", "bundle"),
        [
            (
                row.title,
                row.tasks,
                row.backend,
                row.precision,
                f"{row.used} of {row.slots}",
                f"{row.waiting} of {row.queue_size}",
                row.bundle[:12],
            )
            for row in rows
        ],
    )


def _charts(points: Sequence[Point]) -> str:
    def last(name: str) -> list[float | None]:
        return [point.gauges.get(name, 0.0) for point in points]

    outcomes = sorted({name for point in points for name in point.requests})
    others = [name for name in outcomes if name not in ANSWERED]

    def ended(names: Sequence[str]) -> list[float | None]:
        return _rates(points, lambda p: sum(p.requests.get(name, 0.0) for name in names))

    return "".join(
        (
            _chart(
                "Requests a second",
                {"answered": ended(ANSWERED), "refused, failed, left": ended(others)},
                points,
                _plain,
            ),
            _chart(
                "Frames a second", {"frames": _rates(points, lambda p: p.frames)}, points, _plain
            ),
            _chart(
                "Slots and queue",
                {"slots used": last("nuwa_slots_used"), "waiting": last("nuwa_requests_waiting")},
                points,
                _plain,
            ),
            _chart(
                "Request, from call to end",
                _spread(points, lambda p: p.durations),
                points,
                _seconds,
            ),
            _chart(
                "Decode step",
                _spread(points, lambda p: p.steps),
                points,
                _seconds,
            ),
            _chart("Memory", {"of this process": last(MEMORY)}, points, _megabytes),
        )
    )


def _pairs(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Each point with the one that it is compared with."""
    return [(points[max(0, i - SMOOTHED)], point) for i, point in enumerate(points)]


def _rates(points: Sequence[Point], count: Callable[[Point], float]) -> list[float | None]:
    return [
        (count(now) - count(then)) / (now.time - then.time) if now.time > then.time else None
        for then, now in _pairs(points)
    ]


def _spread(
    points: Sequence[Point], histogram: Callable[[Point], Buckets]
) -> dict[str, list[float | None]]:
    found = [histogram(now).since(histogram(then)) for then, now in _pairs(points)]
    return {
        name: [each.quantile(share) for each in found]
        for name, share in (("median", 0.5), ("99 %", 0.99))
    }


def _chart(
    title: str,
    series: dict[str, list[float | None]],
    points: Sequence[Point],
    unit: Callable[[float], str],
) -> str:
    """Lines over time, from zero to the largest value; gaps where there is none."""
    top = _round_up(max((v for line in series.values() for v in line if v is not None), default=0))
    first, last = (points[0].time, points[-1].time) if points else (0.0, 0.0)
    span = max(last - first, 1e-9)

    def path(values: list[float | None]) -> str:
        parts, pen = [], "M"
        for point, value in zip(points, values, strict=True):
            if value is None:
                pen = "M"
                continue
            x = WIDTH * (point.time - first) / span
            parts.append(f"{pen}{x:.1f} {HEIGHT - 2 - (HEIGHT - 6) * value / top:.1f}")
            pen = "L"
        return "".join(parts)

    lines = "".join(
        f'<path d="{path(values)}" fill="none" stroke="{colour}" stroke-width="1.6" '
        f'stroke-linejoin="round" stroke-linecap="round"/>'
        for values, colour in zip(series.values(), COLOURS, strict=False)
    )
    key = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)} {_latest(values, unit)}</span>'
        for (name, values), colour in zip(series.items(), COLOURS, strict=False)
    )
    grid = "".join(
        f'<line x1="0" x2="{WIDTH}" y1="{y:.0f}" y2="{y:.0f}" stroke="currentColor" opacity=".12"/>'
        for y in (4, HEIGHT / 2 + 1, HEIGHT - 2)
    )
    return (
        f"<figure><figcaption><b>{escape(title)}</b><span>{unit(top)}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{grid}{lines}'
        f'</svg><div class="key">{key}</div></figure>'
    )


def _latest(values: list[float | None], unit: Callable[[float], str]) -> str:
    value = values[-1] if values else None
    return "–" if value is None else unit(value)


def _round_up(value: float) -> float:
    """To 1, 2 or 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 5, 10) if power * step >= value * (1 - 1e-9))


def _tasks(registry: CollectorRegistry) -> str:
    families = {family.name: family.samples for family in registry.collect()}
    keys = {
        (sample.labels["model"], sample.labels["task"])
        for sample in families.get("nuwa_requests", ())
        if sample.name == "nuwa_requests_total" and sample.labels["task"] != "none"
    }
    rows = []
    for model, task in sorted(keys):
        labels = {"model": model, "task": task}
        counts = {"ok": 0.0, "other": 0.0}
        for sample in families["nuwa_requests"]:
            if sample.name == "nuwa_requests_total" and labels.items() <= sample.labels.items():
                kind = "ok" if sample.labels["outcome"] in ANSWERED else "other"
                counts[kind] += sample.value

        def cell(name: str, labels: dict[str, str] = labels) -> str:
            found = buckets_of(families.get(f"nuwa_{name}_seconds", ()), **labels)
            return _both(found)

        rows.append(
            (
                model,
                task,
                f"{counts['ok']:.0f}",
                f"{counts['other']:.0f}",
                cell("time_to_first_frame"),
                *(cell(f"{phase}_duration") for phase in PHASES),
            )
        )
    heads = ("model", "task", "answered", "others", "first frame")
    return _table((*heads, *PHASES[:-1], "whole request"), rows) + (
        '<p class="about">Times: median / 99 %, as far as histograms tell them apart.</p>'
    )


def _both(found: Buckets) -> str:
    median, high = found.quantile(0.5), found.quantile(0.99)
    return "–" if median is None or high is None else f"{_seconds(median)} / {_seconds(high)}"


def _errors(registry: CollectorRegistry) -> str:
    rows = [
        (sample.labels["reason"], f"{sample.value:.0f}")
        for family in registry.collect()
        if family.name == "nuwa_errors"
        for sample in family.samples
        if sample.name == "nuwa_errors_total"
    ]
    return _table(("reason", "times"), sorted(rows)) if rows else "<p>none</p>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(each))}</td>" for each in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _plain(value: float) -> str:
    return f"{value:.3g}"


def _megabytes(value: float) -> str:
    return f"{value:.0f} MB"


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f}".removesuffix(".0") + f" {unit}"
    return f"{seconds:.0f} s"
