"""Random arrivals, cancels, deadlines and failures: each request ends once, as it should, alone.

How each must end is said beforehand: by what is injected for it, by its number, and by the clock.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from nuwa.runtime import painter as painter_module
from nuwa.runtime.backends.base import steps_in_turn
from nuwa.runtime.core import CancelledError, Done, Frame, GenerationRequest, QueueFullError
from nuwa.runtime.engine import condition_slots
from nuwa.runtime.errors import DeadlineExceededError, EngineError
from nuwa.runtime.handle import TOLERANCE, Handle
from nuwa.runtime.scheduler import Scheduler
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

from .engine_run import PROMPT, alone, tiny_engine
from .fake_engine import FakeEngine, expected_tokens

SLOTS, QUEUE = 4, 12
ENDS = {"done", "cancelled", "late", "failed"}
FAULTS = ("prepare", "admit", "step", "call", "pixels")


@dataclass(frozen=True)
class Numbered(GenerationRequest):
    """number: by which a test knows it, and all samples of it, wherever it is."""

    number: int = 0


class Clock:
    """`time.perf_counter` that a test moves."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


class Faults:
    """Makes an engine fail for requests of which `planned` says where, by their numbers.

    "step": one slot, at its first steps or later; "call": the step of all slots. hit: numbers of
    those that have been failed. before: called with a place and a number first.
    """

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.planned: dict[int, str] = {}
        self.steps: dict[int, int] = {}
        self.hit: set[int] = set()
        self.held: dict[int, int] = {}  # by slot, the number
        self.before: Callable[[str, int], None] = lambda place, number: None
        admit, prepare, release, step = engine.admit, engine.prepare, engine.release, engine.step

        def faulty_prepare(request):
            self.meet("prepare", request.number)
            return prepare(request)

        def faulty_admit(prepared, slot, sample_index):
            admit(prepared, slot, sample_index)
            self.held[slot] = prepared.request.number
            self.meet("admit", prepared.request.number)

        def faulty_step(until=None):
            for number in {*self.held.values()}:
                self.before("step", number)
            if any(self.planned.get(number) == "call" for number in self.held.values()):
                self.hit |= {*self.held.values()}
                raise RuntimeError("injected: call")
            results = step(until)
            for result in results:
                number = self.held[result.slot]
                self.steps[number] = self.steps.get(number, 0) + 1
            return results

        def faulty_release(slot):
            self.held.pop(slot, None)
            release(slot)

        def faulty_restore(request, index, pixels, restore=painter_module.restore_given):
            self.meet("pixels", request.number)
            return restore(request, index, pixels)

        monkeypatch.setattr(engine, "prepare", faulty_prepare)
        monkeypatch.setattr(engine, "admit", faulty_admit)
        monkeypatch.setattr(engine, "step", faulty_step)
        monkeypatch.setattr(engine, "release", faulty_release)
        monkeypatch.setattr(painter_module, "restore_given", faulty_restore)

    def meet(self, place: str, number: int) -> None:
        self.before(place, number)
        if self.planned.get(number) == place:
            self.hit.add(number)
            raise RuntimeError(f"injected: {place}")

    def slot_fails(self, slot: int) -> bool:
        """Whether the step of a slot is to fail now."""
        number = self.held[slot]
        due = self.planned.get(number) == "step" and self.steps.get(number, 0) >= number % 3
        if due:
            self.hit.add(number)
        return due


def fail_fake_slots(engine: FakeEngine, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    step_slot = engine._step_slot

    def faulty(slot, request):
        if faults.slot_fails(slot):
            engine.slot_errors[slot] = RuntimeError("injected: step")
        return step_slot(slot, request)

    monkeypatch.setattr(engine, "_step_slot", faulty)


def fail_real_parts(engine: Any, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that has a part at fault fails after it has run all the same."""
    step = engine._backend.step

    def faulty(parts):
        result = step(parts)
        at_fault = [
            slot
            for slot, sequence in list(engine._sequences.items())
            if any(part.stream is sequence.stream for part in parts) and faults.slot_fails(slot)
        ]
        if at_fault:
            raise RuntimeError("injected: step")
        return result

    monkeypatch.setattr(engine._backend, "step", faulty)
    monkeypatch.setattr(engine._backend, "steps", functools.partial(steps_in_turn, faulty))


def ending(handle: Handle) -> tuple[str, list[Frame]]:
    """How a request ended, which it must have done once; its frames, by sample and index."""
    assert handle.ended
    events = []
    try:
        events = list(handle.events())
        end = "done"
    except DeadlineExceededError:
        end = "late"
    except CancelledError:
        end = "cancelled"
    except EngineError as error:
        assert "injected" in str(error)
        end = "failed"
    assert handle._events.qsize() == 1, "something came after the end"
    assert sum(isinstance(event, Done) for event in events) == (end == "done")
    frames = [event for event in events if isinstance(event, Frame)]
    return end, sorted(frames, key=lambda frame: (frame.sample_index, frame.index))


@dataclass
class Asked:
    """tokens: of a run alone, i32 [samples, F, h, w]."""

    handle: Handle
    request: Numbered
    tokens: np.ndarray

    def must_end(self, now: float) -> str | None:
        """How, as far as client and clock can tell; None if it may go on."""
        handle = self.handle
        early = TOLERANCE if handle.cancelled else 0.0
        if handle.deadline is not None and now >= handle.deadline - early:
            return "late"
        return "cancelled" if handle.cancelled else None

    def check(self, expected: str) -> None:
        end, frames = ending(self.handle)
        assert end == expected
        if end == "done":
            made = np.stack([frame.tokens for frame in frames])
            np.testing.assert_array_equal(made, self.tokens.reshape(made.shape))


def run_randomly(
    scheduler: Scheduler,
    faults: Faults,
    clock: Clock,
    draw: random.Random,
    arrivals: int,
    make: Callable[[int], tuple[Numbered, int, np.ndarray]],
    check: Callable[[], None],
) -> collections.Counter[str]:
    """Turns until so many requests have come and ended; how they did, each as was foreseen.

    make(number): a request, its number of samples, its tokens.
    """
    open_: list[Asked] = []
    ends: collections.Counter[str] = collections.Counter()
    number = 0
    while number < arrivals or open_:
        for _ in range(draw.choice((0, 1, 1, 2))):
            if number == arrivals:
                break
            request, samples, tokens = make(number)
            if draw.random() < 0.15:
                faults.planned[number] = draw.choice(FAULTS)
            number += 1
            timeout = draw.choice((None, None, draw.uniform(0.001, 0.1)))
            if scheduler.queued == QUEUE:
                with pytest.raises(QueueFullError):
                    scheduler.submit(request, samples=samples, timeout=timeout)
                ends["refused"] += 1
                continue
            handle = scheduler.submit(request, samples=samples, timeout=timeout)
            open_.append(Asked(handle, request, tokens))
        if open_ and draw.random() < 0.1:
            draw.choice(open_).handle.cancel()
        foreseen = {id(each): each.must_end(clock.now) for each in open_}
        scheduler.turn()
        check()
        left = []
        for each in open_:
            expected = foreseen[id(each)]
            if expected is None and each.request.number in faults.hit:
                expected = "failed"
            if expected is None and each.handle.ended:
                expected = "done"
                assert each.request.number not in faults.planned
            if expected is None:
                left.append(each)
            else:
                each.check(expected)
                ends[expected] += 1
        open_ = left
        clock.now += draw.uniform(0.0, 0.005)
    assert sum(ends.values()) == arrivals
    assert (scheduler.active, scheduler.queued, scheduler._live) == (0, 0, {})
    return ends


def test_ten_thousand_requests_on_a_fake_backend(monkeypatch):
    draw, clock, engine = random.Random(5), Clock(monkeypatch), FakeEngine(slots=SLOTS)
    faults = Faults(engine, monkeypatch)
    fail_fake_slots(engine, faults, monkeypatch)
    scheduler = Scheduler(engine, queue_size=QUEUE)

    def make(number: int) -> tuple[Numbered, int, np.ndarray]:
        seed, samples, frames = 6 * number, draw.choice((1, 1, 1, 1, 3)), draw.choice((1, 1, 2))
        request = Numbered(Task.T2V, "a 3", frame_count=frames, seed=seed, number=number)
        tokens = [expected_tokens(seed + s, f) for s in range(samples) for f in range(frames)]
        return request, samples, np.stack(tokens)

    def check() -> None:
        assert len(engine.allocated) == scheduler.active
        assert len(engine.prepared) <= len(engine.seeds)

    ends = run_randomly(scheduler, faults, clock, draw, 10_000, make, check)
    assert set(ends) == {*ENDS, "refused"} and min(ends.values()) > 300 and ends["done"] > 4000
    assert (engine.allocated, engine.prepared) == ({}, [])


def test_what_the_fake_engine_mixes_up_shows():
    """Or the test above would find nothing: a slot that goes on from another's place or prompt."""
    engine = FakeEngine(slots=2)
    for slot in range(2):
        engine.admit(engine.prepare(GenerationRequest(Task.T2I, "x", seed=100 * slot)), slot, 0)
    engine.prepared[1].close()
    engine.next[0] += 1
    for _ in range(4):
        results = engine.step()
    for slot, result in enumerate(results):
        assert (result.frames[0][1] != expected_tokens(100 * slot, 0)).all()


@pytest.fixture(scope="module")
def wanted(tiny_bundle):
    """Requests of many kinds, and the tokens of each alone."""
    engine = tiny_engine(tiny_bundle, slots=1)
    clip = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    sketch = np.random.default_rng(1).integers(0, 5, (3, 16, 16), np.uint8)
    mask = np.zeros((16, 16), bool)
    mask[3:12, 5:] = True
    guided = Sampling(guidance_scale=2.5, top_p=0.9)
    kinds = [
        Numbered(Task.T2I, PROMPT, sampling=guided),
        Numbered(Task.T2V, PROMPT, frame_count=3),
        Numbered(Task.S2I, sketch=sketch[:1]),
        Numbered(Task.S2V, PROMPT, frame_count=3, sketch=sketch, sampling=guided),
        Numbered(Task.I2I, frames=clip[:1], mask=mask),
        Numbered(Task.TV2V, PROMPT, frame_count=3, frames=clip, mask=mask),
        Numbered(Task.V2V, frame_count=3, frames=clip[:2], sampling=Sampling(top_k=9)),
        Numbered(Task.V2V, frame_count=12, frames=clip),
        Numbered(Task.T2V, PROMPT, frame_count=2, schedule="raster"),
    ]
    requests = [dataclasses.replace(each, seed=seed) for seed in range(2) for each in kinds]
    return [(request, alone(engine, request).tokens) for request in requests]


def numbered(wanted, draw: random.Random, number: int) -> tuple[Numbered, np.ndarray]:
    """One of the requests, and its tokens."""
    request, tokens = draw.choice(wanted)
    return dataclasses.replace(request, number=number), tokens


def test_five_hundred_requests_on_the_real_backend(tiny_bundle, wanted, monkeypatch):
    engine = tiny_engine(tiny_bundle, slots=SLOTS)
    draw, clock, faults = random.Random(7), Clock(monkeypatch), Faults(engine, monkeypatch)
    fail_real_parts(engine, faults, monkeypatch)
    scheduler = Scheduler(engine, queue_size=QUEUE)

    def make(number: int) -> tuple[Numbered, int, np.ndarray]:
        request, tokens = numbered(wanted, draw, number)
        return request, 1, tokens

    def check() -> None:
        assert len(engine._sequences) == scheduler.active

    ends = run_randomly(scheduler, faults, clock, draw, 500, make, check)
    assert {*ENDS} <= set(ends) and min(ends[end] for end in ENDS) > 10 and ends["done"] > 100
    assert engine.room == condition_slots(SLOTS) and not _streams(engine._backend)


def test_three_threads_on_the_real_backend(tiny_bundle, wanted, monkeypatch):
    """Clients that wait, leave and are late, with failures in every thread at odd moments.

    What must be cancelled or late is held, by the thread that prepares or the one that decodes,
    until it is.
    """
    engine = tiny_engine(tiny_bundle, slots=SLOTS)
    faults, odd = Faults(engine, monkeypatch), random.Random(8)
    fail_real_parts(engine, faults, monkeypatch)
    scheduler = Scheduler(engine)
    monkeypatch.setattr(scheduler._admission, "check_time", lambda *_: None)
    held: dict[int, tuple[str, threading.Event]] = {}
    found: list[tuple[Asked, str]] = []

    def before(place: str, number: int) -> None:
        time.sleep(odd.choice((0.0, 0.0, 0.0005)))
        where, over = held.get(number, ("", None))
        if over is not None and where == place:
            over.wait()

    faults.before = before

    def ask(client: int) -> None:
        draw = random.Random(client)
        for turn in range(15):
            number = 100 * client + turn
            request, tokens = numbered(wanted, draw, number)
            expected = draw.choice(("done", "done", "failed", "cancelled", "late"))
            over, place = threading.Event(), draw.choice(("prepare", "step"))
            if expected == "failed":
                faults.planned[number] = draw.choice([each for each in FAULTS if each != "call"])
            elif expected != "done":
                held[number] = place, over
            timeout = 0.02 if expected == "late" else None
            handle = scheduler.submit(request, timeout=timeout, client=str(client))
            if expected == "cancelled":
                time.sleep(draw.uniform(0.0, 0.02))
                handle.cancel()
            while expected == "late" and time.perf_counter() < handle.deadline:
                time.sleep(0.001)
            over.set()
            while not handle.ended:
                time.sleep(0.001)
            found.append((Asked(handle, request, tokens), expected))

    clients = [threading.Thread(target=ask, args=(client,), daemon=True) for client in range(6)]
    with scheduler:
        for client in clients:
            client.start()
        for client in clients:
            client.join(120)
            assert not client.is_alive()
    for asked, expected in found:
        asked.check(expected)
    assert {expected for _, expected in found} == ENDS and len(found) == 6 * 15
    assert engine.room == condition_slots(SLOTS) and not _streams(engine._backend)
    assert not engine._sequences


def _streams(backend) -> dict:
    """What a CPU backend still holds of streams."""
    return backend._streams if hasattr(backend, "_streams") else backend._tokens


def test_catching_up_with_what_is_given_does_not_hold_up_others(tiny_bundle, wanted, monkeypatch):
    """Beside a wave of one row, those of what was given are FEW_ROWS."""
    from nuwa.runtime.engine import FEW_ROWS

    engine = tiny_engine(tiny_bundle, slots=2)
    prediction, expected = next(pair for pair in wanted if pair[0].frame_count == 12)
    plain, plain_tokens = next(pair for pair in wanted if pair[0].schedule == "raster")
    calls, step = [], engine._backend.step

    def counted(parts):
        calls.append({part.stream: part.count for part in parts})
        return step(parts)

    monkeypatch.setattr(engine._backend, "step", counted)
    scheduler = Scheduler(engine)
    handles = [scheduler.submit(plain), scheduler.submit(prediction)]
    while scheduler.active or scheduler.queued:
        scheduler.turn()
    for handle, tokens in zip(handles, (plain_tokens, expected), strict=True):
        Asked(handle, plain, tokens).check("done")
    wave, other = calls[0]
    beside = [call[other] for call in calls if wave in call and other in call]
    assert calls[0][wave] == 1 and beside[0] == FEW_ROWS < len(expected) * 16
