"""Steps of several waves: the same tokens, and an end where there is reason for one."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import time
from unittest import mock

import numpy as np
import pytest

from nuwa.runtime.backends.base import CallDone, Lane, Part, steps_in_turn
from nuwa.runtime.backends.device_memory import _bytes_at
from nuwa.runtime.core import GenerationRequest, Until
from nuwa.runtime.engine import MOST_WAVES, Engine, cache_slots, condition_slots, load_engine
from nuwa.runtime.errors import DeviceLostError, EngineError
from nuwa.runtime.scheduler import STEP_SECONDS, Scheduler
from nuwa.spec.conditions import ConditionLayout, visual_columns
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

from . import fake_tensorrt
from .backend_kinds import (
    KINDS,
    NATIVE,
    WITH_PLUGINS,
    WITHOUT_PLUGINS,
    held,
    loaded,
    made_as,
    opened,
    random_tokens,
    sequence,
)
from .engine_run import PROMPT, admit, alone, finish, stop
from .fake_engine import FakeEngine

LONG = 3600.0  # seconds, that no step takes
CALLS = 4


@pytest.fixture(params=KINDS)
def backend(request, bundle):
    return loaded(bundle, request.param, logits=False)


def crowd(bundle):
    """Clips at different calls, one of them guided."""
    return [
        sequence(bundle, Lane(0, 0, 3), calls=2, temperature=1.0),
        sequence(bundle, Lane(1, 1, 9), Lane(4, 1, 2), seed=1, temperature=0.9, guidance_scale=2.0),
        sequence(bundle, Lane(2, 2, 30), seed=2, calls=1, temperature=1.0, top_k=7),
    ]


def ahead(backend, sequences, most=CALLS) -> list[list[Part]]:
    """The next calls of opened sequences."""
    opened(backend, *sequences)
    return [list(call) for call in zip(*(each.ahead(most) for each in sequences), strict=True)]


def stepped(backend, calls) -> list[CallDone]:
    """All of them; a backend that has to know how long they take begins with one."""
    done: list[CallDone] = []
    while len(done) < len(calls):
        done += backend.steps(calls[len(done) :], Until(LONG))
    return done


def tokens(backend, sequences) -> list[list[int]]:
    return [backend.tokens(each.stream, 0, each.stream.held).tolist() for each in sequences]


def test_several_calls_draw_what_they_draw_one_by_one(bundle, backend):
    together, apart = crowd(bundle), crowd(bundle)
    calls = ahead(backend, together)
    assert len(calls) == CALLS and len({len(call) for call in calls}) == 1
    done = stepped(backend, calls)
    got = tokens(backend, together)
    for each in together:
        backend.close(each.stream)
    for call in ahead(backend, apart):
        assert backend.step(call) == [True] * 3
    assert got == tokens(backend, apart)
    assert got[0] != random_tokens(7, len(got[0])).tolist(), "something was drawn"
    assert [each.finite for each in done] == [[True] * 3] * CALLS
    assert all(each.seconds > 0 for each in done)


def test_a_step_that_takes_long_ends_after_the_call_under_way(bundle, backend):
    sequences = crowd(bundle)
    stepped(backend, ahead(backend, crowd(bundle)))  # a GPU's pace is that of before
    calls = ahead(backend, sequences)
    assert len(backend.steps(calls, Until(1e-9))) == 1
    assert len(backend.steps(calls[1:], Until(LONG))) == CALLS - 1, "it goes on from there"


@pytest.mark.parametrize("wanted", range(1, CALLS))
def test_a_step_ends_after_the_call_during_which_it_is_told_to(bundle, backend, wanted):
    """The flag lies where that call puts a token."""
    stepped(backend, ahead(backend, crowd(bundle)))
    sequences, until = crowd(bundle), Until(LONG)
    calls = ahead(backend, sequences)
    part = calls[wanted - 1][0]
    for row in range(part.first, part.first + part.count):
        flag = held(backend, sequences[0])[part.stream.rows.place[row] :][:1]
        flag[:] = 0
        until._ended = flag
        if len(backend.steps(calls[wanted - 1 : wanted], Until(LONG))) and flag[0]:
            break  # a token that is not 0, which would tell nobody anything
    else:
        pytest.fail("all tokens are 0")
    sequences = crowd(bundle)
    calls = ahead(backend, sequences)
    flag = held(backend, sequences[0])[part.stream.rows.place[row] :][:1]
    flag[:] = 0
    until._ended = flag
    done = backend.steps(calls, until)
    assert flag[0] and len(done) == wanted


@pytest.mark.parametrize("ill", range(CALLS))
def test_numbers_that_are_none_are_told_of_their_call(bundle, backend, ill):
    """One entry that only one call of one clip sees."""
    layout = ConditionLayout.of(bundle.manifest.config)
    entry = layout.visual + 5
    for name, array in backend.conditions.items():
        if name.startswith("cross_value"):
            array[1, entry] = np.nan
    sequences = crowd(bundle)
    part = sequences[1].ahead(CALLS)[ill]
    columns = visual_columns(bundle.manifest.config)
    seen = np.full((len(sequences[1].stream.rows), columns), -1, np.int32)
    seen[part.first + part.count - 1, 3] = entry
    rows = dataclasses.replace(sequences[1].stream.rows, visual=seen)
    sequences[1].stream.rows = rows
    done = stepped(backend, ahead(backend, sequences))
    wanted = [[True, number != ill, True] for number in range(CALLS)]
    # What is drawn from numbers that are none is a token of any value, and fed to the next call.
    assert [each.finite for each in done[: ill + 1]] == wanted[: ill + 1]
    assert all(each.finite[0] and each.finite[2] for each in done)


@pytest.mark.parametrize("kind", NATIVE)
def test_cores_that_are_lent_are_left_alone(bundle, kind):
    """The library reads how many there are before every call."""
    backend = loaded(bundle, kind, logits=False, threads=3)
    free = ctypes.c_int32.from_address(backend._step.threads)
    wanted = None
    for lent in (0, 1, 2):
        sequences = crowd(bundle)
        with backend._cores.lend(lent):
            assert free.value == 3 - lent
            backend.steps(ahead(backend, sequences), Until(LONG))
        got = tokens(backend, sequences)
        assert wanted in (None, got)
        wanted = got


class Deferred(fake_tensorrt.Memory):
    """A GPU's memory: what is put into the stream is done when somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.put_off: list = []
        self.deepest = 0

    def put(self, work):
        if self._recorded is None:
            self.put_off.append(work)
            self.deepest = max(self.deepest, len(self.put_off))
        else:
            self._recorded.append(work)

    def upload(self, array, address):
        self._not_recorded("upload")
        whole = array.reshape(-1).view(np.uint8).copy()
        self.put(lambda: np.copyto(_bytes_at(address, len(whole)), whole))

    def download(self, address, array):
        self._do()
        super().download(address, array)

    def wait(self):
        super().wait()
        self._do()

    def free(self, address):
        assert not self.put_off, "it is freed while work in the stream may use it"
        super().free(address)

    def record(self, work):
        recording, memory = super().record(work), self

        class Put:
            def launch(self):
                for each in recording._works:
                    memory.put(each)

            def free(self):
                assert not memory.put_off, "it is freed while it may run"
                recording.free()

        return Put()

    def _do(self):
        works, self.put_off = self.put_off, []
        for each in works:
            each()


@pytest.fixture
def deferred(monkeypatch):
    """TensorRT that runs when its stream does, with the shapes and addresses of when it was put."""

    def put(context, stream):
        shapes, addresses = dict(context.shapes), dict(context.addresses)

        def run():
            now = context.shapes, context.addresses
            context.shapes, context.addresses = shapes, addresses
            context._execute()
            context.shapes, context.addresses = now

        fake_tensorrt._memories[stream].put(run)
        return True

    monkeypatch.setattr(fake_tensorrt.Context, "execute_async_v3", put)
    monkeypatch.setattr(fake_tensorrt, "Memory", Deferred)


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("kind", [WITH_PLUGINS, WITHOUT_PLUGINS])
@pytest.mark.parametrize("recording", [True, False])
def test_calls_follow_each_other_on_a_gpu_before_any_of_them_has_run(bundle, kind, recording):
    backend = loaded(bundle, kind, logits=False)
    backend._recording &= recording
    apart = loaded(bundle, NATIVE[-1], logits=False)
    for _ in range(3):  # the second time all sizes are recorded, and their pace is known
        together, alone_ = crowd(bundle), crowd(bundle)
        done = stepped(backend, ahead(backend, together))
        assert [each.finite for each in done] == [[True] * 3] * CALLS
        for call in ahead(apart, alone_):
            apart.step(call)
        assert tokens(backend, together) == tokens(apart, alone_)
        for each in (*together, *alone_):
            (backend if each in together else apart).close(each.stream)
    assert backend._memory.deepest > 4 * CALLS, "the calls were put off together"


@pytest.mark.parametrize("launched", [1, CALLS])
def test_answers_of_several_calls_that_are_lost_are_asked_for_no_more(bundle, launched):
    """Made again they would read what the later ones have overwritten."""
    backend = loaded(bundle, WITHOUT_PLUGINS, logits=False)
    stepped(backend, ahead(backend, crowd(bundle)))
    calls = ahead(backend, crowd(bundle))[:launched]

    def fails(address, array):
        raise RuntimeError("nothing comes back")

    with (
        mock.patch.object(backend._memory, "download", fails),
        pytest.raises(RuntimeError if launched == 1 else DeviceLostError, match="nothing comes"),
    ):
        backend.steps(calls, Until(LONG))


def test_a_gpus_pace_is_that_of_calls_of_the_same_size(bundle):
    backend = loaded(bundle, WITHOUT_PLUGINS, logits=False)
    few, many = crowd(bundle)[:1], crowd(bundle)
    stepped(backend, ahead(backend, few))
    assert len(backend.steps(ahead(backend, many), Until(LONG))) == 1, "nothing is known of these"
    assert len(backend.steps(ahead(backend, crowd(bundle)), Until(LONG))) == CALLS


def test_a_call_that_fails_is_told_when_it_comes_first(caplog):
    calls = [[], [], []]
    left = iter([True, False, True])

    def step(parts):
        if not next(left):
            raise MemoryError("none")
        return [True]

    (done,) = steps_in_turn(step, calls, Until(LONG))
    assert done.finite == [True]
    left = iter([False])
    assert "a call that follows 1 others failed" in caplog.text
    with pytest.raises(MemoryError, match="none"):
        steps_in_turn(step, calls, Until(LONG))


REQUESTS = [
    GenerationRequest(Task.T2I, PROMPT, sampling=Sampling(guidance_scale=2.5)),
    GenerationRequest(Task.T2V, PROMPT, frame_count=3, seed=1),
    GenerationRequest(
        Task.V2V, frame_count=12, seed=2, frames=np.full((2, 16, 16, 3), 90, np.uint8)
    ),
    GenerationRequest(Task.T2V, PROMPT, frame_count=2, seed=3, schedule="raster"),
]


@pytest.fixture(params=["native-cpu", "onnxruntime-cpu"])
def engine(request, tiny_bundle):
    return load_engine(tiny_bundle, slots=2, threads=1, backend=request.param)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda each: f"{each.task} {each.schedule}")
def test_an_engine_makes_the_same_tokens_in_fewer_steps(engine, request_):
    wanted = alone(engine, request_)
    run, waves = admit(engine, request_, 0), []
    while run.last is None or not run.last.done:
        (result,) = engine.step(Until(LONG))
        run.take(result)
        waves.append(result.waves)
    stop(engine, 0, run)
    np.testing.assert_array_equal(run.tokens, wanted.tokens)
    assert sum(waves) == wanted.steps and len(waves) < wanted.steps
    assert max(waves) <= MOST_WAVES
    assert engine.room == engine.slots + 2


def test_frames_are_handed_out_by_the_step_that_completes_them(engine):
    request = REQUESTS[1]
    run, when = admit(engine, request, 0), {}
    for wave in itertools.count(1):
        (result,) = engine.step()
        when |= dict.fromkeys((index for index, _ in result.frames), wave)
        if result.done:
            break
    stop(engine, 0, run)
    run, wave, done = admit(engine, request, 0), 0, False
    while not done:
        (result,) = engine.step(Until(LONG))
        wave, done = wave + result.waves, result.done
        assert all(when[index] == wave for index, _ in result.frames)
    stop(engine, 0, run)


def test_who_catches_up_has_waves_one_by_one_beside_it(engine):
    frames = np.full((3, 16, 16, 3), 30, np.uint8)
    mask = np.zeros((16, 16), bool)
    mask[12:, 12:] = True
    completed = GenerationRequest(Task.TV2V, PROMPT, frame_count=3, frames=frames, mask=mask)
    runs = {0: admit(engine, REQUESTS[1], 0), 1: admit(engine, completed, 1)}
    results = engine.step(Until(LONG))
    assert any(each.prefill for each in results) and {each.waves for each in results} == {1}
    for result in results:
        runs[result.slot].take(result)
    finish(engine, runs)
    for slot, request in ((0, REQUESTS[1]), (1, completed)):
        np.testing.assert_array_equal(runs[slot].tokens, alone(engine, request).tokens)


def test_a_slot_that_fails_in_a_later_wave_fails_alone(engine, monkeypatch):
    wanted = alone(engine, REQUESTS[1])
    runs = {slot: admit(engine, REQUESTS[1], slot) for slot in range(2)}
    backend, steps = engine._backend, engine._backend.steps

    def ill(calls, until):
        done = steps(calls, until)
        return [CallDone([True, number < 2], each.seconds) for number, each in enumerate(done)]

    monkeypatch.setattr(backend, "steps", ill)
    well, failed = engine.step(Until(LONG))
    assert well.error is None and well.waves > 2
    assert isinstance(failed.error, FloatingPointError) and failed.frames == ()
    monkeypatch.undo()
    runs[0].take(well)
    stop(engine, 1, runs.pop(1))
    finish(engine, runs)
    np.testing.assert_array_equal(wanted.tokens, alone(engine, REQUESTS[1]).tokens)
    assert runs[0].last.done


def test_every_wave_is_told_with_its_rows(engine):
    told = []
    engine.on_step = lambda rows, seconds: told.append((rows, seconds))
    counts = []
    for until in (None, Until(LONG)):
        run, done = admit(engine, REQUESTS[0], 0), False
        while not done:
            (result,) = engine.step(until)
            done = result.done
        stop(engine, 0, run)
        counts.append([rows for rows, _ in told])
        assert all(seconds > 0 for _, seconds in told)
        told.clear()
    assert counts[0] == counts[1] and sum(counts[0]) == 2 * 16


class Waves(FakeEngine):
    """Notes how far it may go, and whether it was told to end while it was at it."""

    def __init__(self) -> None:
        super().__init__(slots=2)
        self.asked: list[Until | None] = []
        self.meanwhile = lambda: None
        self.ended: list[bool] = []

    def step(self, until=None):
        self.asked.append(until)
        if until is not None:
            before = until.ended
            self.meanwhile()
            self.ended.append(until.ended and not before)
        return super().step(until)


def test_only_what_happens_meanwhile_ends_a_step():
    engine = Waves()
    scheduler = Scheduler(engine)
    request = GenerationRequest(Task.T2V, "a 3", frame_count=3)
    handle = scheduler.submit(request)
    scheduler.turn()
    scheduler.turn()
    assert engine.ended[-1] is False and not engine.asked[-1].ended
    engine.meanwhile = lambda: scheduler.submit(request)
    scheduler.turn()
    assert engine.ended[-1]
    engine.meanwhile = lambda: None
    scheduler.turn()  # in which what was submitted is prepared
    engine.meanwhile = handle.cancel
    scheduler.turn()
    assert engine.ended[-1] and handle.ended
    scheduler.close()


@pytest.mark.parametrize("why", ["previews", "a deadline"])
def test_a_step_is_one_wave_where_something_may_be_due_after_it(why):
    engine = Waves()
    scheduler = Scheduler(engine)
    request = GenerationRequest(Task.T2I, "a 3", previews=2 * (why == "previews"))
    scheduler.submit(request, timeout=STEP_SECONDS if why == "a deadline" else None)
    scheduler.turn()
    assert engine.asked in ([None], [])  # [] should the machine be so slow that it is past
    scheduler.close()


def test_a_far_deadline_is_no_reason():
    engine = Waves()
    scheduler = Scheduler(engine)
    scheduler.submit(GenerationRequest(Task.T2I, "a 3"), timeout=60.0)
    scheduler.turn()
    assert engine.asked == [scheduler._until]
    scheduler.close()


def test_a_request_that_comes_is_admitted_before_others_are_done(engine):
    """The thread that decodes a long clip is told of it."""
    long = GenerationRequest(
        Task.V2V, frame_count=1000, frames=np.full((1, 16, 16, 3), 50, np.uint8)
    )
    with Scheduler(engine) as scheduler:
        first = scheduler.submit(long)
        while not scheduler.active:
            time.sleep(0.001)
        frames, _ = scheduler.submit(REQUESTS[0]).result()
        assert len(frames) == 1 and not first.ended
        first.cancel()


def test_steps_are_counted_by_waves_and_timed_on_average(tiny_bundle):
    engine = load_engine(tiny_bundle, slots=1, threads=1)
    seconds: list[float] = []
    with Scheduler(engine, on_step=seconds.append) as scheduler:
        _, timings = scheduler.submit(REQUESTS[1]).result()
    assert timings.steps == len(seconds) == alone(engine, REQUESTS[1]).steps
    assert sum(seconds) == pytest.approx(timings.decode)


def test_an_error_of_a_whole_step_ends_its_requests(engine, monkeypatch):
    def broken(*_arguments):
        raise RuntimeError("out of order")

    monkeypatch.setattr(engine._backend, "steps", broken)
    monkeypatch.setattr(engine._backend, "step", broken)
    with Scheduler(engine) as scheduler, pytest.raises(EngineError, match="out of order"):
        scheduler.submit(REQUESTS[1]).result()


@pytest.mark.parametrize("most", [2, 7, 12])
def test_waves_that_are_wider_than_a_call_are_decoded_bit_by_bit(bundle, most):
    """Nobody waits for ever, and all get their own tokens."""
    guided = GenerationRequest(
        Task.T2V, "a red 3", frame_count=2, sampling=Sampling(guidance_scale=2.0)
    )
    plain = GenerationRequest(Task.T2V, "a 3", frame_count=2, seed=1)
    frames = np.full((2, 16, 16, 3), 70, np.uint8)
    predicted = GenerationRequest(Task.V2V, frame_count=4, seed=2, frames=frames)
    requests = (guided, plain, dataclasses.replace(guided, seed=3), predicted)
    slots = len(requests)
    room = {"cache_slots": cache_slots(slots), "condition_slots": condition_slots(slots)}
    backend = made_as(WITHOUT_PLUGINS, bundle, **room, threads=1)
    engine = Engine(bundle, backend, slots=slots)
    wanted = [alone(engine, request) for request in requests]
    backend.most_rows = most
    calls, step = [], backend.step

    def counted(parts):
        calls.append(sum(part.count * len(part.stream.lanes) for part in parts))
        return step(parts)

    backend.step = counted
    runs = {slot: admit(engine, each, slot) for slot, each in enumerate(requests)}
    waited = dict.fromkeys(runs, 0)
    while not all(run.last is not None and run.last.done for run in runs.values()):
        served = engine.step(Until(60.0))
        for result in served:
            runs[result.slot].take(result)
        for slot in runs:
            over = runs[slot].last is not None and runs[slot].last.done
            had = over or slot in {result.slot for result in served}
            waited[slot] = 0 if had else waited[slot] + 1
            assert waited[slot] < len(runs), "everybody has his turn"
    for run, before in zip(runs.values(), wanted, strict=True):
        np.testing.assert_array_equal(run.tokens, before.tokens)
    assert max(calls) == most
