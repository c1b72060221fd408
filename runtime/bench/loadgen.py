"""Driven by MLCommons LoadGen in place of our own scenarios: its times and its verdict beside ours.

Needs the package mlcommons-loadgen (extra `bench`). LoadGen decides when queries are sent and
writes its logs; what it says is read from its summary.
"""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UnavailableError
from .asking import Ask
from .observation import Observation
from .scenarios import MOST_IN_FLIGHT

NAMES = {
    "single-stream": "SingleStream",
    "multi-stream": "MultiStream",
    "server": "Server",
    "offline": "Offline",
}
SUMMARY = "mlperf_log_summary.txt"
QUERIES = 1024  # different ones that LoadGen draws from


@dataclass(frozen=True)
class Verdict:
    """What LoadGen says. figures: its summary's lines, times in seconds."""

    valid: bool
    figures: dict[str, float]
    log: str


def drive(
    ask: Ask,
    scenario: str,
    folder: Path,
    *,
    seconds: float,
    least: int = 1,
    rate: float = 1.0,
    bound: float = 1.0,
    streams: int = 8,
    outstanding: int = 8,
) -> tuple[list[Observation], Verdict]:
    """All that was observed, in the order of its end, and the verdict.

    least: queries at the least; rate (a second) and bound (seconds, p99) are the server scenario's;
    streams: requests of a multi-stream query; outstanding: requests at a time of offline.
    UnavailableError where LoadGen is not installed; its logs go into `folder`.
    """
    try:
        import mlperf_loadgen as loadgen
    except ImportError:
        raise UnavailableError(
            "LoadGen is not installed: pip install 'nuwa-runtime[bench]'"
        ) from None
    seen: list[Observation] = []
    lock = threading.Lock()

    def answer(sample: Any, now: float) -> None:
        observation = ask(sample.index, now)
        with lock:
            seen.append(observation)
        loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(sample.id, 0, 0)])

    settings = _settings(loadgen, scenario, seconds, least, rate, bound, streams)
    folder.mkdir(parents=True, exist_ok=True)
    logs = loadgen.LogSettings()
    logs.log_output.outdir = str(folder)
    logs.enable_trace = False
    one_at_a_time = scenario == "single-stream"
    workers = outstanding if scenario == "offline" else MOST_IN_FLIGHT
    with ThreadPoolExecutor(workers, "nuwa-loadgen") as pool:

        def issue(samples: list[Any]) -> None:
            now = time.perf_counter()
            for sample in samples:
                if one_at_a_time:
                    answer(sample, now)
                else:
                    pool.submit(answer, sample, now)

        system = loadgen.ConstructSUT(issue, lambda: None)
        library = loadgen.ConstructQSL(QUERIES, QUERIES, lambda samples: None, lambda samples: None)
        try:
            loadgen.StartTestWithLogSettings(system, library, settings, logs)
        finally:
            loadgen.DestroyQSL(library)
            loadgen.DestroySUT(system)
    return seen, read_verdict((folder / SUMMARY).read_text())


def _settings(
    loadgen: Any,
    scenario: str,
    seconds: float,
    least: int,
    rate: float,
    bound: float,
    streams: int,
) -> Any:
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, NAMES[scenario])
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = round(1000 * seconds)
    settings.min_query_count = least
    settings.server_target_qps = rate
    settings.server_target_latency_ns = round(1e9 * bound)
    settings.multi_stream_samples_per_query = streams
    settings.offline_expected_qps = rate
    return settings


def read_verdict(summary: str) -> Verdict:
    """Of the text of mlperf_log_summary.txt."""
    figures: dict[str, float] = {}
    for name, value in re.findall(r"^(.+?)\s*: ([-\d.]+)$", summary, re.MULTILINE):
        nanoseconds = name.endswith("(ns)")
        figures[name.removesuffix("(ns)").strip()] = float(value) / (1e9 if nanoseconds else 1)
    return Verdict(
        re.search(r"^Result is : VALID", summary, re.MULTILINE) is not None, figures, summary
    )
