"""A result of `nuwa bench` as a page in one file: figures, pictures, tables. HTML without scripts.

Says what marks look like, by light and in the dark; where they are, plots.py says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from nuwa.spec.files import write_text

from .cells import Section, estimate, interval, words
from .drawing import Figure
from .plots import figures
from .schema import percentile, quantity, share
from .table import INDENT, heading, sections, subtitle

STYLE = """
:root { color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --ink: #1a1f26; --soft: #626c78; --faint: #e2e6ea;
  --blue: #2a6fc9; --pale: #a9c6ec; --orange: #cf6417; --floor: #0a8577; --red: #c0392f;
  --c0: #a3abb5; --c1: #dd9a2b; --c2: #2a6fc9; --c3: #74a53a; --c4: #8e4fb8; --c5: #c9587f;
  --c6: #2aa3b0; --c7: #8a6a4c; --c8: #4d5560; }
@media (prefers-color-scheme: dark) { :root {
  --page: #121519; --card: #1a1e24; --ink: #e4e8ed; --soft: #98a3af; --faint: #2d343d;
  --blue: #6ba5f2; --pale: #3b5c85; --orange: #f0965a; --floor: #4cc7b7; --red: #f07a6e;
  --c0: #717c89; --c1: #d9a148; --c2: #5b96e6; --c3: #8cba55; --c4: #b682dc; --c5: #de7f9f;
  --c6: #4fbcc8; --c7: #b08f6e; --c8: #b4bcc6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 82rem; padding: 2.2rem 1.2rem 3rem; background: var(--page);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; text-wrap: balance; }
h2 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: 0; } .about { color: var(--soft); font-size: .87rem; overflow-wrap: anywhere; }
.note { border-left: .25rem solid var(--orange); background: var(--card); margin-top: .8rem;
  padding: .5rem .9rem; border-radius: .2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .8rem;
  margin: 1.4rem 0 1rem; }
.tile, figure, .table { background: var(--card); border: 1px solid var(--faint);
  border-radius: .6rem; padding: .9rem 1.1rem; }
.tile b { display: block; font-size: 1.55rem; font-weight: 600; line-height: 1.3; }
.tile span { display: block; font-size: .87rem; } .tile .about { font-size: .8rem; }
.flow { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(34rem, 100%), 1fr));
  gap: 1rem; align-items: start; margin-bottom: 1rem; }
.column { display: grid; gap: 1rem; min-width: 0; } figure, .table { margin: 0; min-width: 0; }
.scroll { overflow-x: auto; }
figure svg.chart { display: block; width: 100%; min-width: 30rem; max-width: 46rem; }
figcaption { margin-top: .2rem; }
.key { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; font-size: .82rem; margin: 0 0 .5rem; }
.key svg { width: 1.2rem; height: .8rem; margin-right: .35rem; vertical-align: -.06rem; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; }
th { color: var(--soft); font-weight: 500; font-size: .8rem; vertical-align: bottom; }
th, td { text-align: right; padding: .28rem .9rem .28rem 0; white-space: nowrap; }
tr > :last-child { padding-right: 0; }
td { border-top: 1px solid var(--faint); vertical-align: top; } .more td { border-top: 0; }
tbody:first-child tr:first-child td { border-top: 0; }
th:first-child, td:first-child, .pairs td { text-align: left; }
.pairs td + td { white-space: normal; overflow-wrap: anywhere; }
.pairs td:first-child { color: var(--soft); } .table .about { margin-top: .5rem; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .tick, svg .name { fill: var(--soft); } svg .label { font-weight: 600; }
svg .halo { paint-order: stroke; stroke: var(--card); stroke-width: 5px; stroke-linejoin: round; }
.grid { stroke: var(--faint); } .axis { stroke: var(--soft); }
.mark { stroke: var(--soft); stroke-dasharray: 1 3; stroke-linecap: round; }
.floor { stroke: var(--floor); stroke-width: 1.5; stroke-dasharray: 6 4; }
.slo { stroke: var(--red); stroke-width: 1.5; stroke-dasharray: 6 4; }
.whisker { stroke: var(--ink); stroke-width: 2; opacity: .45; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.curve, .p50 { stroke: var(--blue); } .p99 { stroke: var(--orange); }
.roof { stroke: var(--floor); } .gemm { stroke: var(--soft); stroke-dasharray: 2 5; }
.dot { fill: var(--ink); stroke: var(--card); stroke-width: 1.5; }
.dot.p50, .dot.step { fill: var(--blue); } .dot.p99 { fill: var(--orange); }
.dot.step { fill-opacity: .8; }
.dot.missed { fill: var(--card); stroke: var(--soft); stroke-width: 2; }
.dot.undecided { opacity: 0.4; }
.dot.p50.missed { stroke: var(--blue); } .dot.p99.missed { stroke: var(--orange); }
.bar { fill: var(--pale); } .rest, .span { fill: var(--faint); }
.failed { fill: var(--red); opacity: .55; }
.c0 { fill: var(--c0); } .c1 { fill: var(--c1); } .c2 { fill: var(--c2); } .c3 { fill: var(--c3); }
.c4 { fill: var(--c4); } .c5 { fill: var(--c5); } .c6 { fill: var(--c6); } .c7 { fill: var(--c7); }
.c8 { fill: var(--c8); }
""".strip()
MORE = ' class="more"'  # of a row that belongs to one above
SHOWN = (
    ("latency", "0.5"),
    ("latency", "0.99"),
    ("time_to_first_frame", "0.5"),
    ("time_per_frame", "0.5"),
    ("realtime_factor", "0.5"),
)
SWATCHES = {
    "line": '<path class="{kind}" d="M1 6H19"/>',
    "dot": '<circle class="{kind}" cx="10" cy="6" r="5"/>',
    "area": '<rect class="{kind}" width="20" height="12"/>',
}


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes the page; whoever is killed meanwhile leaves the one that was there before. OSError"""
    write_text(path, page(result))


def page(result: dict[str, Any]) -> str:
    """The whole document."""
    tiles = "".join(_tile(*tile) for tile in _tiles(result))
    return document(
        heading(result),
        subtitle(result),
        [str(note) for note in result.get("notes") or ()],
        f'<div class="tiles">{tiles}</div>',
        figures(result),
        sections(result),
        "Ranges are 95 % intervals. Point at a mark to read its values.",
    )


def document(
    title: str,
    about: Iterable[str],
    notes: Iterable[str],
    first: str,
    pictures: Iterable[Figure],
    tables: Iterable[Section],
    last: str,
) -> str:
    """A page of these parts; `first` is HTML, all else is text."""
    lines = "".join(f'<p class="about">{escape(line)}</p>' for line in about)
    said = "".join(f'<p class="note">{escape(line)}</p>' for line in notes)
    drawn = _flow([(figure.height + 90, _figure(figure)) for figure in pictures])
    told = _flow([(28 * len(each.rows) + 70, _table(each)) for each in tables])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>{lines}{said}
{first}
{drawn}{told}
<p class="about">{escape(last)}</p>
</body></html>
"""


def _flow(blocks: list[tuple[float, str]]) -> str:
    """Two columns of about the same height, each in the order given; a block is (height, HTML)."""
    columns: list[list[int]] = [[], []]
    heights = [0.0, 0.0]
    for index in sorted(range(len(blocks)), key=lambda index: -blocks[index][0]):
        shorter = heights.index(min(heights))
        columns[shorter].append(index)
        heights[shorter] += blocks[index][0]
    drawn = (
        f'<div class="column">{"".join(blocks[index][1] for index in sorted(column))}</div>'
        for column in sorted(filter(None, columns), key=min)
    )
    return f'<div class="flow">{"".join(drawn)}</div>'


def _tiles(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The numbers to see first: (what, value, beside it)."""
    metrics = {name: metric for name, metric in (result.get("metrics") or {}).items() if metric}
    latency = metrics.get("latency") or {}
    for name, key in SHOWN:
        yield from _quantile(name, metrics.get(name) or {}, key)
        if (name, key) == ("latency", "0.99") and latency.get("floor_fraction") is not None:
            beside = f"the floor is {quantity(latency.get('floor'), 's')}"
            yield "of the floor's speed", share(latency["floor_fraction"]), beside
    for name in ("throughput", "highest_rate"):
        metric = metrics.get(name) or {}
        if metric.get("value") is not None:
            unit = metric.get("unit", "")
            yield words(name), quantity(metric["value"], unit), interval(metric, unit)


def _quantile(name: str, metric: dict[str, Any], key: str) -> Iterator[tuple[str, str, str]]:
    entry, unit = (metric.get("quantiles") or {}).get(key), metric.get("unit", "")
    if not entry:
        return
    title = f"{words(name)}, {percentile(key)}"
    if entry.get("value") is None:
        yield title, "–", estimate(entry, unit)
    else:
        yield title, quantity(entry["value"], unit), interval(entry, unit)


def _tile(what: str, value: str, beside: str) -> str:
    return (
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span>'
        f'<span class="about">{escape(beside)}</span></div>'
    )


def _figure(figure: Figure) -> str:
    key = "".join(
        f'<span><svg viewBox="0 0 20 12" aria-hidden="true">{_swatch(kind)}</svg>{escape(name)}'
        "</span>"
        for kind, name in figure.key
    )
    about = f'<figcaption class="about">{escape(figure.about)}</figcaption>' if figure.about else ""
    chart = figure.svg.replace("<svg ", '<svg class="chart" ', 1)
    return (
        f'<figure><h2>{escape(figure.title)}</h2><div class="key">{key}</div>'
        f'<div class="scroll">{chart}</div>{about}</figure>'
    )


def _swatch(kind: str) -> str:
    return SWATCHES[kind.partition(" ")[0]].format(kind=kind)


def _table(section: Section) -> str:
    def cells(row: tuple[str, ...], tag: str) -> str:
        return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)

    head = f"<thead><tr>{cells(section.heads, 'th')}</tr></thead>" if section.heads else ""
    body = "".join(
        f"<tr{MORE if row[0].startswith(INDENT) else ''}>{cells(row, 'td')}</tr>"
        for row in section.rows
    )
    notes = "".join(f'<p class="about">{escape(note)}</p>' for note in section.notes)
    kind = "" if section.heads else ' class="pairs"'
    return (
        f'<div class="table"><h2>{escape(section.title)}</h2><div class="scroll">'
        f"<table{kind}>{head}<tbody>{body}</tbody></table></div>{notes}</div>"
    )
