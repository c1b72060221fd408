"""The training loop: steps, metrics, sample pictures, checkpoints that survive a kill.

Knows nothing of what is trained: a Recipe does one step and hands over its state. Every step is
seeded by its own number, so a resumed run repeats the unbroken one.

A run folder holds metrics.jsonl (one line a step), tensorboard/, samples/, state-<step>.pt (the
last two) and whatever the recipe exports.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter

from nuwa.spec.files import partial_of, replacing, write_text


class Recipe(Protocol):
    """What is trained."""

    def step(self, step: int, lr_factor: float) -> dict[str, float]:
        """One optimiser step; returns metrics, `loss` among them."""

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on: weights, averages, optimisers."""

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""

    def sample(self, path: Path) -> None:
        """Writes a picture that shows how far training is."""

    def export(self, folder: Path) -> None:
        """Writes the checkpoint that inference loads."""


@dataclass(frozen=True)
class TrainerOptions:
    """How long and how often; counts are optimiser steps.

    warmup and decay are fractions of `steps`: the learning rate rises linearly over the first,
    stays, and falls linearly to zero over the second.
    """

    steps: int
    seed: int = 0
    warmup: float = 0.05
    decay: float = 0.3
    checkpoint_every: int = 200
    sample_every: int = 200
    stop_after: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "checkpoint_every", "sample_every", "stop_after"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} is not at least 1")
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1):
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} do not fit in one run")

    def lr_factor(self, step: int) -> float:
        """Multiplier of the peak learning rate at a step (0-based)."""
        rise = self.warmup * self.steps
        fall = self.decay * self.steps
        factor = min(1.0, (step + 1) / rise) if rise else 1.0
        return min(factor, (self.steps - step) / fall) if fall else factor


def train(
    recipe: Recipe,
    run: Path,
    options: TrainerOptions,
    *,
    leads: bool = True,
    alone: bool = False,
) -> None:
    """Runs `recipe` up to `options.steps`, going on from the newest state in `run` if there is one.

    `options.stop_after` ends early at that step, with a state saved (a planned pause). Raises
    FloatingPointError naming the step if the loss is not finite; earlier states stay on disk.
    leads: of several processes that step together just one writes files and shows progress.
    alone: no other process steps with this one, so that it may stop by itself: KeyboardInterrupt at
    a first SIGINT or SIGTERM, but not before the step is done and its state saved.
    """
    if not leads:
        _follow(recipe, run, options)
        return
    for name in ("samples", "tensorboard"):
        (run / name).mkdir(parents=True, exist_ok=True)
    _sweep(run)
    first = done = _resume(recipe, run)
    last = min(options.steps, options.stop_after or options.steps)
    writer = SummaryWriter(str(run / "tensorboard"), purge_step=first)
    with (
        _metrics_file(run / "metrics.jsonl", first) as metrics,
        _progress_bar() as bar,
        _signals(alone) as told_to_stop,
    ):
        task = bar.add_task(run.name, total=options.steps, completed=first, note="")
        for step in range(first, last):
            torch.manual_seed((options.seed << 32) + step)
            began = time.perf_counter()
            values = recipe.step(step, options.lr_factor(step))
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(
                    f"the loss is {values['loss']} at step {step}; earlier states are in {run}"
                )
            values["seconds"] = time.perf_counter() - began
            metrics.write(json.dumps({"step": step, **values}) + "\n")
            metrics.flush()
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            bar.update(task, advance=1, note=f"loss {values['loss']:.4f}")
            done = step + 1
            stops = told_to_stop()
            if stops or done % options.checkpoint_every == 0 or done == last:
                _save(recipe, run, done)
            if stops:
                break
            if done % options.sample_every == 0 or done == last:
                recipe.sample(run / "samples" / f"{done:07d}.png")
    writer.close()
    if told_to_stop():
        print(f"stopped at step {done}; the same command goes on from there", file=sys.stderr)
        raise KeyboardInterrupt
    recipe.export(run / "checkpoint")


def _follow(recipe: Recipe, run: Path, options: TrainerOptions) -> None:
    """The steps alone."""
    last = min(options.steps, options.stop_after or options.steps)
    for step in range(_resume(recipe, run), last):
        torch.manual_seed((options.seed << 32) + step)
        if not math.isfinite(recipe.step(step, options.lr_factor(step))["loss"]):
            raise FloatingPointError(f"the loss is not finite at step {step}")


@contextmanager
def _signals(alone: bool) -> Iterator[Callable[[], bool]]:
    """Tells whether SIGINT or SIGTERM came; where not `alone`, they do what they do elsewhere.

    So does the second one. What is ignored, as Ctrl-C by what a shell has put in the background,
    still is.
    """
    before: dict[int, Any] = {}  # handlers to put back
    heard: list[int] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, _frame: Any) -> None:
        heard.append(number)
        restore()

    if alone and threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before |= {n: each for n, each in found.items() if each not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, on_signal)
        yield lambda: bool(heard)
    finally:
        restore()


def _sweep(run: Path) -> None:
    """Removes what killed runs left of states, each as large as a whole one."""
    for pattern in (partial_of(run / "state-*").name, "state-*.partial"):  # the latter once
        for left in run.glob(pattern):
            left.unlink()


def _save(recipe: Recipe, run: Path, step: int) -> None:
    """Atomic: a kill at any moment leaves the previous state whole."""
    with replacing(run / f"state-{step:08d}.pt") as partial:
        torch.save({"step": step, "recipe": recipe.state()}, partial)
    for old in sorted(run.glob("state-*.pt"))[:-2]:
        old.unlink()


def _resume(recipe: Recipe, run: Path) -> int:
    states = sorted(run.glob("state-*.pt"))
    if not states:
        return 0
    state = torch.load(states[-1], weights_only=True, map_location="cpu")
    recipe.load_state(state["recipe"])
    return int(state["step"])


def _metrics_file(path: Path, first: int) -> IO[str]:
    """The metrics file opened for appending, without lines of steps that will be repeated."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    kept = []
    for line in text.splitlines():
        try:
            if json.loads(line)["step"] < first:
                kept.append(line + "\n")
        except json.JSONDecodeError:  # a line cut short by a kill
            continue
    if "".join(kept) != text:
        write_text(path, "".join(kept))
    return open(path, "a", encoding="utf-8")


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
