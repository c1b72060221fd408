"""V2V beyond the trained length: the tokens of a plain loop, in memory that does not grow."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tracemalloc

import numpy as np
import pytest

from nuwa.runtime.backends.base import Lane
from nuwa.runtime.core import GenerationRequest
from nuwa.runtime.errors import FieldError
from nuwa.runtime.sequence import Sequence
from nuwa.spec.config import preset
from nuwa.spec.grid import Grid
from nuwa.spec.philox import uniforms
from nuwa.spec.plan import RollingPlan
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

from .engine_run import PROMPT, admit, alone, finish, step, stop, tiny_engine

TRAINED, SIDE, CELLS = 3, 4, 16  # frames, and tokens of a side and of a frame
FRAMES = 25


@pytest.fixture(scope="module")
def engine(tiny_bundle):
    return tiny_engine(tiny_bundle, slots=2)


@pytest.fixture(scope="module")
def clip():
    return np.random.default_rng(0).integers(0, 256, (TRAINED, 16, 16, 3), np.uint8)


def predict(clip: np.ndarray, given: int, frames: int = FRAMES, **fields) -> GenerationRequest:
    return GenerationRequest(Task.V2V, frame_count=frames, frames=clip[:given], **fields)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint, engine):
    """tokens(request): i32 [F, h, w] one by one in raster order; nothing is ever forgotten."""
    torch = pytest.importorskip("torch")
    from nuwa.training.checkpoint import load_checkpoint
    from nuwa.training.sampling import sample

    loaded = load_checkpoint(tiny_checkpoint)
    nuwa, heads = loaded.nuwa, loaded.config.decoder.heads
    offsets = list(itertools.product((-1, 0, 1), repeat=3))[:14]  # up to the position itself

    def attend(query, keys, values, bias):
        """query [d] on keys, values [n, d]; bias [heads, n]."""
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in (query, keys, values))
        weights = (torch.einsum("hc,nhc->hn", q, k) / q.shape[-1] ** 0.5 + bias).softmax(-1)
        return torch.einsum("hn,nhc->hc", weights, v).flatten()

    class Lane:
        """One prompt, and the keys and values of every position so far, by layer."""

        def __init__(self, prompt: str) -> None:
            ids = torch.from_numpy(loaded.text_tokenizer.encode(prompt)[None]).long()
            memory = nuwa.text(ids)[0][ids[0] != nuwa.text.pad]
            self.text = [block.cross_memory(memory) for block in nuwa.blocks]
            self.past = [({}, {}) for _ in nuwa.blocks]

        def logits(self, token: int, cell: tuple[int, int, int]):
            f, i, j = cell
            x = nuwa.embedding(torch.tensor(token), torch.tensor([f % TRAINED, i, j]))
            for block, (keys, values), text in zip(nuwa.blocks, self.past, self.text, strict=True):
                query, keys[cell], values[cell] = block.self_project(x)
                near = [(n, (f + a, i + b, j + c)) for n, (a, b, c) in enumerate(offsets)]
                near = [(n, each) for n, each in near if each in keys]
                x = block.after_self(
                    x,
                    attend(
                        query,
                        torch.stack([keys[each] for _, each in near]),
                        torch.stack([values[each] for _, each in near]),
                        block.bias[:, [n for n, _ in near]],
                    ),
                )
                x = block.after_cross(x, attend(block.cross_query(x), *text, 0.0))
            return nuwa.logits(x)

    @torch.no_grad()
    def tokens(request: GenerationRequest) -> np.ndarray:
        made = dict(enumerate(engine.tokens(request.frames).reshape(-1).tolist()))
        scale = request.sampling.guidance_scale
        lanes = [Lane(request.prompt or "none")] + ([Lane("none")] if scale != 1.0 else [])
        draws = uniforms(request.seed, 0, np.arange(request.frame_count * CELLS))
        cells = itertools.product(range(request.frame_count), range(SIDE), range(SIDE))
        for p, (f, i, j) in enumerate(cells):
            before = p - 1 if j else p - SIDE if i else p - CELLS
            fed = made[before] if p else loaded.config.bos
            logits = [lane.logits(fed, (f, i, j)) for lane in lanes]
            guided = logits[-1] + scale * (logits[0] - logits[-1]) if len(lanes) > 1 else logits[0]
            draw, whole, zero = torch.from_numpy(draws[p : p + 1]), torch.ones(1), torch.zeros(1)
            drawn = sample(guided[None], whole, zero.int(), whole, draw, torch.arange(1))
            made.setdefault(p, int(drawn))
        return np.array([made[p] for p in range(len(made))]).reshape(-1, SIDE, SIDE)

    return tokens


@pytest.mark.parametrize(
    ("given", "prompt", "guidance"), [(1, "", 1.0), (2, PROMPT, 2.0), (TRAINED, "", 1.0)]
)
def test_waves_raster_and_a_plain_loop_agree(engine, reference, clip, given, prompt, guidance):
    sampling = Sampling(guidance_scale=guidance)
    request = predict(clip, given, seed=given, prompt=prompt, sampling=sampling)
    waves = alone(engine, request)
    raster = alone(engine, dataclasses.replace(request, schedule="raster"))
    assert waves.tokens.shape == (FRAMES, SIDE, SIDE)
    assert (waves.tokens == reference(request)).all()
    assert (waves.tokens == raster.tokens).all()
    assert (waves.tokens[:given] == engine.tokens(clip[:given])).all()
    assert raster.steps == FRAMES * CELLS and waves.steps < 2 * FRAMES + 10
    assert len({frame.tobytes() for frame in waves.tokens}) == FRAMES, "it does not stand still"


def test_a_longer_clip_begins_as_a_shorter_one(engine, clip):
    ordinary = alone(engine, predict(clip, 2, TRAINED, seed=5)).tokens
    short = alone(engine, predict(clip, 2, TRAINED + 1, seed=5)).tokens
    long = alone(engine, predict(clip, 2, FRAMES, seed=5)).tokens
    assert (short[:TRAINED] == ordinary).all() and (long[: len(short)] == short).all()


def test_long_clips_and_neighbours_do_not_mix(engine, clip):
    requests = {
        0: predict(clip, 1, seed=8),
        1: GenerationRequest(Task.T2V, PROMPT, frame_count=TRAINED, seed=9),
    }
    expected = {slot: alone(engine, each).tokens for slot, each in requests.items()}
    runs = {0: admit(engine, requests[0], 0)}
    for _ in range(7):
        step(engine, runs)
    runs[1] = admit(engine, requests[1], 1)
    finish(engine, runs)
    for slot, run in runs.items():
        assert (run.tokens == expected[slot]).all()


def test_frames_come_while_later_ones_are_decoded(engine, clip):
    run = admit(engine, predict(clip, 1), 0)
    waits = []
    while not run.last or not run.last.done:
        seen = len(run.frames)
        step(engine, {0: run})
        waits += [run.steps] * (len(run.frames) - seen)
    stop(engine, 0, run)
    gaps = np.diff(waits)
    assert (gaps[TRAINED:] == gaps[-1]).all(), "one frame every few steps"
    assert waits[0] < 12


@pytest.mark.parametrize(
    ("task", "change", "field", "message"),
    [
        (Task.V2V, {"frame_count": 1001}, "frame_count", "1001 is too large; .* makes 1 to 1000"),
        (Task.T2V, {"frame_count": 4}, "frame_count", "4 is too large; this model makes 1 to 3"),
        (Task.V2V, {"given": 4}, "video", "video has 4 frames; this model takes 1 to 3"),
    ],
)
def test_lengths_that_are_refused(engine, task, change, field, message):
    given = np.zeros((change.get("given", 1), 16, 16, 3), np.uint8)
    extra = {"frames": given} if task is Task.V2V else {"prompt": PROMPT}
    request = GenerationRequest(task, frame_count=change.get("frame_count", 1000), **extra)
    with pytest.raises(FieldError, match=message) as caught:
        engine.check(request)
    assert caught.value.field == field


def test_a_thousand_frames_pass_the_check(engine, clip):
    engine.check(predict(clip, TRAINED, 1000))


def test_a_model_of_images_predicts_nothing(engine):
    info = dataclasses.replace(engine.info, max_frames=1, max_predicted_frames=1)
    from nuwa.runtime.check import check_request

    frames = np.zeros((1, 16, 16, 3), np.uint8)
    with pytest.raises(FieldError, match="frame_count 2 is too large; task V2V makes 1 to 1"):
        check_request(GenerationRequest(Task.V2V, frame_count=2, frames=frames), info)


def peak(frames: int) -> int:
    """Bytes that the plan and the sequence of a clip take at most, without a model."""
    decoder = preset("sprites").decoder
    cells = decoder.grid.height * decoder.grid.width
    tokens, known = np.zeros(2 * cells, np.int32), np.ones(2 * cells, bool)
    tracemalloc.start()
    plan = RollingPlan(decoder, frames, known_frames=2)
    sequence = Sequence(
        plan, (Lane(0, 0, 5),), Sampling(), functools.partial(uniforms, 0, 0), tokens, known, 9
    )
    count = 0
    while not sequence.done:
        count += len(sequence.advance(sequence.width))
        sequence.restage()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == frames and sequence.positions_done == plan.grid.size
    return most


def test_memory_does_not_grow_with_the_clip():
    peak(12)  # tables that all share are made once
    assert peak(1000) < 1.1 * peak(30)


@pytest.mark.parametrize("most", [None, 3])
def test_tokens_and_draws_of_a_ring_are_those_of_the_whole(most):
    """Every position is fed its predecessor's token and has its own draw, far into a clip."""
    decoder = dataclasses.replace(preset("sprites").decoder, grid=Grid(2, 3, 5))
    frames, cells, bos = 40, 15, 5000
    position = np.arange(frames * cells, dtype=np.int32)
    wanted = (position * 7919 % 1009).astype(np.int32)  # any function of the position
    draws = uniforms(3, 4, position)
    given = wanted[: 2 * cells]
    for kind, known in itertools.product(("wave", "raster"), (0, 1, 2)):
        plan = RollingPlan(decoder, frames, known, kind)
        mask = np.arange(2 * cells) < known * cells
        draw = functools.partial(uniforms, 3, 4)
        sequence = Sequence(plan, (), Sampling(), draw, given, mask, bos)
        held = np.zeros(sequence.stream.held, np.int32)
        calls = iter(plan.call(step) for step in range(plan.steps))
        finished, seen = [], 0
        while not sequence.done:
            if not seen:
                call = next(calls)
            part, rows = sequence.part(most), sequence.stream.rows
            now = slice(part.first, part.first + part.count)
            own = slice(seen, seen + part.count)
            fed = np.where(
                rows.fed[now] < 0, -1 - rows.fed[now], held[np.maximum(rows.fed[now], 0)]
            )
            assert (fed == np.append(wanted, bos)[call.fed[own]]).all()
            assert (rows.uniform[now] == draws[call.position[own]]).all()
            token = wanted[call.position[own]]
            is_known = call.position[own] < known * cells
            assert (rows.given[now] == np.where(is_known, token, -1)).all()
            held[rows.place[now]] = token
            for frame in sequence.advance(part.count):
                first, count = sequence.place(frame)
                finished.append((frame, held[first : first + count].copy()))
            sequence.restage()
            seen = (seen + part.count) % len(call.position)
        assert [index for index, _ in finished] == list(range(frames))
        assert (np.stack([frame for _, frame in finished]).reshape(-1) == wanted).all()
