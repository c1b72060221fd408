"""The page of `nuwa bench`: tables and pictures in one file."""

from __future__ import annotations

import copy
import itertools
import re

from nuwa.runtime.bench import html, table

from .bench_report import (
    Tags,
    awkward,
    made_up,
    summary,
)


def test_the_page_says_what_the_tables_say():
    page = html.page(made_up())
    tags = Tags(page)
    cells = [text for _, text in tags.of("td")]
    for each in table.sections(made_up()):
        assert each.title in [text for _, text in tags.of("h2")]
        assert all(cell in cells for cell in itertools.chain(*each.rows))
    tiles = [text for _, text in tags.of("div", "tile")]
    assert "34.9 mslatency, p5034.6 .. 35.6 ms" in tiles
    assert "–latency, p99needs 368 samples" in tiles
    assert "56.7 %of the floor's speedthe floor is 19.8 ms" in tiles
    assert "18.9 /sthroughput18.4 .. 19.0 /s" in tiles
    assert len(tags.of("svg", "chart")) == 5


def test_columns_are_about_as_high():
    page = html._flow([(100, "a"), (400, "b"), (300, "c"), (200, "d")])
    assert Tags(page).of("div", "column") == [
        ({"class": "column"}, "ab"),
        ({"class": "column"}, "cd"),
    ]
    assert [text for _, text in Tags(html._flow([(1, "a")])).of("div", "column")] == ["a"]


def test_the_page_is_one_file_for_light_and_dark():
    page = html.page(made_up())
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"<script|https?:|@import|url\(|src=", page)


def test_every_mark_has_a_look():
    kinds = {
        name
        for result in awkward().values()
        for _, attributes, _ in Tags(html.page(result)).found
        for name in (attributes.get("class") or "").split()
    }
    assert {"c8", "missed", "gemm", "pairs", "more"} < kinds
    assert [name for name in kinds - {"area"} if not re.search(rf"\.{name}\b", html.STYLE)] == []


def test_names_are_text():
    bad = '"><script>x</script>&'
    result = copy.deepcopy(made_up())
    result["model"]["name"] = result["command"] = result["notes"][0] = bad
    result["outcomes"][bad] = 1
    result["metrics"][bad] = {"unit": bad, "value": 1.0, "low": 1.0, "high": 1.0}
    result["phases"][bad] = summary([0.01])
    result["timeline"]["requests"][0]["phases"][bad] = [0.0, 0.01]
    page = html.page(result)
    assert "<script" not in page
    assert "&lt;script&gt;x&lt;/script&gt;&amp;" in page
    tags = Tags(page)
    assert bad in [text for _, text in tags.of("p", "note")]
    assert bad in [text for _, text in tags.of("td")]


def test_the_page_is_written_as_a_whole(tmp_path):
    html.write(tmp_path / "page.html", made_up())
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == html.page(made_up())
