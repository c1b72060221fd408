"""The tables of `nuwa bench`: every number in its place."""

from __future__ import annotations

import itertools
import re

import pytest

from nuwa.runtime.bench import html, plots, schema, table

from .bench_report import (
    LATENCIES,
    PARTS,
    Tags,
    awkward,
    made_up,
    printed,
    rows_of,
    section,
    summary,
)


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
    assert [name for _, name in drawn.key] == ["p50", "p95", "bound not kept", "not decided"]
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


def test_launches_stand_side_by_side():
    result = made_up()
    metrics = {"latency": summary([0.03] * 9), "throughput": {"unit": "1/s", "value": 30.0}}
    result["each_launch"] = [
        {"metrics": metrics, "outcomes": {"ok": 9}},
        {"metrics": {"latency": {"unit": "s", "quantiles": {"0.5": {"needs": 6}}}}},
    ]
    assert section(result, "Launches").rows == (
        ("1", "9", "30.0 ms", "30.0 /s"),
        ("2", "0", "needs 6 samples", "–"),
    )
    assert max(map(len, printed(result).splitlines())) <= 80
    Tags(html.page(result))


def test_a_value_without_an_interval_stands_alone():
    """As of values that depend too much on each other."""
    result = made_up()
    result["metrics"]["latency"]["quantiles"]["0.5"] = {"value": 0.0349}
    assert rows_of(result, "Results")["p50"][:2] == ("34.9 ms", "")
    assert "34.9 mslatency, p50" in [text for _, text in Tags(html.page(result)).of("div", "tile")]


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
            result.pop(name, None)
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
