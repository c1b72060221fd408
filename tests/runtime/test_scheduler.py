"""The scheduler over the fake engine, most of it turn by turn without a thread."""

from __future__ import annotations

import itertools
import random
import threading
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
    UnsupportedTaskError,
)
from nuwa.runtime.errors import (
    DeadlineExceededError,
    DeviceLostError,
    EngineError,
    ShuttingDownError,
)
from nuwa.runtime.handle import TOLERANCE, Handle
from nuwa.runtime.scheduler import Scheduler
from nuwa.spec.tasks import Task

from .fake_engine import FakeEngine, expected_pixels, expected_tokens
from .messages import once, wait_until


def request(seed: int = 0, frames: int = 1) -> GenerationRequest:
    return GenerationRequest(Task.T2V, "a 3 moves left", frame_count=frames, seed=seed)


def turn(scheduler: Scheduler, times: int = 1) -> None:
    """Turns, and checks after each that the engine's slots are those that the scheduler counts."""
    for _ in range(times):
        scheduler.turn()
        assert len(scheduler.engine.allocated) == scheduler.active
        held = [submission for submission in scheduler._queue if submission.prepared]
        held += {running.submission for running in scheduler._running.values()}
        assert len(scheduler.engine.prepared) == len(set(held))


def test_a_clip_gives_its_events_in_order_and_its_pixels():
    scheduler = Scheduler(FakeEngine())
    handle = scheduler.submit(request(seed=250, frames=3))
    turn(scheduler, 12)
    events = list(handle.events())
    kinds = [type(event) for event in events]
    assert kinds[0] is Accepted and kinds[-1] is Done
    frame_turn = [Progress] * 4 + [Frame]
    assert kinds[1:-1] == frame_turn * 3
    assert [(e.positions_done, e.frames_done) for e in events if isinstance(e, Progress)] == [
        (4 * rows, rows // 4) for rows in range(1, 13)
    ]
    for index, frame in enumerate(event for event in events if isinstance(event, Frame)):
        assert frame.index == index
        np.testing.assert_array_equal(frame.tokens, expected_tokens(250, index))
        np.testing.assert_array_equal(frame.pixels, expected_pixels(frame.tokens))
    assert events[-1].timings.steps == 12
    assert scheduler.active == 0


def test_progress_is_at_most_one_event_a_percent():
    scheduler = Scheduler(FakeEngine())
    handle = scheduler.submit(request(frames=100))
    turn(scheduler, 400)
    assert sum(isinstance(event, Progress) for event in handle.events()) == 101


def test_requests_are_admitted_first_come_first_served():
    engine = FakeEngine(slots=2)
    scheduler = Scheduler(engine)
    handles = [scheduler.submit(request(seed)) for seed in range(5)]
    turn(scheduler)
    assert (scheduler.active, scheduler.queued) == (2, 3)
    turn(scheduler, 11)
    assert [r.seed for r in engine.admitted] == [0, 1, 2, 3, 4]
    for seed, handle in enumerate(handles):
        frames, timings = handle.result()
        np.testing.assert_array_equal(frames[0].tokens, expected_tokens(seed, 0))
        assert timings.steps == 4


def test_a_request_joins_others_that_are_running():
    engine = FakeEngine(slots=2)
    scheduler = Scheduler(engine)
    first = scheduler.submit(request(frames=2))
    turn(scheduler, 3)
    second = scheduler.submit(request(frames=1))
    turn(scheduler, 5)
    assert len(first.result()[0]) == 2 and len(second.result()[0]) == 1
    assert engine.steps == 8


def test_frames_finished_in_one_step_become_pixels_in_one_call():
    engine = FakeEngine(slots=3)
    scheduler = Scheduler(engine)
    for seed in range(3):
        scheduler.submit(request(seed))
    turn(scheduler, 4)
    assert engine.pixel_calls == [3]


def test_samples_wait_for_a_reader_that_is_slow_and_keep_nobody_else_waiting():
    """As one is that ranks them, through no fault of its client's."""
    scheduler = Scheduler(FakeEngine(slots=1), queue_size=8)
    many = {"samples": 40, "most_unread": 3 * 2 * 192}
    handle, *slow = [scheduler.submit(request(1, frames=2), **many) for _ in range(5)]
    events, seen = handle.events(), []
    turn(scheduler, 300)
    assert scheduler.active == 0 and scheduler.queued == 5, "three samples are made of each"
    other = scheduler.submit(request(9, frames=2))
    turn(scheduler, 20)
    assert other.ended, "what waits for its reader takes nobody's room"
    for each in slow:
        each.cancel()
    while not handle.ended:
        seen.append(next(events))
        turn(scheduler, 10)
    seen += list(events)
    frames = [event for event in seen if isinstance(event, Frame)]
    assert [frame.sample_index for frame in frames] == [n // 2 for n in range(80)]
    assert all((f.tokens == expected_tokens(1 + f.sample_index, f.index)).all() for f in frames)


def test_reading_wakes_who_waits_for_the_reader(monkeypatch):
    monkeypatch.setattr("nuwa.runtime.scheduler.SWEEP_SECONDS", 1000.0)
    scheduler = Scheduler(FakeEngine(slots=2), queue_size=4)
    scheduler.start()
    try:
        handle = scheduler.submit(request(1), samples=64, most_unread=2 * 192)
        assert len(handle.result()[0]) == 64
    finally:
        scheduler.close()


def test_a_handle_may_be_left_by_what_its_own_thread_collects():
    """A reader's iterator in a cycle is closed wherever the collector happens to run."""

    def cancelled(handle: Handle) -> None:
        handle.fail(CancelledError())

    handle = Handle(request(), submitted=0.0, deadline=None, on_cancel=cancelled)
    with handle._lock:
        handle.cancel()
    assert handle.ended


def test_cancel_while_queued_makes_room_at_once():
    scheduler = Scheduler(FakeEngine(), queue_size=1)
    running = scheduler.submit(request())
    turn(scheduler)
    waiting = scheduler.submit(request())
    with pytest.raises(QueueFullError, match="the queue is full: 1 requests are waiting"):
        scheduler.submit(request())
    waiting.cancel()
    with pytest.raises(CancelledError, match="waited in the queue"):
        waiting.result()
    scheduler.submit(request()).cancel()
    turn(scheduler, 3)
    assert len(running.result()[0]) == 1


def test_cancel_while_running_frees_the_slot_within_one_turn():
    engine = FakeEngine()
    scheduler = Scheduler(engine)
    first = scheduler.submit(request(frames=10))
    second = scheduler.submit(request(seed=9))
    turn(scheduler, 5)
    first.cancel()
    first.cancel()
    turn(scheduler)
    assert engine.admitted[-1].seed == 9 and engine.steps == 6
    with pytest.raises(CancelledError):
        first.result()
    turn(scheduler, 3)
    np.testing.assert_array_equal(second.result()[0][0].tokens, expected_tokens(9, 0))


def test_leaving_the_event_iterator_cancels():
    scheduler = Scheduler(FakeEngine())
    handle = scheduler.submit(request(frames=10))
    turn(scheduler)
    events = handle.events()
    next(events)
    events.close()
    turn(scheduler)
    assert scheduler.active == 0


def test_a_finished_request_can_be_read_again_and_cancelled():
    scheduler = Scheduler(FakeEngine())
    handle = scheduler.submit(request())
    turn(scheduler, 4)
    assert len(handle.result()[0]) == 1
    handle.cancel()
    assert [type(event) for event in handle.events()] == [Done]


@pytest.mark.parametrize("turns", [0, 2], ids=["queued", "running"])
def test_deadline_ends_a_request(turns):
    scheduler = Scheduler(FakeEngine())
    handle = scheduler.submit(request(), timeout=0.02)
    turn(scheduler, turns)
    time.sleep(0.03)
    turn(scheduler)
    with pytest.raises(DeadlineExceededError, match=r"within 0.02 s"):
        handle.result()
    assert (scheduler.active, scheduler.queued) == (0, 0)


def test_deadline_that_is_kept_changes_nothing():
    scheduler = Scheduler(FakeEngine())
    handle = scheduler.submit(request(), timeout=60)
    turn(scheduler, 4)
    assert len(handle.result()[0]) == 1


def test_a_failing_step_ends_all_running_requests_and_no_waiting_one():
    engine = FakeEngine(slots=2)
    scheduler = Scheduler(engine)
    handles = [scheduler.submit(request(seed)) for seed in range(3)]
    turn(scheduler)
    engine.step_error = ValueError("shapes disagree")
    turn(scheduler)
    for handle in handles[:2]:
        with pytest.raises(EngineError, match="while decoding: ValueError: shapes disagree"):
            handle.result()
    turn(scheduler, 4)
    np.testing.assert_array_equal(handles[2].result()[0][0].tokens, expected_tokens(2, 0))


def test_a_request_that_cannot_be_admitted_fails_alone():
    engine = FakeEngine(slots=2)
    scheduler = Scheduler(engine)
    good = scheduler.submit(request(1))
    turn(scheduler)
    engine.admit_error = MemoryError("no room")
    bad = scheduler.submit(request(2))
    after = scheduler.submit(request(3))
    turn(scheduler, 4)
    with pytest.raises(EngineError, match="preparing the request: MemoryError") as failure:
        bad.result()
    assert isinstance(failure.value.__cause__, MemoryError)
    assert len(good.result()[0]) == 1
    turn(scheduler, 1)
    assert len(after.result()[0]) == 1


def test_a_request_that_cannot_be_prepared_fails_alone():
    engine = FakeEngine(slots=2)
    scheduler = Scheduler(engine)
    engine.prepare_error = MemoryError("no room")
    bad, good = scheduler.submit(request(2)), scheduler.submit(request(1))
    turn(scheduler, 4)
    with pytest.raises(EngineError, match="preparing the request: MemoryError"):
        bad.result()
    assert len(good.result()[0]) == 1 and engine.prepared == []


def test_a_slot_that_fails_ends_its_request_alone():
    engine = FakeEngine(slots=2)
    scheduler = Scheduler(engine)
    handles = [scheduler.submit(request(seed)) for seed in range(2)]
    turn(scheduler)
    engine.slot_errors[1] = FloatingPointError("not a number")
    turn(scheduler, 3)
    assert len(handles[0].result()[0]) == 1
    with pytest.raises(EngineError, match="while decoding: FloatingPointError: not a number"):
        handles[1].result()


def test_requests_are_prepared_while_others_decode():
    engine = FakeEngine()
    scheduler = Scheduler(engine)
    handles = [scheduler.submit(request(seed)) for seed in range(4)]
    turn(scheduler)
    assert [each.request.seed for each in engine.prepared] == [0, 1, 2]
    turn(scheduler, 15)
    assert [len(handle.result()[0]) for handle in handles] == [1] * 4 and engine.prepared == []


def test_many_samples_do_not_keep_others_from_being_prepared():
    engine = FakeEngine()
    scheduler = Scheduler(engine)
    for seed in range(3):
        scheduler.submit(request(seed), samples=5)
    late, later = scheduler.submit(request(9)), scheduler.submit(request(8))
    turn(scheduler, 20)
    assert len(late.result()[0]) == len(later.result()[0]) == 1, "after one sample of each"
    turn(scheduler, 50)
    assert (scheduler.active, scheduler.queued, engine.prepared) == (0, 0, [])


def test_a_request_whose_pixels_fail_fails_alone():
    engine = FakeEngine(slots=3)
    engine.bad_pixel_seeds = {1}
    scheduler = Scheduler(engine)
    handles = [scheduler.submit(request(seed)) for seed in range(3)]
    turn(scheduler, 4)
    assert engine.pixel_calls == [3, 1, 1, 1]
    with pytest.raises(EngineError, match="making pixels"):
        handles[1].result()
    assert len(handles[0].result()[0]) == len(handles[2].result()[0]) == 1
    assert scheduler.active == 0


def test_a_failing_release_is_survived(caplog):
    engine = FakeEngine()
    scheduler = Scheduler(engine)
    handle = scheduler.submit(request())
    release, engine.release = engine.release, lambda slot: 1 / 0
    scheduler.turn()
    handle.cancel()
    scheduler.turn()
    assert "could not release slot 0" in caplog.text
    engine.release = release
    engine.release(0)
    handle = scheduler.submit(request())
    turn(scheduler, 4)
    assert len(handle.result()[0]) == 1


def test_what_the_engine_refuses_is_not_queued():
    scheduler = Scheduler(FakeEngine())
    with pytest.raises(ValueError, match="refused"):
        scheduler.submit(GenerationRequest(Task.T2I, "refused"))
    with pytest.raises(UnsupportedTaskError):
        scheduler.submit(GenerationRequest(Task.S2I))
    assert scheduler.queued == 0


def test_timings_are_the_phases_of_the_request():
    engine = FakeEngine()
    slow = {"prepare": 0.02, "step": 0.01, "pixels": 0.03}
    for name, seconds in slow.items():
        method = getattr(engine, name)

        def slowed(*args, _method=method, _seconds=seconds):
            time.sleep(_seconds)
            return _method(*args)

        setattr(engine, name, slowed)
    scheduler = Scheduler(engine)
    handle = scheduler.submit(request())
    time.sleep(0.01)
    turn(scheduler, 4)
    timings = handle.result()[1]
    assert timings.queue >= 0.01 and timings.encode >= 0.02
    assert timings.decode >= 0.04 and timings.pixels >= 0.03
    parts = timings.queue + timings.encode + timings.decode + timings.pixels
    assert parts <= timings.total <= parts + 5


def test_ten_thousand_random_turns_leak_no_slot():
    generator = random.Random(3)
    engine = FakeEngine(slots=4)
    scheduler = Scheduler(engine, queue_size=8)
    handles = []
    for _ in range(10_000):
        action = generator.random()
        if action < 0.3 and scheduler.queued < 8:
            handles.append(scheduler.submit(request(frames=generator.randint(1, 2))))
        elif action < 0.4 and handles:
            generator.choice(handles).cancel()
        elif action < 0.42:
            engine.step_error = RuntimeError("now and then")
        turn(scheduler)
    engine.step_error = None
    turn(scheduler, 100)
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
    assert sum(ends.values()) == len(handles) and min(ends.values()) > 0


def test_many_threads_over_the_decode_thread():
    engine = FakeEngine(slots=3)
    results: dict[int, np.ndarray] = {}

    def ask(seed: int) -> None:
        results[seed] = scheduler.submit(request(seed)).result()[0][0].tokens

    with Scheduler(engine) as scheduler:
        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert len(results) == 20
    for seed, tokens in results.items():
        np.testing.assert_array_equal(tokens, expected_tokens(seed, 0))


@pytest.fixture
def unpainted():
    """A running scheduler with a request that is decoded and whose pixels do not come."""
    engine, gate = FakeEngine(), threading.Event()
    pixels = engine.pixels
    engine.pixels = lambda tokens: (gate.wait(60), pixels(tokens))[1]
    with Scheduler(engine) as scheduler:
        yield scheduler, engine
        gate.set()


@pytest.mark.parametrize("way", ["cancel", "deadline"])
def test_a_request_that_waits_for_its_pixels_can_be_ended(unpainted, way):
    scheduler, engine = unpainted
    handle = scheduler.submit(request(frames=3))
    wait_until(lambda: engine.steps == 12 and scheduler.active == 0)
    if way == "cancel":
        handle.cancel()
    else:
        handle.deadline = time.perf_counter()
    with pytest.raises(CancelledError if way == "cancel" else DeadlineExceededError):
        handle.result()


def test_a_deadline_is_one_whoever_is_first_to_notice(unpainted):
    """gRPC cancels a call at its deadline: what waits for its pixels then is late, not left."""
    scheduler, engine = unpainted
    handle = scheduler.submit(request(), timeout=60)
    wait_until(lambda: engine.steps == 4 and scheduler.active == 0)
    handle.deadline = time.perf_counter() + TOLERANCE / 2
    handle.cancel()
    with pytest.raises(DeadlineExceededError):
        handle.result()


def test_frames_that_are_given_are_not_decoded():
    engine = FakeEngine()
    scheduler = Scheduler(engine)
    given = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    handle = scheduler.submit(GenerationRequest(Task.V2V, frame_count=3, frames=given))
    turn(scheduler, 12)
    frames, _ = handle.result()
    np.testing.assert_array_equal([frame.pixels for frame in frames[:2]], given)
    np.testing.assert_array_equal(frames[2].pixels, expected_pixels(expected_tokens(0, 2)))
    assert engine.pixel_calls == [1]


def test_close_ends_what_waits_for_its_pixels(unpainted, monkeypatch):
    scheduler, engine = unpainted
    monkeypatch.setattr("nuwa.runtime.scheduler.CLOSE_SECONDS", 0.1)
    handle = scheduler.submit(request())
    wait_until(lambda: engine.steps == 4 and scheduler.active == 0)
    scheduler.close()
    with pytest.raises(ShuttingDownError):
        handle.result()


def test_close_ends_what_runs_and_what_waits():
    engine = FakeEngine()
    engine.gate.clear()
    scheduler = Scheduler(engine)
    scheduler.start()
    running, waiting = (scheduler.submit(request(frames=10)) for _ in range(2))
    events = running.events()
    assert isinstance(next(events), Accepted)
    once(lambda: scheduler._aborting, engine.gate.set)
    scheduler.close()
    for ended in (events, waiting.events()):
        with pytest.raises(ShuttingDownError, match="shut down before"):
            list(ended)
    with pytest.raises(ShuttingDownError, match="shutting down"):
        scheduler.submit(request())
    assert engine.allocated == {}
    scheduler.close()


def test_close_with_grace_finishes_what_is_at_hand():
    scheduler = Scheduler(FakeEngine())
    scheduler.start()
    handles = [scheduler.submit(request(seed)) for seed in range(3)]
    scheduler.close(grace=10)
    assert [len(handle.result()[0]) for handle in handles] == [1, 1, 1]


def test_close_of_a_scheduler_that_never_started_ends_what_waits():
    scheduler = Scheduler(FakeEngine())
    handle = scheduler.submit(request())
    scheduler.close()
    with pytest.raises(ShuttingDownError):
        handle.result()


def test_nobody_waits_for_a_dead_decode_thread(monkeypatch, caplog):
    engine = FakeEngine()
    scheduler = Scheduler(engine)
    handle = scheduler.submit(request())
    monkeypatch.setattr(scheduler, "_admit", lambda: 1 / 0)
    scheduler.start()
    with pytest.raises(EngineError, match="thread nuwa-decode died"):
        handle.result()
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(ShuttingDownError):
        scheduler.submit(request())


@pytest.mark.parametrize("work", ["prepare", "admit", "step", "pixels"])
def test_a_lost_device_ends_everything_at_once(monkeypatch, caplog, work):
    """Nothing is tried again on a device that can do nothing more, and somebody is told."""
    engine, died = FakeEngine(), threading.Event()
    scheduler = Scheduler(engine, on_death=died.set)
    handles = [scheduler.submit(request(seed)) for seed in range(3)]
    calls = []

    def lose(*_arguments, **_options):
        calls.append(work)
        raise DeviceLostError("GPU 0 is lost to this process (cudaErrorIllegalAddress)")

    monkeypatch.setattr(engine, work, lose)
    scheduler.start()
    for handle in handles:
        with pytest.raises(ShuttingDownError, match="has to start again: GPU 0 is lost"):
            handle.result()
    assert died.wait(5) and len(calls) == 1
    with pytest.raises(ShuttingDownError):
        scheduler.submit(request())
    assert "DeviceLostError" in caplog.text
    scheduler.close()


@pytest.mark.parametrize("way", ["cancel", "finish"])
def test_a_device_lost_while_a_slot_is_emptied_leaves_nobody_waiting(monkeypatch, way):
    engine = FakeEngine()
    scheduler = Scheduler(engine)

    def lose(slot):
        raise DeviceLostError("GPU 0 is lost to this process")

    monkeypatch.setattr(engine, "release", lose)
    engine.gate.clear()
    scheduler.start()
    handle = scheduler.submit(request(frames=2 if way == "cancel" else 1))
    events = handle.events()
    assert isinstance(next(events), Accepted)
    if way == "cancel":
        handle.cancelled = True
    engine.gate.set()
    wait_until(lambda: handle.ended)
    with pytest.raises(ShuttingDownError, match="has to start again"):
        list(events)
    scheduler.close()


def test_nobody_waits_for_a_painter_that_died_while_a_slot_was_emptied(monkeypatch):
    """The second request is neither decoded nor painted when the first one's pixels end it all."""
    engine, gate = FakeEngine(slots=2), threading.Event()
    scheduler = Scheduler(engine)

    def lose(tokens):
        gate.wait(60)
        raise DeviceLostError("GPU 0 is lost to this process")

    def vacate(slot, vacate=scheduler._vacate):
        vacate(slot)
        if engine.steps == 8:
            gate.set()
            wait_until(lambda: scheduler._death is not None)

    monkeypatch.setattr(engine, "pixels", lose)
    monkeypatch.setattr(scheduler, "_vacate", vacate)
    handles = [scheduler.submit(request(frames=frames)) for frames in (1, 2)]
    scheduler.start()
    wait_until(lambda: all(handle.ended for handle in handles))
    for handle in handles:
        with pytest.raises(ShuttingDownError, match="has to start again"):
            handle.result()
    scheduler.close()


@pytest.mark.parametrize("size", [0, -1])
def test_a_queue_has_room_for_one_at_least(size):
    with pytest.raises(ValueError, match="queue_size"):
        Scheduler(FakeEngine(), queue_size=size)


def test_wrong_answers_of_an_engine_end_the_request_not_the_loop():
    engine = FakeEngine()
    scheduler = Scheduler(engine)
    pixels, engine.pixels = engine.pixels, lambda tokens: pixels(tokens)[:0]
    handle = scheduler.submit(request())
    turn(scheduler, 4)
    with pytest.raises(EngineError, match="making pixels"):
        handle.result()
    step, engine.step = engine.step, lambda until: list(itertools.repeat("nonsense", 1))
    handle = scheduler.submit(request())
    turn(scheduler)
    with pytest.raises(EngineError, match="decoding"):
        handle.result()
    engine.step, engine.pixels = step, pixels
    handle = scheduler.submit(request())
    turn(scheduler, 4)
    assert len(handle.result()[0]) == 1
