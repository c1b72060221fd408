"""Random arrivals, cancels, deadlines and failures: each request ends once, as it should, alone."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from nuwa.runtime import scheduler as scheduler_module
from nuwa.runtime.core import CancelledError, Done, Frame, GenerationRequest
from nuwa.runtime.engine import condition_slots
from nuwa.runtime.errors import DeadlineExceededError, EngineError
from nuwa.runtime.handle import Handle
from nuwa.runtime.scheduler import Scheduler
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

from .engine_run import PROMPT, alone, tiny_engine
from .fake_engine import FakeEngine, expected_tokens

SLOTS = 4
ACTIONS = {"submit": 40, "cancel": 8, "step": 2, "prepare": 1, "admit": 1, "pixels": 1}


class Clock:
    """`time.perf_counter` that a test moves."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(scheduler_module.time, "perf_counter", lambda: self.now)


def ending(handle: Handle) -> str:
    """How a request ended; it must have, and only once."""
    assert handle.ended
    try:
        events = list(handle.events())
    except DeadlineExceededError:
        return "late"
    except CancelledError:
        return "cancelled"
    except EngineError:
        return "failed"
    assert sum(isinstance(event, Done) for event in events) == 1
    return "done"


def test_ten_thousand_events_on_a_fake_backend(monkeypatch):
    draw, clock = random.Random(5), Clock(monkeypatch)
    engine = FakeEngine(slots=SLOTS)
    scheduler = Scheduler(engine, queue_size=16)
    handles: list[Handle] = []
    expected: set[Handle] = set()
    for _ in range(10_000):
        match draw.choices([*ACTIONS], [*ACTIONS.values()])[0]:
            case "submit" if scheduler.queued < 16:
                seed, samples = draw.randrange(500), draw.choice([1, 1, 1, 2, 5])
                request = GenerationRequest(
                    Task.T2V, "a 3", frame_count=draw.randint(1, 3), seed=seed
                )
                timeout = draw.choice([None, None, draw.uniform(0.001, 0.2)])
                handles.append(scheduler.submit(request, samples=samples, timeout=timeout))
            case "cancel" if handles:
                handle = draw.choice(handles[-20:])
                if not handle.ended:
                    expected.add(handle)
                handle.cancel()
            case "step":
                engine.slot_errors[draw.randrange(SLOTS)] = RuntimeError("now and then")
            case "prepare":
                engine.prepare_error = MemoryError("now and then")
            case "admit":
                engine.admit_error = RuntimeError("now and then")
            case "pixels":
                engine.bad_pixel_seeds = {draw.randrange(500)}
        clock.now += draw.uniform(0.0, 0.005)
        scheduler.turn()
        engine.slot_errors.clear()
        assert len(engine.allocated) == scheduler.active
        assert len(engine.prepared) <= SLOTS + 2
    engine.bad_pixel_seeds = set()
    engine.admit_error = engine.prepare_error = None
    for _ in range(400):
        scheduler.turn()
    assert (scheduler.active, scheduler.queued, engine.prepared) == (0, 0, [])
    ends: dict[str, int] = {}
    for handle in handles:
        end = ending(handle)
        ends[end] = ends.get(end, 0) + 1
        if handle in expected:
            assert end != "done"
        if end == "late":
            assert handle.deadline is not None
    assert set(ends) == {"done", "cancelled", "late", "failed"} and min(ends.values()) > 20
    assert sum(ends.values()) == len(handles) > 2000


def test_survivors_have_the_tokens_of_a_fake_run_alone():
    """The frames of those that are done, next to others that fail and leave."""
    draw, engine = random.Random(6), FakeEngine(slots=SLOTS)
    scheduler, handles = Scheduler(engine, queue_size=64), []
    for turn in range(400):
        if turn < 300 and scheduler.queued < 8:
            seed = draw.randrange(400)
            handles.append((scheduler.submit(GenerationRequest(Task.T2V, seed=seed)), seed))
        if turn % 7 == 0:
            engine.slot_errors[draw.randrange(SLOTS)] = RuntimeError("now and then")
        scheduler.turn()
    done = 0
    for handle, seed in handles:
        try:
            frames, _ = handle.result()
        except EngineError:
            continue
        done += 1
        np.testing.assert_array_equal(frames[0].tokens, expected_tokens(seed, 0))
    assert 20 < done < len(handles)


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
        GenerationRequest(Task.T2I, PROMPT, sampling=guided),
        GenerationRequest(Task.T2V, PROMPT, frame_count=3),
        GenerationRequest(Task.S2I, sketch=sketch[:1]),
        GenerationRequest(Task.S2V, PROMPT, frame_count=3, sketch=sketch, sampling=guided),
        GenerationRequest(Task.I2I, frames=clip[:1], mask=mask),
        GenerationRequest(Task.TV2V, PROMPT, frame_count=3, frames=clip, mask=mask),
        GenerationRequest(Task.V2V, frame_count=3, frames=clip[:2], sampling=Sampling(top_k=9)),
        GenerationRequest(Task.V2V, frame_count=12, frames=clip),
        GenerationRequest(Task.T2V, PROMPT, frame_count=2, schedule="raster"),
    ]
    requests = [dataclasses.replace(each, seed=seed) for seed in range(2) for each in kinds]
    return [(request, alone(engine, request).tokens) for request in requests]


def test_five_hundred_events_on_the_real_backend(tiny_bundle, wanted, monkeypatch):
    draw, engine = random.Random(7), tiny_engine(tiny_bundle, slots=SLOTS)
    scheduler, backend = Scheduler(engine, queue_size=8), engine._backend
    step, failing = backend.step, []

    def faulty(parts):
        """Fails a call that has a part of a stream at fault, after it has run all the same."""
        result = step(parts)
        if any(part.stream in failing for part in parts):
            raise RuntimeError("injected")
        return result

    monkeypatch.setattr(backend, "step", faulty)
    handles, events = [], 0
    while events < 500:
        action = draw.random()
        if action < 0.35 and scheduler.queued < 8:
            request, tokens = draw.choice(wanted)
            handles.append((scheduler.submit(request), tokens))
            events += 1
        elif action < 0.40 and handles:
            draw.choice(handles[-8:])[0].cancel()
            events += 1
        elif action < 0.43 and engine._sequences:
            failing.append(draw.choice([*engine._sequences.values()]).stream)
            events += 1
        scheduler.turn()
        assert len(engine._sequences) == scheduler.active
    while scheduler.active or scheduler.queued:
        scheduler.turn()
    assert engine.room == condition_slots(SLOTS) and not _streams(backend)
    ends: dict[str, int] = {}
    for handle, tokens in handles:
        end = ending_of(handle, tokens)
        ends[end] = ends.get(end, 0) + 1
    assert set(ends) == {"done", "cancelled", "failed"} and ends["done"] > 150


def ending_of(handle: Handle, tokens: np.ndarray) -> str:
    """As `ending`; what is done must have these tokens."""
    assert handle.ended
    try:
        frames = [event for event in handle.events() if isinstance(event, Frame)]
    except CancelledError:
        return "cancelled"
    except EngineError:
        return "failed"
    frames.sort(key=lambda frame: frame.index)
    np.testing.assert_array_equal(np.stack([frame.tokens for frame in frames]), tokens)
    return "done"


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
        assert ending_of(handle, tokens) == "done"
    wave, other = calls[0]
    beside = [call[other] for call in calls if wave in call and other in call]
    assert calls[0][wave] == 1 and beside[0] == FEW_ROWS < len(expected) * 16
