"""The reports of `nuwa bench`: every number in its place, on a terminal, a page, in pictures."""

from __future__ import annotations

import copy
import io
import itertools
import json
import os
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from nuwa.runtime.bench import cells, drawing, html, plots, schema, table

VOID = (
    "meta",
    "line",
    "path",
    "circle",
    "rect",
)  # a rect or circle may have a title, and then ends
PARTS = tuple(schema.KINDS)


def summary(values: list[float], unit: str = "s", **more: Any) -> dict[str, Any]:
    """Quantiles by nearest rank, p99 refused."""
    ordered, number = sorted(values), len(values)
    middle, high = ordered[(number - 1) // 2], ordered[-(number // 10) - 1]
    return {
        "unit": unit,
        "better": "lower",
        "count": number,
        "mean": sum(values) / number,
        "deviation": 0.0012,
        "least": ordered[0],
        "most": ordered[-1],
        "quantiles": {
            "0.5": {"value": middle, "low": 0.99 * middle, "high": 1.02 * middle},
            "0.9": {"value": high, "low": 0.97 * high, "high": high},
            "0.99": {"needs": 368},
        },
    } | more


LATENCIES = [0.030 + 0.0001 * i for i in range(100)]  # median 34.9 ms, mean 34.95, p90 38.9


def made_up() -> dict[str, Any]:
    """A result with every part."""
    latency = summary(LATENCIES, floor=0.0198, floor_fraction=0.0198 / 0.0349)
    return {
        "schema": schema.SCHEMA,
        "when": "2026-11-22T06:30:00Z",
        "command": "nuwa bench demo/bundle --task t2v",
        "notes": ["the machine was idle"],
        "machine": {"processor": "EPYC", "cores": 2, "gpus": []},
        "model": {
            "name": "sprites",
            "precision": "fp32",
            "backend": "native-cpu",
            "parameters": 10_823_456,
            "evaluation": {"t2v joint": 0.97},
            "evaluation_note": "1024 samples",
        },
        "workload": {"task": "t2v", "frames": 10, "target": "gRPC 127.0.0.1:50051", "seed": 12345},
        "scenario": {"name": "server", "slo_seconds": 0.2, "slo_quantile": "0.99"},
        "card": {
            "steps": 33,
            "one_by_one_steps": 640,
            "weights_bytes": 43_200_000,
            "flops_per_row": 21.6e6,
            "cache_bytes_per_sequence": 3.3e6,
            "generation_bytes": 1.5e9,
            "generation_flops": 13.5e9,
            "rows_per_step": [1, 4, 16],
            "rates": {
                "copy_bytes_per_second": 21.3e9,
                "gemm": [
                    {"rows": 1, "flops_per_second": 2.2e10},
                    {"rows": 16, "flops_per_second": 4e11},
                ],
            },
            "floor_seconds": 0.0198,
            "floor_by_rows": [
                {"rows": 1, "seconds": 0.001},
                {"rows": 4, "seconds": 0.001},
                {"rows": 16, "seconds": 0.002},
            ],
        },
        "warm_up": {"requests": 8, "seconds": 3.1, "steady": True},
        "outcomes": {"ok": 100, "QUEUE_FULL": 2},
        "metrics": {
            "latency": latency,
            "time_to_first_frame": summary([0.4 * each for each in LATENCIES]),
            "realtime_factor": summary([18.0, 19.0, 20.0], "x"),
            "throughput": {
                "unit": "1/s",
                "better": "higher",
                "value": 18.9,
                "low": 18.4,
                "high": 19,
            },
            "early_stopping_p90": {"unit": "s", "value": 0.0391},
        },
        "phases": {
            "queue": summary([0.005] * 100),
            "decode": summary([0.020] * 100),
            "pixels": summary([0.005] * 100),
        },
        "steps": [
            {"rows": 1, "count": 10, "median": 0.002, "p99": 0.004, "floor": 0.001},
            {"rows": 4, "count": 20, "median": 0.00125, "p99": 0.002, "floor": 0.001},
            {"rows": 16, "count": 10, "median": 0.002, "p99": 0.003, "floor": 0.002},
        ],
        "load": [
            {"rate": 5.0, "achieved": 4.9, "p50": 0.035, "p99": 0.06, "met": True},
            {"rate": 20.0, "achieved": 19.6, "p50": 0.05, "p99": 0.4, "met": False},
            {"rate": 10.0, "achieved": 9.9, "p50": 0.036, "p99": 0.08, "met": None, "needed": 40},
        ],
        "timeline": {
            "requests": [
                {
                    "start": 0.0,
                    "end": 0.03,
                    "phases": {"queue": [0.0, 0.01], "decode": [0.01, 0.03]},
                },
                {"start": 0.02, "end": 0.06, "phases": {"decode": [0.02, 0.05]}},
            ]
        },
        "latencies": {"count": 100, "values": list(LATENCIES)},
        "server": {
            "metrics_at": "127.0.0.1:9100",
            "requests": 140,
            "phases": {
                "decode": {
                    "unit": "s",
                    "count": 140,
                    "mean": 0.021,
                    "quantiles": {
                        "0.5": {"low": 0.02, "high": 0.05},
                        "0.99": {"low": 60.0, "high": None},
                    },
                    "buckets": [[0.02, 60], [0.05, 138], [60.0, 138], [None, 140]],
                }
            },
            "steps": {
                "unit": "s",
                "count": 50,
                "mean": 0.0015,
                "quantiles": {"0.5": {"low": 0.001, "high": 0.002}},
                "buckets": [[0.0005, 0], [0.001, 10], [0.002, 50], [None, 50]],
            },
        },
        "conditions": {
            "celsius": {"cpu": {"before": 48.0, "after": 61.5, "most": 62.0}},
            "drift": {"slower": 0.0712, "clear": True},
            "others_share": 0.25,
        },
        "search": {"low": 5.0, "high": 20.0, "decided": False},
        "interrupted": False,
        "loadgen": {"valid": True, "figures": {"p99_seconds": 0.04}},
        "memory": {"process_peak_bytes": 612_000_000, "device_peak_bytes": None},
        "power": {"package_watts": 65.0},
        "rounds": {"latency": [LATENCIES[:50], LATENCIES[50:]]},
    }


def awkward() -> dict[str, dict[str, Any]]:
    """Results whose pictures are hard to draw."""
    one = made_up()
    del one["latencies"]  # as results of before had none
    one["rounds"]["latency"] = [[0.03]]
    one["metrics"]["latency"] = summary([0.03])
    one["load"], one["steps"] = one["load"][:1], one["steps"][:1]
    one["card"]["floor_by_rows"] = []
    one["timeline"]["requests"] = one["timeline"]["requests"][:1]
    far = made_up()
    far["latencies"] = {"count": 9, "values": [0.0101, 0.0102, 0.0103, 47.0, None]}
    far["rounds"] = {}  # as offline, or of a search
    far["metrics"]["latency"] |= {"floor": 0.00001, "least": 0.01, "most": 47.0}
    far["load"][0]["p99"], far["scenario"]["slo_seconds"] = 900.0, 0.001
    far["card"]["flops_per_row"] = None
    many = made_up()
    many["timeline"]["requests"] = [
        {
            "start": 0.01 * i,
            "end": 0.01 * i + 0.05,
            "phases": {f"p{i}": [0.01 * i, 0.01 * i + 0.04]},
        }
        for i in range(80)
    ]
    many["phases"] = {f"phase_{i}": summary([0.02]) for i in range(14)}
    many["metrics"]["latency"]["quantiles"] = {
        str(share): {"value": 0.035, "low": None, "high": None} for share in (0.5, 0.9, 0.99)
    }
    many["steps"] = [
        {"rows": r, "count": r, "median": 0.001 * r, "p99": None, "floor": None}
        for r in range(1, 70)
    ]
    return {"all": made_up(), "one": one, "far": far, "many": many}


def printed(result: dict[str, Any], width: int = 80) -> str:
    out = io.StringIO()
    table.print(result, Console(file=out, width=width))
    return out.getvalue()


def section(result: dict[str, Any], title: str) -> cells.Section:
    return next(each for each in table.sections(result) if each.title == title)


def rows_of(result: dict[str, Any], title: str) -> dict[str, tuple[str, ...]]:
    """The cells of each row, by the first; of rows of one name the first."""
    rows: dict[str, tuple[str, ...]] = {}
    for first, *others in section(result, title).rows:
        rows.setdefault(first.strip("\u00a0"), tuple(others))
    return rows


class Tags(HTMLParser):
    """All elements with their text; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes), []))

    def handle_starttag(self, tag, attributes):
        element: tuple[str, dict[str, str | None], list[str]] = (tag, dict(attributes), [])
        self.found.append(element)
        if tag != "meta":
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, texts in self.open:
            texts.append(data)

    def of(self, tag: str, kind: str = "") -> list[tuple[dict[str, str | None], str]]:
        """(attributes, text) of every such element whose class begins so."""
        return [
            (attributes, "".join(texts))
            for name, attributes, texts in self.found
            if name == tag and (attributes.get("class") or "").startswith(kind)
        ]


def numbers(attributes: dict[str, str | None], *names: str) -> list[float]:
    return [float(attributes[name] or "") for name in names]


def figure(result: dict[str, Any], title: str) -> Tags:
    return Tags(next(each.svg for each in plots.figures(result) if each.title == title))


def points(path: str) -> list[tuple[float, float]]:
    """Of a path of M, L, H and V."""
    x = y = 0.0
    found = []
    for letter, rest in re.findall(r"([MLHV])([^MLHV]*)", path):
        values = [float(each) for each in rest.split()]
        x, y = {"H": (values[0], y), "V": (x, values[0])}.get(letter, (values[0], values[-1]))
        found.append((x, y))
    return found


# The file


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


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (0.033, "s", "33.0 ms"),
        (0.00004567, "s", "0.0457 ms"),
        (0.9994, "s", "999 ms"),
        (0.9996, "s", "1.00 s"),
        (12.345, "s", "12.3 s"),
        (1234.5, "s", "1 234 s"),
        (0, "s", "0 ms"),
        (4.9, "1/s", "4.90 /s"),
        (1.25, "x", "1.25 x"),
        (999.9e9, "FLOP/s", "1.00 TFLOP/s"),
        (43_200_000, "B", "43.2 MB"),
        (12, "B", "12 B"),
        (None, "s", "–"),
    ],
)
def test_numbers_have_three_digits(value, unit, text):
    assert schema.quantity(value, unit) == text


# Tables


def test_the_card_comes_first():
    assert [each.title for each in table.sections(made_up())] == [
        "What it takes",
        "Results",
        "Phases of a request",
        "Steps",
        "What the server counted",
        "Decode steps on the server",
        "Load",
        "Outcomes",
        "Conditions",
    ]
    card = rows_of(made_up(), "What it takes")
    assert card["steps"] == ("33 (one by one: 640)",)
    assert card["rows in a step"] == ("1 .. 16, mean 7.0",)
    assert card["weights, read at every step"] == ("43.2 MB",)
    assert card["a generation computes"] == ("13.5 GFLOP, 9.00 FLOP/B",)
    assert card["copying, measured"] == ("21.3 GB/s",)
    assert card["multiplying, measured"] == ("22.0 GFLOP/s (1 row) .. 400 GFLOP/s (16 rows)",)
    assert card["floor of a step"] == ("1.00 ms (1 row) .. 2.00 ms (16 rows)",)
    assert card["floor of a generation"] == ("19.8 ms",)


def test_results_stand_beside_their_floor():
    results = section(made_up(), "Results")
    assert results.heads == ("metric", "value", "95 % interval", "at best", "of that")
    rows = rows_of(made_up(), "Results")
    assert rows["latency"] == ("100 samples", "", "", "")
    assert rows["mean"] == ("35.0 ms", "", "", "")
    assert rows["p50"] == ("34.9 ms", "34.6 .. 35.6 ms", "19.8 ms", "56.7 %")
    assert rows["p90"] == ("38.9 ms", "37.7 .. 38.9 ms", "", "")
    assert rows["p99"] == ("needs 368 samples", "", "", "")
    assert rows["range"] == ("30.0 .. 39.9 ms", "", "", "")
    assert rows["throughput"] == ("18.9 /s", "18.4 .. 19.0 /s", "", "")
    assert rows["early stopping p90"] == ("39.1 ms", "", "", "")
    below = [first for first, *_ in results.rows].index("realtime factor")
    assert results.rows[below + 2][1] == "19.0 x"


def test_the_floor_stands_beside_the_mean_where_the_median_was_refused():
    result = made_up()
    result["metrics"]["latency"]["quantiles"]["0.5"] = {"needs": 6}
    rows = rows_of(result, "Results")
    assert rows["p50"] == ("needs 6 samples", "", "", "")
    assert rows["mean"] == ("35.0 ms", "", "19.8 ms", "56.7 %")
    result["metrics"] = {"throughput": {"unit": "1/s", "value": 5.0, "floor": 10.0}}
    assert rows_of(result, "Results") == {"throughput": ("5.00 /s", "", "10.0 /s", "")}


def test_phases_steps_load_and_outcomes():
    phases = rows_of(made_up(), "Phases of a request")
    assert phases["decode"] == ("20.0 ms", "20.0 ms", "needs 368 samples", "20.0 ms", "57.2 %")
    steps = rows_of(made_up(), "Steps")
    assert steps["4"] == ("20", "1.25 ms", "2.00 ms", "1.00 ms", "80.0 %")
    load = section(made_up(), "Load").rows
    assert [row[0] for row in load] == ["5.00 /s", "10.0 /s", "20.0 /s"]
    assert [row[4] for row in load] == ["yes", "needs 40 more", "no"]
    assert load[2][1:4] == ("19.6 /s", "50.0 ms", "400 ms")
    assert section(made_up(), "Outcomes").rows == (
        ("ok", "100", "98.0 %"),
        ("QUEUE_FULL", "2", "2.0 %"),
    )
    conditions = rows_of(made_up(), "Conditions")
    assert conditions["warm-up"] == ("8 requests, 3.10 s, steady",)
    assert conditions["memory, process peak bytes"] == ("612 MB",)
    assert conditions["loadgen, valid"] == ("yes",)
    assert conditions["loadgen, figures"] == ("p99 seconds 40.0 ms",)
    assert conditions["power, package watts"] == ("65.0 W",)
    assert conditions["model, evaluation"] == ("t2v joint 0.97",)
    assert conditions["workload, seed"] == ("12345",)
    assert "memory, device peak bytes" not in conditions


def test_shares_and_energy_say_what_they_are():
    result = made_up()
    result["metrics"] |= {
        "measuring": {"unit": "", "better": "lower", "value": 0.000548},
        "energy_per_frame": {
            "unit": "J",
            "better": "lower",
            "value": 1.25,
            "of": "GPU board energy (NVML)",
            "watts": 312.0,
            "idle_watts": 70.5,
        },
    }
    rows = rows_of(result, "Results")
    assert rows["measuring takes"] == ("0.1 %", "", "", "")
    assert rows["energy per frame"][0] == "1.25 J"
    assert rows["GPU board energy (NVML)"][0] == "312 W" and rows["idle"][0] == "70.5 W"
    conditions = rows_of(made_up(), "Conditions")
    assert conditions["conditions, others share"] == ("25.0 %",)
    assert conditions["conditions, drift"] == ("slower 7.1 %, clear yes",)


def test_rates_stand_beside_their_roof():
    result = made_up()
    result["metrics"]["throughput"] |= {"floor": 37.8, "floor_fraction": 0.5}
    assert rows_of(result, "Results")["throughput"] == (
        *("18.9 /s", "18.4 .. 19.0 /s"),
        *("37.8 /s", "50.0 %"),
    )


def test_a_card_without_a_floor_says_why():
    result = made_up()
    result["card"] |= {
        "floor_note": "No floor: rates were not asked for.",
        "frames": 10,
        "floor_first_frame_seconds": 0.004,
        "floor_together": {"generations": 8.0, "seconds": 0.011},
    }
    card = section(result, "What it takes")
    assert card.notes == ("No floor: rates were not asked for.",)
    rows = dict(card.rows)
    assert rows["floor of one among several"] == "11.0 ms (8 at a time)"
    assert rows["floor until the first frame"] == "4.00 ms"


def test_what_the_server_counted():
    told = section(made_up(), "What the server counted")
    assert told.rows == (
        ("decode", "140", "21.0 ms", "20.0 .. 50.0 ms", "above 60.0 s"),
        ("a decode step", "50", "1.50 ms", "1.00 .. 2.00 ms", "–"),
    )
    assert "140 requests" in told.notes[0]
    assert section(made_up(), "Decode steps on the server").rows == (
        ("0.500 .. 1.00 ms", "10", "20.0 %"),
        ("1.00 .. 2.00 ms", "40", "80.0 %"),
    )


def test_a_quantile_that_was_asked_for_is_shown():
    result = made_up()
    result["scenario"]["slo_quantile"] = "0.95"
    for point in result["load"]:
        point["quantile"] = 0.9 * point["p99"]
    load = section(result, "Load")
    assert load.heads == (*("requests offered", "achieved"), "p50", "p99", "p95", "target met")
    assert load.rows[0] == ("5.00 /s", "4.90 /s", "35.0 ms", "60.0 ms", "54.0 ms", "yes")
    drawn = next(each for each in plots.figures(result) if each.title == "Latency against load")
    assert [name for _, name in drawn.key] == ["p50", "p95", "bound not kept"]
    assert "p95 54.0 ms" in drawn.svg and ": p99 " not in drawn.svg


def test_of_many_latencies_some_are_drawn():
    result = made_up()
    result["latencies"] = {"count": 50_000, "values": LATENCIES}
    figure_of = next(each for each in plots.figures(result) if each.title == "Latency")
    assert "50 000 requests, 100 of which are drawn" in figure_of.about


def test_what_is_in_no_phase_is_in_the_key():
    phases = plots.figures(made_up())[0]
    assert ("area rest", "in no phase 4.95 ms") in phases.key


def test_the_steps_that_take_most_of_the_time_are_shown():
    steps = section(awkward()["many"], "Steps")
    assert [row[0] for row in steps.rows] == [str(rows) for rows in range(60, 70)]
    assert steps.notes == ("10 of 69 sizes, 37.3 % of the time in steps.",)


def test_what_must_be_known_first_is_said_first():
    text = printed(made_up())
    assert text.startswith(
        "sprites, t2v, server\nfp32 on native-cpu, EPYC, 2 cores, gRPC 127.0.0.1"
    )
    assert text.index("the machine was idle") < text.index("What it takes") < text.index("Results")
    page = html.page(made_up())
    assert [text for _, text in Tags(page).of("p", "note")] == ["the machine was idle"]
    assert page.index("the machine was idle") < page.index("<svg")


def test_conditions_are_all_said():
    result = made_up()
    result["warm_up"]["steady"] = False
    result["machine"] |= {"gpus": [{"name": "H200", "memory_bytes": 141e9}], "cache": {"l3": None}}
    result["workload"] |= {"prompts": ["a", "b"], "sampling": {"top_k": 0, "temperature": 0.71234}}
    rows = rows_of(result, "Conditions")
    assert rows["warm-up"] == ("8 requests, 3.10 s, not steady",)
    assert rows["machine, gpus"] == ("name H200, memory bytes 141 GB",)
    assert rows["workload, prompts"] == ("a; b",)
    assert rows["workload, sampling"] == ("top k 0, temperature 0.7123",)
    assert "EPYC, 2 cores, H200, gRPC" in printed(result)


def test_a_terminal_of_80_columns_cuts_no_number():
    text = printed(made_up())
    assert max(map(len, text.splitlines())) <= 80
    for each in table.sections(made_up()):
        for cell in itertools.chain(*each.rows):
            if len(cell) < 40:
                assert cell.strip("\u00a0") in text
    assert re.search(r"p50 +34\.9 ms +34\.6 \.\. 35\.6 ms +19\.8 ms +56\.7 %", text)


def test_names_are_no_markup_for_the_terminal():
    result = made_up()
    result["notes"] = ["[red]x[/red]"]
    result["outcomes"]["[/bold]"] = 1
    assert "[red]x[/red]" in printed(result) and "[/bold]" in printed(result)


@pytest.mark.parametrize("part", [*PARTS, "all"])
@pytest.mark.parametrize("left", ["missing", "null", "empty"])
def test_any_part_may_be_missing(part, left):
    result = made_up()
    for name in PARTS if part == "all" else (part,):
        if left == "missing":
            del result[name]
        else:
            result[name] = None if left == "null" else schema.KINDS[name]()
    printed(result)
    Tags(html.page(result))


@pytest.mark.parametrize("part", ["metrics", "phases"])
def test_a_summary_may_be_empty(part):
    result = made_up()
    result[part] = {name: {} for name in result[part]} | {"none": None}
    assert "latency" not in [row[0] for row in section(made_up() | result, "Conditions").rows]
    printed(result)
    Tags(html.page(result))


# Pictures


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


def texts_of(tags: Tags) -> list[tuple[float, float, float, float]]:
    """(left, top, right, bottom) of texts, in type of 12 units whose characters are 7.2 wide."""
    boxes = []
    for attributes, text in tags.of("text"):
        (x, y), wide = numbers(attributes, "x", "y"), 7.2 * len(text)
        left = {"start": x, "middle": x - wide / 2, "end": x - wide}[
            attributes["text-anchor"] or ""
        ]
        boxes.append((left, y - 9, left + wide, y + 3))
    return boxes


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


# The page


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
