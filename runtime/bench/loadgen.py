"""Driven by MLCommons LoadGen in place of our own scenarios: its times and its verdict beside ours.

Needs the package mlcommons-loadgen (extra `bench`). LoadGen decides when queries are sent and
writes its logs; what it says is read from its summary.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UnavailableError
from .asking import Ask
from .observation import Observation, together
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
    """What LoadGen says. valid: that it says so, and that every request was answered, of which it
    does not know; figures: its summary's lines, times in seconds.
    """

    valid: bool
    figures: dict[str, float]
    log: str
    problem: str = ""


def drive(
    ask: Ask,
    scenario: str,
    folder: Path,
    *,
    seconds: float,
    least: int = 1,
    most: int | None = None,
    rate: float = 1.0,
    bound: float = 1.0,
    share: float = 0.99,
    streams: int = 8,
    outstanding: int = 8,
) -> tuple[list[Observation], Verdict]:
    """All that was observed, in the order of its end, and the verdict.

    least, most: queries; rate: a second, of the server scenario, and what offline expects; bound:
    seconds within which a share of the server scenario's latencies must be; streams: requests of a
    multi-stream query, which is one observation; outstanding: requests at a time of offline.
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

    def answer(sample: Any, now: float) -> Observation:
        observation = ask(sample.index, now)
        loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(sample.id, 0, 0)])
        return observation

    def keep(observation: Observation) -> None:
        with lock:
            seen.append(observation)

    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, NAMES[scenario])
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = round(1000 * seconds)
    settings.min_query_count = least
    settings.max_query_count = most or 0
    settings.server_target_qps = settings.offline_expected_qps = rate
    settings.server_target_latency_ns = round(1e9 * bound)
    settings.server_target_latency_percentile = share
    settings.multi_stream_samples_per_query = streams
    folder.mkdir(parents=True, exist_ok=True)
    logs = loadgen.LogSettings()
    logs.log_output.outdir = str(folder)
    logs.enable_trace = False
    workers = outstanding if scenario == "offline" else MOST_IN_FLIGHT
    with ThreadPoolExecutor(workers, "nuwa-loadgen") as pool:

        def alone(sample: Any, now: float) -> None:
            keep(answer(sample, now))

        def as_one(samples: list[Any], now: float) -> None:
            calls = [pool.submit(answer, sample, now) for sample in samples]
            keep(together(call.result() for call in calls))

        def issue(samples: list[Any]) -> None:
            now = time.perf_counter()
            if scenario == "single-stream":
                for sample in samples:
                    keep(answer(sample, now))
            elif scenario == "multi-stream":
                pool.submit(as_one, samples, now)
            else:
                for sample in samples:
                    pool.submit(alone, sample, now)

        system = loadgen.ConstructSUT(issue, lambda: None)
        library = loadgen.ConstructQSL(QUERIES, QUERIES, lambda samples: None, lambda samples: None)
        try:
            loadgen.StartTestWithLogSettings(system, library, settings, logs)
        finally:
            loadgen.DestroyQSL(library)
            loadgen.DestroySUT(system)
    verdict = read_verdict((folder / SUMMARY).read_text())
    failed = Counter(each.status for each in seen if not each.ok)
    if failed:
        told = ", ".join(f"{number} {status}" for status, number in failed.most_common())
        verdict = replace(verdict, valid=False, problem=f"not answered: {told}")
    return seen, verdict


def read_verdict(summary: str) -> Verdict:
    """Of the text of mlperf_log_summary.txt."""
    figures: dict[str, float] = {}
    for name, value in re.findall(r"^(.+?)\s*: ([-\d.]+)$", summary, re.MULTILINE):
        nanoseconds = name.endswith("(ns)")
        figures[name.removesuffix("(ns)").strip()] = float(value) / (1e9 if nanoseconds else 1)
    return Verdict(
        re.search(r"^Result is : VALID", summary, re.MULTILINE) is not None, figures, summary
    )
