"""Requests for several samples: how the scheduler shares slots, and that each request ends once."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from nuwa.runtime.core import (
    Accepted,
    CancelledError,
    Done,
    Frame,
    GenerationRequest,
    Progress,
    QueueFullError,
)
from nuwa.runtime.errors import DeadlineExceededError, EngineError, FieldError, ShuttingDownError
from nuwa.runtime.scheduler import Scheduler
from nuwa.spec.tasks import Task

from .fake_engine import FakeEngine, expected_tokens


def request(seed: int = 0, frames: int = 1, sample_index: int = 0) -> GenerationRequest:
    return GenerationRequest(
        Task.T2V, "a 3", frame_count=frames, seed=seed, sample_index=sample_index
    )


def turn(scheduler: Scheduler, times: int = 1) -> None:
    """Turns, and checks after each that the engine's slots are those that the scheduler counts."""
    for _ in range(times):
        scheduler.turn()
        assert len(scheduler.engine.allocated) == scheduler.active


def admitted(engine: FakeEngine) -> list[tuple[int, int]]:
    """(seed, sample_index) of every admission so far."""
    return [(each.seed, each.sample_index) for each in engine.admitted]


def test_each_sample_has_its_index_and_its_frames():
    engine = FakeEngine(slots=2)
    scheduler = Scheduler(engine)
    handle = scheduler.submit(request(seed=5, frames=2, sample_index=7), samples=3)
    turn(scheduler, 16)
    events = list(handle.events())
    assert [e.sample_index for e in events if isinstance(e, Accepted)] == [7, 8, 9]
    assert sum(isinstance(e, Done) for e in events) == 1 and isinstance(events[-1], Done)
    for sample in (7, 8, 9):
        own = [e for e in events[:-1] if e.sample_index == sample]
        assert [type(e) for e in own] == [Accepted, *([Progress] * 4 + [Frame]) * 2]
        for index, frame in enumerate(e for e in own if isinstance(e, Frame)):
            assert frame.index == index
            np.testing.assert_array_equal(frame.tokens, expected_tokens(5 + sample, index))
        done = [(e.positions_done, e.frames_done) for e in own if isinstance(e, Progress)]
        assert done == [(4 * rows, rows // 4) for rows in range(1, 9)]
    # Two samples share the first eight steps, the third takes eight of its own.
    assert events[-1].timings.steps == 16 == engine.steps


def test_the_result_is_ordered_by_sample():
    scheduler = Scheduler(FakeEngine(slots=2))
    handle = scheduler.submit(request(frames=2), samples=2)
    turn(scheduler, 8)
    frames, _ = handle.result()
    assert [(f.sample_index, f.index) for f in frames] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_samples_use_the_slots_that_are_free():
    engine = FakeEngine(slots=4)
    scheduler = Scheduler(engine)
    scheduler.submit(request(seed=1))
    scheduler.submit(request(seed=2), samples=8)
    turn(scheduler)
    assert admitted(engine) == [(1, 0), (2, 0), (2, 1), (2, 2)]
    turn(scheduler, 4)
    assert admitted(engine)[4:] == [(2, 3), (2, 4), (2, 5), (2, 6)]


def test_others_wait_for_one_sample_only():
    engine = FakeEngine()
    scheduler = Scheduler(engine)
    many = scheduler.submit(request(seed=1), samples=64)
    turn(scheduler)
    scheduler.submit(request(seed=2))
    scheduler.submit(request(seed=3), samples=2)
    turn(scheduler, 4 * 5)
    order = [(1, 0), (1, 1), (2, 0), (3, 0), (1, 2), (3, 1)]
    assert admitted(engine) == order
    turn(scheduler, 4 * 63)
    assert len(many.result()[0]) == 64 and scheduler.queued == 0


def test_a_request_with_samples_still_to_start_counts_as_waiting_once():
    scheduler = Scheduler(FakeEngine(), queue_size=1)
    scheduler.submit(request(), samples=3)
    assert scheduler.queued == 1
    for _ in range(2):
        turn(scheduler)
        assert (scheduler.queued, scheduler.active) == (1, 1)
        with pytest.raises(QueueFullError):
            scheduler.submit(request())
        turn(scheduler, 3)
    turn(scheduler)
    assert (scheduler.queued, scheduler.active) == (0, 1)
    scheduler.submit(request())


def test_a_cancel_ends_all_samples():
    engine = FakeEngine(slots=2)
    scheduler = Scheduler(engine)
    handle = scheduler.submit(request(frames=10), samples=5)
    turn(scheduler)
    assert (scheduler.active, scheduler.queued) == (2, 1)
    handle.cancel()
    turn(scheduler)
    assert (scheduler.active, scheduler.queued) == (0, 0)
    with pytest.raises(CancelledError):
        handle.result()
    assert len(engine.admitted) == 2


def test_a_cancel_before_the_first_sample_makes_room_at_once():
    scheduler = Scheduler(FakeEngine(), queue_size=1)
    handle = scheduler.submit(request(), samples=64)
    handle.cancel()
    assert scheduler.queued == 0
    with pytest.raises(CancelledError, match="waited in the queue"):
        handle.result()


def test_a_cancel_between_two_samples_ends_the_rest():
    engine = FakeEngine()
    scheduler = Scheduler(engine)
    handle = scheduler.submit(request(), samples=3)
    turn(scheduler, 4)
    assert (scheduler.active, scheduler.queued) == (0, 1)
    handle.cancel()
    turn(scheduler)
    assert (scheduler.active, scheduler.queued, len(engine.admitted)) == (0, 0, 1)
    with pytest.raises(CancelledError):
        list(handle.events())


def test_a_deadline_ends_all_samples():
    scheduler = Scheduler(FakeEngine(slots=2))
    handle = scheduler.submit(request(), samples=5, timeout=0.02)
    turn(scheduler)
    time.sleep(0.03)
    turn(scheduler)
    with pytest.raises(DeadlineExceededError, match=r"within 0.02 s"):
        handle.result()
    assert (scheduler.active, scheduler.queued) == (0, 0)


def test_a_sample_that_cannot_be_admitted_ends_the_request_alone():
    engine = FakeEngine(slots=3)
    scheduler = Scheduler(engine)
    good = scheduler.submit(request(seed=1))
    turn(scheduler)
    bad = scheduler.submit(request(seed=2), samples=4)
    admit = engine.admit

    def refuse_the_second(prepared, slot, sample_index):
        admit(prepared, slot, sample_index)
        if sample_index == 1:
            raise MemoryError("no room")

    engine.admit = refuse_the_second
    turn(scheduler, 3)
    with pytest.raises(EngineError, match="preparing the request: MemoryError"):
        bad.result()
    assert (scheduler.active, scheduler.queued) == (0, 0)
    assert len(good.result()[0]) == 1


def test_a_sample_whose_pixels_fail_ends_the_request_alone():
    engine = FakeEngine(slots=4)
    engine.bad_pixel_seeds = {21, 22}  # the first tokens of two samples that finish in one step
    scheduler = Scheduler(engine)
    bad = scheduler.submit(request(seed=20), samples=3)
    good = scheduler.submit(request(seed=1))
    turn(scheduler, 4)
    with pytest.raises(EngineError, match="making pixels"):
        bad.result()
    assert len(good.result()[0]) == 1
    # All four at once, the first sample, the second, which fails, and the good request.
    assert engine.pixel_calls == [4, 1, 1, 1]
    assert (scheduler.active, scheduler.queued) == (0, 0)


def test_a_failing_step_ends_a_request_whose_other_samples_wait():
    engine = FakeEngine()
    scheduler = Scheduler(engine)
    handle = scheduler.submit(request(), samples=3)
    turn(scheduler)
    engine.step_error = ValueError("shapes disagree")
    turn(scheduler)
    with pytest.raises(EngineError, match="while decoding"):
        handle.result()
    assert (scheduler.active, scheduler.queued) == (0, 0)


def test_close_ends_all_samples():
    scheduler = Scheduler(FakeEngine())
    handle = scheduler.submit(request(frames=10), samples=3)
    turn(scheduler)
    scheduler.close()
    with pytest.raises(ShuttingDownError):
        handle.result()
    assert (scheduler.active, scheduler.queued, scheduler.engine.allocated) == (0, 0, {})


def test_close_with_grace_finishes_all_samples():
    scheduler = Scheduler(FakeEngine())
    scheduler.start()
    handle = scheduler.submit(request(), samples=5)
    scheduler.close(grace=10)
    assert len(handle.result()[0]) == 5


def test_the_engine_judges_the_last_sample_too(monkeypatch):
    engine = FakeEngine()

    def check(request):
        if request.sample_index > 9:
            raise FieldError("sampling.sample_index", "too large")

    monkeypatch.setattr(engine, "check", check)
    scheduler = Scheduler(engine)
    scheduler.submit(request(sample_index=8), samples=2)
    with pytest.raises(FieldError):
        scheduler.submit(request(sample_index=8), samples=3)
    with pytest.raises(ValueError, match="samples 0 is not at least 1"):
        scheduler.submit(request(), samples=0)
    assert scheduler.queued == 1


def test_ten_thousand_random_turns_leak_no_slot():
    generator = random.Random(4)
    engine = FakeEngine(slots=4)
    scheduler = Scheduler(engine, queue_size=8)
    handles = []
    for _ in range(10_000):
        action = generator.random()
        if action < 0.2 and scheduler.queued < 8:
            handle = scheduler.submit(
                request(frames=generator.randint(1, 2)), samples=generator.randint(1, 6)
            )
            handles.append(handle)
        elif action < 0.3 and handles:
            generator.choice(handles[-9:]).cancel()
        elif action < 0.31:
            engine.step_error = RuntimeError("now and then")
        elif action < 0.32:
            engine.admit_error = RuntimeError("now and then")
        turn(scheduler)
        assert scheduler.queued <= 8
    engine.step_error = engine.admit_error = None
    turn(scheduler, 400)
    assert (scheduler.active, scheduler.queued, engine.allocated) == (0, 0, {})
    ends = {"done": 0, "cancelled": 0, "failed": 0}
    for handle in handles:
        try:
            handle.result()
            ends["done"] += 1
        except CancelledError:
            ends["cancelled"] += 1
        except EngineError:
            ends["failed"] += 1
        assert handle._events.qsize() == 1, "a request ends once"
    assert sum(ends.values()) == len(handles) and min(ends.values()) > 0
