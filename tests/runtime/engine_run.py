"""Drives an engine without a scheduler, for tests: frames and step counts, slot by slot."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nuwa.runtime.core import GenerationRequest, SlotStep
from nuwa.runtime.engine import Engine, Prepared, load_engine
from nuwa.spec.manifest import MANIFEST, Manifest
from nuwa.spec.tasks import Task

PROMPT = "a red digit 3 moves left to right on black"


def tiny_engine(bundle: Path, slots: int) -> Engine:
    return load_engine(bundle, slots=slots, threads=1, spinning=False)


def bundle_for(bundle: Path, tasks: tuple[Task, ...], folder: Path) -> Path:
    """A copy of a bundle that claims other tasks."""
    shutil.copytree(bundle, folder)
    manifest = Manifest.from_json((bundle / MANIFEST).read_text())
    (folder / MANIFEST).write_text(dataclasses.replace(manifest, tasks=tasks).to_json())
    return folder


@dataclass
class Run:
    """What one admitted request has given so far. frames: tokens i32 [h, w] by index."""

    request: GenerationRequest
    prepared: Prepared
    frames: dict[int, np.ndarray] = field(default_factory=dict)
    steps: int = 0
    prefills: int = 0
    last: SlotStep | None = None

    def take(self, result: SlotStep) -> None:
        assert self.last is None or not self.last.done, "a finished slot was stepped"
        before = 0 if self.last is None else self.last.positions_done
        assert before < result.positions_done <= result.positions_total
        for index, tokens in result.frames:
            assert index == len(self.frames), "frames must come in index order, each once"
            self.frames[index] = tokens
        self.steps, self.last = self.steps + 1, result
        self.prefills += result.prefill

    @property
    def tokens(self) -> np.ndarray:
        """i32 [F, h, w]; only when done."""
        assert self.last is not None and self.last.done
        assert self.last.positions_done == self.last.positions_total
        assert len(self.frames) == self.request.frame_count
        return np.stack([self.frames[index] for index in range(len(self.frames))])


def admit(engine: Engine, request: GenerationRequest, slot: int) -> Run:
    engine.check(request)
    run = Run(request, engine.prepare(request))
    engine.admit(run.prepared, slot)
    return run


def step(engine: Engine, runs: dict[int, Run]) -> None:
    """One step; nothing but unfinished runs may have a share in it."""
    waiting = {slot for slot, run in runs.items() if run.last is None or not run.last.done}
    results = engine.step()
    assert {result.slot for result in results} <= waiting
    assert waiting == {result.slot for result in results} or len(waiting) > 1
    for result in results:
        runs[result.slot].take(result)


def finish(engine: Engine, runs: dict[int, Run]) -> None:
    """Steps until all are done, then releases their slots."""
    while any(run.last is None or not run.last.done for run in runs.values()):
        step(engine, runs)
    for slot, run in runs.items():
        stop(engine, slot, run)


def stop(engine: Engine, slot: int, run: Run) -> None:
    """Gives back a slot, wherever its run is, and what was prepared for it."""
    engine.release(slot)
    run.prepared.close()


def alone(engine: Engine, request: GenerationRequest, slot: int = 0) -> Run:
    run = admit(engine, request, slot)
    finish(engine, {slot: run})
    return run
