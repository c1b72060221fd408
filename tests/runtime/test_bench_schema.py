"""Results of `nuwa bench` as files."""

from __future__ import annotations

import json
import os
import re

import pytest

from nuwa.runtime.bench import html, schema

from .bench_report import (
    made_up,
)


def test_what_is_written_is_read(tmp_path):
    path, result = tmp_path / "result.json", made_up()
    schema.write(path, result)
    assert schema.read(path) == result
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    result = made_up()
    result["metrics"]["latency"]["mean"] = float("nan")
    result["rounds"]["latency"] = [[0.1, float("inf")]]
    schema.write(tmp_path / "result.json", result)
    found = schema.read(tmp_path / "result.json")
    assert found["metrics"]["latency"]["mean"] is None
    assert found["rounds"]["latency"] == [[0.1, None]]
    assert json.loads(schema.last_line(result))["metrics"]["latency"]["mean"] is None


@pytest.mark.parametrize("write", [schema.write, html.write])
def test_a_write_that_fails_leaves_the_earlier_file(tmp_path, monkeypatch, write):
    path = tmp_path / "result"
    path.write_text("earlier")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        write(path, made_up())
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_the_last_line_is_one_line_without_what_is_long():
    line = schema.last_line(made_up() | {"notes": ["two\nlines"]})
    assert "\n" not in line
    found = json.loads(line)
    assert set(made_up()) - set(found) == {"rounds", "timeline", "latencies"}
    assert found["metrics"] == made_up()["metrics"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "is not JSON: Expecting"),
        ('{"a": NaN}', "is not JSON: NaN is not a number"),
        ("[]", "it is not an object"),
        ("{}", "has the schema None; it must be 'nuwa-bench/1'"),
        ('{"schema": "nuwa-bench/2"}', "has the schema 'nuwa-bench/2'"),
        (
            '{"schema": "nuwa-bench/1", "when": "", "command": "", "model": {}}',
            "lacks workload, scenario, metrics",
        ),
        (json.dumps(made_up() | {"metrics": [1]}), "'metrics' must be an object, not list"),
        (json.dumps(made_up() | {"steps": {}}), "'steps' must be a list, not dict"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path, text, said):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        schema.read(path)
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "result.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not JSON"):
        schema.read(path)
