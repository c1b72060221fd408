"""Who gets the next slot, who is refused, and when a deadline is known to be too short."""

from __future__ import annotations

import functools
from dataclasses import replace

import grpc
import numpy as np
import pytest

from nuwa.runtime.admission import Admission
from nuwa.runtime.core import GenerationRequest, QueueFullError, SlotStep
from nuwa.runtime.errors import DeadlineTooShortError
from nuwa.runtime.forecast import Forecast
from nuwa.runtime.given import known_positions
from nuwa.runtime.handle import Handle
from nuwa.runtime.running import Running
from nuwa.runtime.scheduler import Scheduler
from nuwa.runtime.submission import Submission
from nuwa.runtime.waiting import Waiting
from nuwa.spec.conditions import lane_texts
from nuwa.spec.config import preset
from nuwa.spec.grid import Grid
from nuwa.spec.plan import Plan, RollingPlan, completion_plan
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

from .fake_engine import FakeEngine
from .messages import details, image


def request(frames: int = 1, seed: int = 0) -> GenerationRequest:
    task = Task.T2V if frames > 1 else Task.T2I
    return GenerationRequest(task, "a 3", frame_count=frames, seed=seed)


def submission(client: str, frames: int = 1, samples: int = 1) -> Submission:
    handle = Handle(request(frames), submitted=0.0, deadline=None, on_cancel=lambda handle: None)
    return Submission(handle, samples, client)


def served(waiting: Waiting) -> str:
    """Clients in the order in which they get slots."""
    order = ""
    while waiting:
        first = next(iter(waiting))
        waiting.take(first)
        first.started += 1
        order += first.client
        if not first.all_started:
            waiting.append(first)
    return order


def filled(*submissions: Submission) -> Waiting:
    waiting = Waiting()
    for each in submissions:
        waiting.append(each)
    return waiting


def test_one_client_is_served_first_come_first_served():
    order = [submission("a", frames) for frames in (3, 1, 10, 1)]
    assert list(filled(*order)) == order


def test_clients_have_their_turns_for_as_many_frames():
    eager = [submission("a") for _ in range(6)]
    assert served(filled(*eager, submission("b"), submission("b"))) == "ababaaaa"
    long = [submission("a", 10) for _ in range(2)]
    short = [submission("b") for _ in range(5)]
    assert served(filled(*long, *short)) == "abbbbba"


def test_samples_of_one_request_have_turns_like_others():
    many = submission("a", samples=4)
    assert served(filled(many, submission("a"), submission("b"))) == "abaaaa"


def test_what_was_served_long_ago_does_not_count():
    waiting = filled(*[submission("a", 10) for _ in range(3)])
    served(waiting)
    for client in "ab":
        waiting.append(submission(client))
    assert served(waiting) == "ab"


def test_cancelled_ones_wait_no_more():
    first, second = submission("a"), submission("b")
    waiting = filled(first, second)
    waiting.remove(first)
    waiting.remove(first)
    assert list(waiting) == [second] and first not in waiting and len(waiting) == 1


def test_who_gives_up_is_not_charged_for_it():
    gone = [submission("a", 10) for _ in range(3)]
    waiting = filled(submission("b"), *gone)
    for each in gone[1:]:
        waiting.remove(each)
    assert waiting._finish["a"] == 10
    waiting.remove(gone[0])
    waiting.append(submission("a"))
    waiting.append(submission("b"))
    assert served(waiting) in ("bab", "abb")


def test_who_comes_before_a_new_request():
    order = [submission("a", 10) for _ in range(3)]
    waiting = filled(*order)
    assert waiting.before("a") == order
    assert waiting.before("b") == order[:1]


def test_what_was_prepared_gives_way_to_whose_turn_is_sooner():
    """Though it has had no sample either: its client has more before it."""
    first, second = submission("a", 10), submission("a", 10)
    first.prepared, second.prepared = (FakeEngine().prepare(request()) for _ in range(2))
    waiting = filled(first, second)
    assert waiting.idle() is None
    late = submission("b")
    waiting.append(late)
    assert list(waiting) == [first, late, second]
    assert waiting.idle() is second and second.started == 0


def test_a_forecast_is_the_best_speed_of_late():
    clock = [0.0]
    forecast = Forecast(now=lambda: clock[0])
    assert forecast.rate(1) == float("inf"), "nothing is known"
    forecast.add(5, 0.2, 1)
    assert forecast.rate(1) == float("inf"), "not long enough to tell"
    forecast.add(5, 0.3, 1)
    assert forecast.rate(1) == pytest.approx(20.0)
    clock[0] = 30.0
    for _ in range(4):
        forecast.add(1, 1.0, 1)
    assert forecast.rate(1) == pytest.approx(20.0)
    forecast.add(1, 1.0, 1)
    assert forecast.rate(1) == pytest.approx(1.0), "it has become slower, and the rest is forgotten"
    clock[0] = 91.0
    assert forecast.rate(1) == float("inf")


def test_a_forecast_for_as_many_slots_as_have_not_been_seen():
    forecast = Forecast()
    forecast.add(20, 1.0, 2)
    assert [forecast.rate(slots) for slots in (1, 2, 4)] == [20.0, 20.0, 40.0]
    forecast.add(30, 1.0, 5)
    assert forecast.rate(4) == 30.0, "not more than five are"
    assert forecast.rate(10) == 60.0


@pytest.mark.parametrize(
    "slots, running, waiting, seconds",
    [
        (1, [], [10], 10),
        (1, [], [10, 5], 15),
        (1, [7.5], [10], 17.5),
        (2, [], [10], 10),  # half of the speed may be its own alone
        (2, [], [10, 10], 20),
        (2, [300], [10], 20),
        (2, [300, 4], [10], 8 + 20),
        (2, [300, 4], [6, 10], 8 + 12 + 20),
        (4, [1, 1, 1, 1], [1], 5),
        (2, [2, 4], [1], 4 + 2),
        (3, [], [], 0),
    ],
)
def test_how_long_what_runs_and_waits_will_take(slots, running, waiting, seconds):
    forecast = Forecast()
    for number in range(1, slots + 1):
        forecast.add(1, 1, number)
    assert forecast.seconds(slots, running, waiting) == pytest.approx(seconds)


def test_more_slots_at_work_are_faster_together():
    forecast = Forecast()
    for slots, rate in ((1, 10), (2, 16)):
        forecast.add(rate, 1, slots)
    assert forecast.seconds(2, [8], [24]) == pytest.approx(16 / 16 + 16 / 10)
    assert Forecast().seconds(2, [8, 8], [24]) == 0.0, "nothing is known"


SPRITES = preset("sprites").decoder
MOST = SPRITES.grid
SIDE = 8  # pixels of a token's patch
BOX, STRIP = np.zeros((2, MOST.height * SIDE, MOST.width * SIDE), bool)
BOX[SIDE : 5 * SIDE, 2 * SIDE : 6 * SIDE] = True
STRIP[:, 3] = True
GUIDED = Sampling(guidance_scale=3.0)


def given(frames: int) -> np.ndarray:
    return np.zeros((frames, *BOX.shape, 3), np.uint8)


KINDS = {
    "image": request(),
    "guided image": replace(request(), sampling=GUIDED),
    "clip": request(10),
    "guided clip": replace(request(10), sampling=GUIDED),
    "short clip": request(3),
    "unconditional clip": replace(request(10), sampling=Sampling(guidance_scale=0.0)),
    "next frame": GenerationRequest(Task.V2V, frame_count=10, frames=given(9)),
    "next frames": GenerationRequest(Task.V2V, frame_count=10, frames=given(1)),
    "long clip": GenerationRequest(Task.V2V, frame_count=40, frames=given(3)),
    "guided prediction": GenerationRequest(
        Task.V2V, "a 3", frame_count=10, frames=given(5), sampling=GUIDED
    ),
    "completion": GenerationRequest(Task.I2I, frames=given(1), mask=BOX),
    "thin completion": GenerationRequest(Task.I2I, frames=given(1), mask=STRIP),
    "edit": GenerationRequest(Task.TV2V, "a 3", frame_count=10, frames=given(10), mask=BOX),
    "raster clip": replace(request(10), schedule="raster"),
}
# Seconds of a step, and of each of its rows: bound by arithmetic, by weights, by something of both.
COSTS = {"rows": (0.0, 1e-5), "steps": (2e-4, 0.0), "both": (1e-4, 1e-5)}


@functools.cache
def decoded(kind: str, cost: str) -> list[tuple[SlotStep, float]]:
    """The steps of a sample that has the engine to itself, and how long each takes."""
    wanted, (least, more) = KINDS[kind], COSTS[cost]
    grid = Grid(min(wanted.frame_count, MOST.frames), MOST.height, MOST.width)
    known = known_positions(wanted, grid)
    plan: Plan
    if wanted.frame_count > MOST.frames:
        plan = RollingPlan(SPRITES, wanted.frame_count, len(wanted.frames))
    else:
        plan = completion_plan(SPRITES, grid, known, wanted.schedule)
    lanes = len(lane_texts(wanted.prompt, wanted.sampling.guidance_scale))
    made, done = [], 0
    for step in range(plan.steps):
        width = len(plan.call(step).fed)
        done += width
        last, prefill = done == plan.grid.size, width > plan.widest
        result = SlotStep(0, done, plan.grid.size, (), last, prefill=prefill)
        made.append((result, least + more * width * lanes))
    return made


def of(kind: str) -> Submission:
    handle = Handle(KINDS[kind], submitted=0.0, deadline=None, on_cancel=lambda handle: None)
    return Submission(handle, 1)


@functools.cache
def taught(kind: str, cost: str) -> Admission:
    """One that has seen some seconds of such requests, one after another, and nothing else."""
    admission, steps, seconds = Admission(1, 8), decoded(kind, cost), 0.0
    while seconds < 1.5:
        running = Running(of(kind), KINDS[kind])
        for result, elapsed in steps:
            admission.learn([(running, result)], elapsed)
            seconds += elapsed
        assert running.left.samples == pytest.approx(0.0, abs=1e-6)
    return admission


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_deadline_that_can_be_met_is_not_refused(kind, cost):
    """Whatever the engine has done before, of other width, length, lanes and given tokens."""
    truth = sum(elapsed for _, elapsed in decoded(kind, cost))
    for before in KINDS:
        taught(before, cost).check_time(Waiting(), [], of(kind), 1.001 * truth)
    wanted = KINDS[kind]
    if wanted.frames is None and wanted.schedule == "wave":
        with pytest.raises(DeadlineTooShortError):
            taught(kind, cost).check_time(Waiting(), [], of(kind), 0.99 * truth)


class Slow(Forecast):
    """One unit a second, of all slots together."""

    def rate(self, slots: int) -> float:
        return 1.0


class Slower(Forecast):
    def rate(self, slots: int) -> float:
        return 0.01


def make_slow(scheduler: Scheduler) -> None:
    """One frame of one lane a second; in other units it would be longer."""
    scheduler._admission.forecasts = (Slow(), Slower(), Slower())


@pytest.fixture
def scheduler():
    scheduler = Scheduler(FakeEngine(), queue_size=8)
    make_slow(scheduler)
    yield scheduler
    scheduler.close()


def test_a_deadline_that_cannot_be_met_is_refused_at_once(scheduler):
    scheduler.submit(request(10), client="a", timeout=10.5)
    with pytest.raises(DeadlineTooShortError, match="needs 15 s or more, with what comes before"):
        scheduler.submit(request(5), client="a", timeout=14.0)
    with pytest.raises(DeadlineTooShortError):
        scheduler.submit(request(4), client="a", samples=2, timeout=17.0)
    scheduler.submit(request(5), client="a", timeout=15.5)
    scheduler.submit(request(5), client="a")
    assert scheduler.queued == 3


def test_what_is_being_decoded_counts(scheduler):
    scheduler.submit(request(10), client="a")
    for _ in range(5):
        scheduler.turn()
    assert scheduler.active == 1
    left = next(iter(scheduler._running.values())).left.rows
    assert 0 < left < 10
    with pytest.raises(DeadlineTooShortError):
        scheduler.submit(request(5), client="a", timeout=left + 4.9)
    scheduler.submit(request(5), client="a", timeout=left + 5.1)


def test_one_client_alone_may_fill_the_queue(scheduler):
    for _ in range(8):
        scheduler.submit(request(), client="a")
    with pytest.raises(QueueFullError, match="the queue is full: 8 requests"):
        scheduler.submit(request(), client="a")


def test_others_are_forgotten_after_a_while():
    clock = [0.0]
    admission = Admission(1, 4, now=lambda: clock[0])
    waiting = filled(*[submission("a") for _ in range(3)])
    admission.check_room(waiting, "b")
    with pytest.raises(QueueFullError, match="3 requests of this client"):
        admission.check_room(waiting, "a")
    admission.check_room(waiting, "")
    clock[0] = 61.0
    admission.check_room(waiting, "a")


def test_who_asks_without_it_being_certain_of_which_model_is_not_one_of_the_others():
    admission = Admission(1, 4)
    waiting = filled(*[submission("a") for _ in range(3)])
    admission.check_room(waiting, "b", certain=False)
    admission.check_room(waiting, "a")
    with pytest.raises(QueueFullError, match="3 requests of this client"):
        admission.check_room(waiting, "b")
        admission.check_room(waiting, "a", certain=False)


def test_one_client_among_others_cannot_fill_the_queue(scheduler):
    scheduler.check_room("b")
    for _ in range(6):
        scheduler.submit(request(), client="a")
    with pytest.raises(QueueFullError, match="6 requests of this client are waiting") as refused:
        scheduler.submit(request(), client="a")
    assert refused.value.retry_seconds == 1.0
    for _ in range(2):
        scheduler.submit(request(), client="b")
    with pytest.raises(QueueFullError, match="the queue is full: 8 requests"):
        scheduler.submit(request(), client="c")


def test_the_time_to_come_back_follows_from_what_waits(scheduler):
    scheduler.check_room("b")
    for _ in range(6):
        scheduler.submit(request(9), client="a")
    with pytest.raises(QueueFullError) as refused:
        scheduler.submit(request(), client="a")
    assert refused.value.retry_seconds == pytest.approx(9.0)
    scheduler._admission.forecasts[0].rate = lambda slots: 1e-3
    with pytest.raises(QueueFullError) as refused:
        scheduler.submit(request(), client="a")
    assert refused.value.retry_seconds == 10.0


def test_speed_is_learnt_from_what_is_decoded():
    found = []
    scheduler = Scheduler(FakeEngine(slots=2))
    scheduler._admission.forecasts[0].add = lambda rows, seconds, slots: found.append(rows)
    handles = [scheduler.submit(request(3, seed)) for seed in range(2)]
    while not all(handle.ended for handle in handles):
        scheduler.turn()
    assert sum(found) == pytest.approx(6.0) and len(found) == 12
    scheduler.close()


def test_a_refused_deadline_tells_clients_not_to_retry(stub, server):
    make_slow(server.scheduler)
    with pytest.raises(grpc.RpcError) as caught:
        stub.GenerateImage(image(), timeout=0.9)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(caught.value)[0].reason == "DEADLINE_TOO_SHORT"
    assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"
    assert stub.GenerateImage(image(), timeout=20).frame.data
