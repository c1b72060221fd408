"""The pictures of `nuwa bench`."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from nuwa.runtime.bench import drawing, plots

from .bench_report import (
    LATENCIES,
    Tags,
    awkward,
    figure,
    made_up,
    numbers,
    points,
    section,
    summary,
    texts_of,
)


@pytest.mark.parametrize("name", awkward())
def test_every_mark_lies_within_its_picture(name):
    figures = plots.figures(awkward()[name])
    assert len(figures) == 5
    for each in figures:
        tags = Tags(each.svg)
        _, _, width, height = map(float, (tags.of("svg")[0][0]["viewbox"] or "").split())
        places = [numbers(a, "x1", "y1") for a, _ in tags.of("line")]
        places += [numbers(a, "x2", "y2") for a, _ in tags.of("line")]
        places += [numbers(a, "cx", "cy") for a, _ in tags.of("circle")]
        for attributes, _ in tags.of("rect"):
            x, y, wide, high = numbers(attributes, "x", "y", "width", "height")
            assert wide > 0 and high >= 0
            places += [[x, y], [x + wide, y + high]]
        for attributes, _ in tags.of("path"):
            places += [list(place) for place in points(attributes["d"] or "")]
        for left, top, right, bottom in texts_of(tags):
            places += [[left, top], [right, bottom]]
        assert len(places) > 10
        assert all(0 <= x <= width and 0 <= y <= height for x, y in places), each.title


@pytest.mark.parametrize("name", awkward())
def test_no_text_is_written_over_another(name):
    for each in plots.figures(awkward()[name]):
        for a, b in itertools.combinations(texts_of(Tags(each.svg)), 2):
            beside = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert beside, (each.title, a, b)


@pytest.mark.parametrize("name", awkward())
def test_axes_have_ticks(name):
    for each in plots.figures(awkward()[name]):
        ticks = Tags(each.svg).of("text", "tick")
        assert len(ticks) >= 3, each.title


def test_ticks_are_round():
    def ticks(low: float, high: float, length: float, **more: Any) -> list[str]:
        return list(drawing.Axis(low, high, 0, length, **more).ticks(lambda _: 40.0).values())

    assert ticks(0, 103, 500) == ["0", "20", "40", "60", "80", "100"]
    assert ticks(0, 0.103, 500, factor=1000) == ["0", "20", "40", "60", "80", "100"]
    assert ticks(1, 34, 500, log=True) == ["1", "2", "5", "10", "20"]
    assert ticks(10, 1e6, 300, log=True) == ["10", "100", "1000", "10 k", "100 k", "1 M"]
    assert ticks(31, 39, 300, log=True) == ["32", "34", "36", "38"]
    assert ticks(1e-5, 1e-3, 300, log=True)[0] == "0.00001"
    assert ticks(0, 1.05, 300, whole=True) == ["0", "1"]
    assert ticks(0.9, 1.1, 300, log=True, whole=True) == ["1"]


def test_labels_are_moved_apart():
    assert drawing.apart([100, 300], [50, 50], 0, 400) == [100, 300]
    assert drawing.apart([390, 100, 110], [40, 40, 40], 0, 400) == [380, 100, 152]


def test_the_histogram_counts_every_request():
    tags = figure(made_up(), "Latency")
    bars = [(a, int(text.split()[0])) for a, text in tags.of("rect", "area bar")]
    assert sum(number for _, number in bars) == len(LATENCIES)
    tallest = max(bars, key=lambda bar: bar[1])
    for attributes, number in bars:
        ratio = float(attributes["height"] or "") / float(tallest[0]["height"] or "")
        assert ratio == pytest.approx(number / tallest[1], abs=0.01)


def test_quantiles_lie_on_the_distribution():
    tags = figure(made_up(), "Latency")
    curve = points(tags.of("path", "line curve")[0][0]["d"] or "")
    for (attributes, text), part in zip(tags.of("circle", "dot"), (0.5, 0.9), strict=True):
        x, y = numbers(attributes, "cx", "cy")
        assert y == pytest.approx(320 - 120 * part)
        assert min(abs(x - u) + abs(y - v) for u, v in curve) < 8
        assert text.startswith(f"p{100 * part:.0f} ")
    assert curve[-1][1] == 200 and len(curve) <= 2 * plots.CURVE + 2
    labels = [text for _, text in tags.of("text", "label")]
    assert labels == ["floor 19.8 ms", "p50 34.9 ms", "p90 38.9 ms"]
    about = next(each.about for each in plots.figures(made_up()) if each.title == "Latency")
    assert "p99 needs 368 samples" in about


def test_load_rises_over_rate_and_the_bound_is_a_line():
    tags = figure(made_up(), "Latency against load")
    line = points(tags.of("path", "line p99")[0][0]["d"] or "")
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    assert [y for _, y in line] == sorted((y for _, y in line), reverse=True)
    slo = float(tags.of("line", "slo")[0][0]["y1"] or "")
    assert line[2][1] < slo < line[1][1]  # 400, 200 and 80 ms
    assert [text for _, text in tags.of("text", "label")] == ["5.00 /s kept", "p99 at most 200 ms"]
    missed = [text for a, text in tags.of("circle") if "missed" in (a["class"] or "")]
    assert missed == [
        "20.0 /s offered, 19.6 /s achieved: p50 50.0 ms",
        "20.0 /s offered, 19.6 /s achieved: p99 400 ms",
    ]


def test_a_rate_that_was_not_decided_does_not_look_kept():
    result = made_up()
    marked = [a["class"] for a, _ in figure(result, "Latency against load").of("circle")]
    assert [each.split()[1:] for each in marked] == [
        [kind, *more] for kind in ("p50", "p99") for more in ([], ["undecided"], ["missed"])
    ]
    assert ("dot undecided", "not decided") in plots.load(result).key
    for each in result["load"]:
        each["met"] = True
    assert not any(name.startswith("dot") for name, _ in plots.load(result).key)


def test_a_step_that_takes_its_floor_lies_on_the_roof():
    tags = figure(made_up(), "Steps below their roof")
    roof = points(tags.of("path", "line roof")[0][0]["d"] or "")
    dots = [numbers(a, "cx", "cy") for a, _ in tags.of("circle", "dot step")]
    assert [x for x, _ in roof] == [x for x, _ in dots]
    assert dots[2][1] == roof[2][1]  # 16 rows
    assert dots[0][1] > roof[0][1] and dots[1][1] > roof[1][1]
    radii = [numbers(a, "r")[0] for a, _ in tags.of("circle", "dot step")]
    assert radii[0] == radii[2] < radii[1]  # 20, 25 and 20 ms in all
    assert "4 rows: median 1.25 ms, 80.0 % of the floor, 38.5 % of the time in steps" in [
        text for _, text in tags.of("circle")
    ]
    plain = made_up()
    plain["card"] = {}
    assert "rows/s" in [text for _, text in figure(plain, "Steps below their roof").of("text")]


def test_requests_are_drawn_in_time():
    tags = figure(made_up(), "Requests over time")
    first, second = (numbers(a, "x", "width") for a, _ in tags.of("rect", "area span"))
    scale = first[1] / 0.03
    assert second[0] - first[0] == pytest.approx(0.02 * scale, abs=0.2)
    assert second[1] == pytest.approx(0.04 * scale, abs=0.2)
    (queue,) = (numbers(a, "x", "width") for a, _ in tags.of("rect", "area c0"))
    assert queue == pytest.approx([64, 0.01 * scale], abs=0.1)
    decodes = tags.of("rect", "area c2")
    assert [text for _, text in decodes] == [
        "request 1 decode, 10.0 .. 30.0 ms",
        "request 2 decode, 20.0 .. 50.0 ms",
    ]
    many = figure(awkward()["many"], "Requests over time")
    assert len(many.of("rect", "area span")) == plots.REQUESTS


def test_a_request_that_failed_is_told_apart():
    result = made_up()
    result["timeline"]["requests"][1] |= {"status": "QUEUE_FULL", "phases": {}}
    tags = figure(result, "Requests over time")
    assert [text for _, text in tags.of("rect", "area failed")] == [
        "request 2 QUEUE_FULL, 20.0 .. 60.0 ms"
    ]
    assert len(tags.of("rect", "area span")) == 1


def test_what_is_part_of_another_phase_is_not_counted_twice():
    result = made_up()
    result["phases"]["media_encoding"] = summary([0.02])
    tags = figure(result, "Where a request's time goes")
    assert [text for _, text in tags.of("rect", "area rest")] == ["in no phase 4.95 ms"]
    phases = section(result, "Phases of a request")
    assert phases.notes == () and phases.rows[-1][:2] == ("media encoding", "20.0 ms")
    result["phases"]["client"] = summary([0.02])
    overlap = ("Phases overlap: together they are longer than a request.",)
    assert section(result, "Phases of a request").notes == overlap
    assert plots.figures(result)[0].about == overlap[0]


def test_prefill_is_within_decode():
    """20 ms of decoding, 8 of which caught up with given tokens: a row of its own, and no bar."""
    result, plain = made_up(), figure(made_up(), "Where a request's time goes")
    result["phases"]["prefill"] = summary([0.008] * 100)
    tags = figure(result, "Where a request's time goes")
    assert tags.of("rect", "area c") == plain.of("rect", "area c")
    assert [text for _, text in tags.of("rect", "area rest")] == ["in no phase 4.95 ms"]
    phases = section(result, "Phases of a request")
    assert phases.notes == () and phases.rows[-1][:2] == ("prefill", "8.00 ms")


def test_phases_that_overlap_are_both_seen():
    result = made_up()
    result["timeline"]["requests"][1]["phases"]["pixels"] = [0.04, 0.055]
    tags = figure(result, "Requests over time")
    (_, decode), ((pixels, _),) = tags.of("rect", "area c2"), tags.of("rect", "area c3")
    top, high = numbers(decode[0], "y", "height")
    assert numbers(pixels, "y", "height") == pytest.approx([top + high / 2, high / 2], abs=0.1)


def test_phases_are_as_long_as_their_means():
    tags = figure(made_up(), "Where a request's time goes")
    queue, decode, pixels = (numbers(a, "x", "width") for a, _ in tags.of("rect", "area c"))
    assert queue[0] == 64
    assert decode[0] == pytest.approx(sum(queue), abs=0.2)
    assert pixels[0] == pytest.approx(sum(decode), abs=0.2)
    assert decode[1] == pytest.approx(4 * queue[1], abs=0.5)
    ((rest, text),) = tags.of("rect", "area rest")
    mean = tags.of("line", "mark")[0][0]
    assert text == "in no phase 4.95 ms"
    assert sum(numbers(rest, "x", "width")) == pytest.approx(float(mean["x1"] or ""), abs=0.2)
    assert [text for _, text in tags.of("text", "label")] == ["mean latency 35.0 ms"]
