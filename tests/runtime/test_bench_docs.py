"""docs/bench-result.md has every field of what `nuwa bench` writes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nuwa.runtime.bench import compare, measure, schema, search, serving, sweep
from nuwa.runtime.bench.running import Settings
from nuwa.runtime.bench.scenarios import Extent
from nuwa.runtime.bench.search import Found, Point
from nuwa.runtime.bench.targets import IN_PROCESS, Target
from nuwa.runtime.bench.workload import Workload
from nuwa.runtime.cli import main
from nuwa.runtime.client import LocalClient
from nuwa.spec.tasks import Task

from .fake_engine import FakeEngine

PAGE = (Path(__file__).parents[2] / "docs" / "bench-result.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", PAGE))))
# Objects whose names are not fields: of sensors, of scores, what others call their figures.
OPEN = (
    r"outcomes(\.\d+\.outcomes)?|.*\.quantiles|.*\.?model\.evaluation|loadgen\.figures|power\.seen"
    r"|(power|metrics\.\w+)\.idle_watts|conditions\.celsius|machine\.(gpus\.\d+|jetson)"
)


def fields(part: Any, path: str = "") -> Iterator[str]:
    """Paths of all names within, without those of OPEN."""
    if isinstance(part, dict):
        named = not re.fullmatch(OPEN, path) or isinstance(part.get("outcomes"), list)
        for name, inner in part.items():
            where = f"{path}.{name}" if path else name
            if named:
                yield where
            yield from fields(inner, where)
    elif isinstance(part, list):
        for index, inner in enumerate(part):
            yield from fields(inner, f"{path}.{index}" if path else str(index))


def undocumented(part: Any) -> list[str]:
    last = {path: path.rpartition(".")[2] for path in fields(part)}
    return sorted(path for path, name in last.items() if name not in NAMED)


@contextlib.contextmanager
def fake(bundle=None, *, slots=1, threads=None, backend="fake", queue_size=64) -> Iterator[Target]:
    engine = FakeEngine(slots)
    with LocalClient(engine, queue_size=queue_size) as client:
        yield Target(client, engine.info, IN_PROCESS, None, slots, threads)


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        (Task.T2I, Settings()),
        (Task.V2V, Settings()),
        (Task.T2V, Settings("multi-stream", streams=2)),
        (Task.T2I, Settings("offline")),
        (Task.T2I, Settings("server", rate=20.0, bound=1.0, share=0.5)),
        (Task.T2I, Settings("server", bound=0.1, share=0.5)),
    ],
)
def test_of_every_scenario(task, settings, monkeypatch):
    monkeypatch.setattr(serving, "GUESS_SECONDS", 0.3)
    monkeypatch.setattr(search, "MOST", 3)
    short = dataclasses.replace(settings, extent=Extent(0.3, rounds=6), warm_up=4)
    with fake(slots=2) as target:
        result = measure.measure(target, Workload(task), short)
    assert undocumented(result) == []
    compared = compare.to_json([compare.Difference("x", "s", "lower", "unknown")], [], 0.0)
    assert undocumented(compared) == []


def test_of_a_bundle_with_its_card(tiny_bundle, capsys):
    words = [str(tiny_bundle), "--task", "t2i", "--seconds", "0.5", "--rounds", "2"]
    assert main(["bench", *words]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["card"]["floor_seconds"] and last["model"]["contents_hash"]
    assert undocumented(last) == []


def test_of_loadgen(tmp_path):
    pytest.importorskip("mlperf_loadgen")
    settings = Settings(extent=Extent(0.3, rounds=2), warm_up=4, loadgen=tmp_path)
    with fake() as target:
        result = measure.measure(target, Workload(Task.T2I), settings)
    assert result["loadgen"]["figures"] and undocumented(result) == []


def test_of_a_sweep(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "in_process", fake)
    words = ["sweep", "b", "--task", "t2i", "--slots-of", "1,2", "--seconds", "0.4"]
    assert main(["bench", *words, "--out", str(tmp_path)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(last["outcomes"]) == 2 and undocumented(last) == []


def test_of_what_only_some_machines_have():
    assert undocumented([dataclasses.asdict(each) for each in (Found(1.0, 2.0, True),)]) == []
    assert {each.name for each in dataclasses.fields(Point)} <= NAMED
    assert undocumented({part: {} for part in schema.KINDS}) == []
    assert {"energy_per_image", "energy_per_frame", "joules", "watts", "made", "of"} <= NAMED


def test_a_field_that_is_not_there_is_found():
    assert undocumented({"card": {"steps": 3, "no_such_field": 1}}) == ["card.no_such_field"]
    assert undocumented({"outcomes": {"NO_SUCH_STATUS": 1}}) == []
