"""A result of `nuwa bench` that is made up, with every part, and how its reports are read."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from typing import Any

from rich.console import Console

from nuwa.runtime.bench import cells, plots, schema, table

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
        "turns": {"id": "0123"},
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
