"""Driven by MLCommons LoadGen in place of our own scenarios: its times and its verdict beside ours.

Needs the package mlcommons-loadgen (extra `bench`). LoadGen decides when queries are sent and
writes its logs; what it says is read from its summary.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from ..errors import UnavailableError
from .asking import Ask
from .observation import Observation, together
from .scenarios import MOST_IN_FLIGHT, Interrupted, workers

NAMES = {
    "single-stream": "SingleStream",
    "multi-stream": "MultiStream",
    "server": "Server",
    "offline": "Offline",
}
SUMMARY = "mlperf_log_summary.txt"
Samples = list[tuple[int, int]]  # LoadGen's id and its number of the query


@dataclass(frozen=True)
class Verdict:
    """What LoadGen says. reasons: why a run is not valid, and what it recommends; figures: its
    summary's lines, times in seconds. It does not know of requests that were not answered.
    """

    valid: bool
    figures: dict[str, float]
    log: str
    reasons: list[str] = field(default_factory=list)


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
    UnavailableError where LoadGen is not installed; its logs go into `folder`. Ctrl-C is
    Interrupted with one round.
    """
    check_installed()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {
        "min_duration_ms": round(1000 * seconds),
        "min_query_count": least,
        "max_query_count": most or 0,
        "server_target_qps": rate,
        "offline_expected_qps": rate,
        "server_target_latency_ns": round(1e9 * bound),
        "server_target_latency_percentile": share,
        "multi_stream_samples_per_query": streams,
    }
    seen: list[Observation] = []
    lock = threading.Lock()
    most_at_once = outstanding if scenario == "offline" else MOST_IN_FLIGHT
    with _loadgen_process() as link, workers(most_at_once) as pool:

        def answered(samples: Samples, observation: Observation) -> None:
            with lock:
                seen.append(observation)
                link.send([each for each, _ in samples])

        def alone(sample: tuple[int, int], now: float) -> None:
            answered([sample], ask(sample[1], now))

        def as_one(samples: Samples, now: float) -> None:
            calls = [pool.submit(ask, index, now) for _, index in samples]
            answered(samples, together(call.result() for call in calls))

        try:
            link.send({"scenario": NAMES[scenario], "settings": wanted, "folder": str(folder)})
            while (samples := _received(link)) is not None:
                now = time.perf_counter()
                if scenario == "multi-stream":
                    pool.submit(as_one, samples, now)
                    continue
                for sample in samples:
                    call = pool.submit(alone, sample, now)
                    if scenario == "single-stream":
                        call.result()
        except KeyboardInterrupt:  # who is under way may be so for long, or for ever
            raise Interrupted([list(seen)]) from None
    return seen, read_verdict((folder / SUMMARY).read_text())


def check_installed() -> None:
    """UnavailableError if LoadGen is not."""
    if importlib.util.find_spec("mlperf_loadgen") is None:
        raise UnavailableError("LoadGen is not installed: pip install 'nuwa-runtime[bench]'")


def _received(link: Connection) -> Samples | None:
    try:
        samples: Samples | None = link.recv()
    except EOFError:
        raise RuntimeError("LoadGen's process ended in the middle of its test") from None
    return samples


@contextmanager
def _loadgen_process() -> Iterator[Connection]:
    """A connection to one (loadgen_process.py), which is ended in the end, whatever it does."""
    here, there = Pipe()
    command = [sys.executable, str(Path(__file__).with_name("loadgen_process.py"))]
    with there:
        process = subprocess.Popen(
            [*command, str(there.fileno())],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for who asked
        )
    try:
        yield here
    finally:
        here.close()
        process.kill()
        process.wait()


def read_verdict(summary: str) -> Verdict:
    """Of the text of mlperf_log_summary.txt."""
    figures: dict[str, float] = {}
    for name, value in re.findall(r"^(.+?)\s*: ([-\d.]+)$", summary, re.MULTILINE):
        nanoseconds = name.endswith("(ns)")
        figures[name.removesuffix("(ns)").strip()] = float(value) / (1e9 if nanoseconds else 1)
    valid = re.search(r"^Result is : VALID", summary, re.MULTILINE) is not None
    return Verdict(valid, figures, summary, [] if valid else _reasons(summary))


def _reasons(summary: str) -> list[str]:
    """What it says is not satisfied; what it recommends, and says of early stopping."""
    found = re.findall(r"^\s*(\S.*? satisfied)\s*: NO\s*$", summary, re.MULTILINE)
    told = [f"{each}: no" for each in found]
    told += re.findall(r"^ \* (.+(?:\n [^ *].+)*)$", summary, re.MULTILINE)
    return [" ".join(each.split()) for each in told]
