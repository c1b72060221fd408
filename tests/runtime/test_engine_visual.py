"""Sketches, and pictures with a hidden part: what the visual encoder sees, and PyTorch's tokens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nuwa.runtime.core import GenerationRequest, UnsupportedTaskError
from nuwa.runtime.engine import condition_slots
from nuwa.spec.grid import Grid
from nuwa.spec.known import blank_hidden, hidden_edges, known_cells
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

from .engine_run import PROMPT, admit, alone, bundle_for, finish, step, tiny_engine

SIZE, CELLS, CLASSES = 16, 4, 5
SEEDS = (0, 2**40 + 5)
CLIP = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
SKETCH = np.random.default_rng(1).integers(0, CLASSES, (3, CELLS, CELLS), np.uint8)
SKETCH = SKETCH.repeat(4, axis=1).repeat(4, axis=2)
MASK = np.zeros((SIZE, SIZE), bool)
MASK[5:12, :9] = True
SAMPLINGS = {
    "plain": Sampling(),
    "guided": Sampling(guidance_scale=2.5),
    "guided_top_p": Sampling(temperature=1.2, guidance_scale=1.5, top_p=0.9),
}


def request(task: Task, sampling: str = "plain", **fields) -> GenerationRequest:
    frames = 3 if task.is_video else 1
    given: dict = {"prompt": "" if task is Task.I2I else PROMPT}
    if task.needs_sketch:
        given["sketch"] = SKETCH[:frames]
    if task.needs_mask:
        given |= {"frames": CLIP[:frames], "mask": MASK}
    fields = given | fields
    return GenerationRequest(task, frame_count=frames, sampling=SAMPLINGS[sampling], **fields)


@pytest.fixture(scope="module")
def engine(tiny_bundle):
    return tiny_engine(tiny_bundle, slots=4)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    """tokens(request): i32 [F, h, w] from PyTorch alone: tokenizers, encoders, one row a call."""
    torch = pytest.importorskip("torch")
    from nuwa.training.checkpoint import load_checkpoint
    from nuwa.training.decode import generate
    from nuwa.training.vqgan import one_hot, to_signed

    loaded = load_checkpoint(tiny_checkpoint)
    config = loaded.config

    def ids(prompt: str):
        return torch.from_numpy(loaded.text_tokenizer.encode(prompt)[None]).long()

    @torch.no_grad()
    def codes(vqgan, inputs):
        return vqgan.encode(inputs).codes.reshape(1, -1)

    def given(request: GenerationRequest, grid: Grid) -> dict:
        if request.sketch is not None:
            maps = one_hot(torch.from_numpy(request.sketch), CLASSES)
            return {"visual_BN": codes(loaded.sketch_vqgan, maps) + config.image.codebook_size}
        cells = known_cells(request.mask, grid.height, grid.width)
        known = np.broadcast_to(cells, grid.shape)
        frames = torch.from_numpy(blank_hidden(request.frames, known))
        tokens = codes(loaded.vqgan, to_signed(frames))
        known_BN = torch.from_numpy(known.reshape(1, -1).copy())
        edges = hidden_edges(request.mask, grid.height, grid.width, config.visual.edge_levels)
        hidden = config.hidden + torch.from_numpy(np.tile(edges.reshape(1, -1), grid.frames))
        visual = torch.where(known_BN, tokens, hidden.long())
        return {"known_BN": known_BN, "known_tokens_BN": tokens, "visual_BN": visual}

    def tokens(request: GenerationRequest) -> np.ndarray:
        grid, sampling = Grid(request.frame_count, CELLS, CELLS), request.sampling
        made = generate(
            loaded.nuwa,
            ids(request.prompt or "none"),
            grid,
            seeds=[request.seed],
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            guidance=sampling.guidance_scale if request.prompt else 1.0,
            unconditional_1M=ids("none"),
            kind="raster",
            **given(request, grid),
        )
        return made.numpy().reshape(grid.shape)

    return tokens


@pytest.mark.parametrize("task", [Task.S2I, Task.S2V, Task.I2I, Task.TI2I, Task.TV2V])
@pytest.mark.parametrize("sampling", ["plain", "guided_top_p"])
def test_tokens_are_those_of_pytorch(engine, reference, task, sampling):
    for seed in SEEDS:
        wanted = request(task, sampling, seed=seed)
        made = alone(engine, wanted).tokens
        assert (made == reference(wanted)).all()
        raster = alone(engine, dataclasses.replace(wanted, schedule="raster")).tokens
        assert (made == raster).all()


@pytest.mark.parametrize("task", [Task.S2I, Task.S2V])
def test_a_sketch_needs_no_prompt(engine, reference, task):
    """Without one, "none" is the text, and guidance has nothing to lead away from."""
    plain, named, guided = (
        alone(engine, request(task, name, seed=3, prompt=prompt)).tokens
        for name, prompt in (("plain", ""), ("plain", "none"), ("guided", ""))
    )
    assert (plain == reference(request(task, seed=3, prompt=""))).all()
    assert (plain == named).all() and (plain == guided).all()


def test_sketches_and_known_tokens_and_prompts_matter(engine):
    """Otherwise equality elsewhere would show nothing."""
    text = alone(engine, GenerationRequest(Task.T2V, PROMPT, frame_count=3)).tokens
    base = alone(engine, request(Task.S2V)).tokens
    other = SKETCH.copy()
    other[2, 4:8, 4:8] = (other[2, 4:8, 4:8] + 1) % CLASSES
    for changed in (request(Task.S2V, prompt=""), request(Task.S2V, sketch=other)):
        made = alone(engine, changed).tokens
        assert (made != base).any() and (made != text).any()
    assert (base != text).any()


def test_what_is_hidden_cannot_show(engine):
    """Whatever lies in patches that the mask touches, all tokens stay the same."""
    touched = np.zeros((SIZE, SIZE), bool)
    touched[4:12, :12] = True
    for task in (Task.I2I, Task.TI2I, Task.TV2V):
        wanted = request(task, seed=4)
        frames = wanted.frames.copy()
        frames[:, touched] = 255 - frames[:, touched]
        other = dataclasses.replace(wanted, frames=frames)
        assert (alone(engine, wanted).tokens == alone(engine, other).tokens).all()


def test_known_tokens_are_seen_and_not_only_fed(tiny_bundle, monkeypatch):
    """The visual encoder's view of what is known leads what is made."""
    wanted = request(Task.TI2I, seed=5)
    engine = tiny_engine(tiny_bundle, slots=1)
    seen = alone(engine, wanted).tokens
    monkeypatch.setattr(engine, "_visual_tokens", lambda *_: None)
    fed = alone(engine, wanted).tokens
    known = known_cells(MASK, CELLS, CELLS)
    assert (seen[:, known] == fed[:, known]).all() and (seen != fed).any()


def test_a_bundle_without_visual_encoder_edits_but_takes_no_sketches(plain_bundle, tmp_path):
    engine = tiny_engine(bundle_for(plain_bundle, tuple(Task), tmp_path / "all"), slots=1)
    assert engine.info.tasks == tuple(task for task in Task if not task.needs_sketch)
    assert engine.info.sketch_classes == 0
    for task in (Task.S2I, Task.S2V):
        with pytest.raises(
            UnsupportedTaskError, match=f"cannot do {task.name}; it can do T2I, I2I"
        ):
            engine.check(request(task))
    known = known_cells(MASK, CELLS, CELLS)
    for task in (Task.I2I, Task.TI2I, Task.TV2V):
        wanted = request(task, "guided", seed=5)
        run = alone(engine, wanted)
        blank = blank_hidden(wanted.frames, np.broadcast_to(known, run.tokens.shape))
        assert (run.tokens[:, known] == engine.tokens(blank)[:, known]).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_tokens_are_the_same_alone_and_beside_others(engine, seed):
    """Sketch, edit, long and short text together, joining at different steps."""
    requests = {
        0: request(Task.S2V, "guided_top_p", seed=seed),
        1: GenerationRequest(Task.T2V, "none of all these " * 5, frame_count=3, seed=seed + 1),
        2: request(Task.TV2V, "guided", seed=seed + 2),
        3: GenerationRequest(Task.T2V, "a cat", frame_count=2, seed=seed + 3),
    }
    expected = {slot: alone(engine, each).tokens for slot, each in requests.items()}
    for order in (requests, dict(reversed(requests.items()))):
        runs = {}
        for slot, each in order.items():
            runs[slot] = admit(engine, each, slot)
            step(engine, runs)
        finish(engine, runs)
        for slot, run in runs.items():
            assert (run.tokens == expected[slot]).all()


def test_a_slot_forgets_what_it_saw(tiny_bundle):
    """First use, and after a longer clip's sketch or edit in the same slot."""
    engine = tiny_engine(tiny_bundle, slots=1)
    sketch = request(Task.S2I, "guided", seed=6, prompt="a blue cat stands still")
    text = GenerationRequest(Task.T2V, "a cat", frame_count=3, seed=7)
    expected = [alone(engine, each).tokens for each in (sketch, text)]
    for other in (request(Task.S2V, "guided", seed=8), request(Task.TV2V, seed=9)):
        alone(engine, other)
        again = [alone(engine, each).tokens for each in (sketch, text)]
        assert all((a == b).all() for a, b in zip(expected, again, strict=True))


def test_graphs_are_loaded_when_they_are_needed(tiny_bundle):
    engine = tiny_engine(tiny_bundle, slots=1)
    backend = engine._backend
    alone(engine, GenerationRequest(Task.T2I, PROMPT))
    assert not backend._visuals and "_sketches" not in vars(backend)
    alone(engine, request(Task.I2I))
    assert backend._visuals and "_sketches" not in vars(backend)
    alone(engine, request(Task.S2I))
    assert "_sketches" in vars(backend)


def test_a_request_that_cannot_be_prepared_leaves_its_room(engine, monkeypatch):
    def fail(*_args, **_keywords):
        raise RuntimeError("no sketches today")

    monkeypatch.setattr(engine._backend, "encode_visual", fail)
    with pytest.raises(RuntimeError, match="no sketches today"):
        engine.prepare(request(Task.S2I))
    monkeypatch.undo()
    assert engine.step() == [] and engine.room == condition_slots(engine.slots)
    alone(engine, request(Task.S2I))


def test_calls_beside_other_requests_leave_cores_for_these(engine, monkeypatch):
    """What waits for a slot or is decoded counts, whatever the call itself is for does not."""
    heard: list[tuple[str, bool]] = []

    def listen(name):
        call = getattr(engine._backend, name)

        def heard_call(*args, busy):
            heard.append((name, busy))
            return call(*args, busy=busy)

        monkeypatch.setattr(engine._backend, name, heard_call)

    for name in ("tokenize", "tokenize_sketch", "encode_visual", "detokenize"):
        listen(name)
    codes = np.zeros((1, CELLS, CELLS), np.int32)
    engine.pixels(codes)
    first = engine.prepare(request(Task.S2I))
    engine.pixels(codes)
    second = engine.prepare(request(Task.I2I))
    first.close()
    second.close()
    engine.pixels(codes)
    assert heard == [
        ("detokenize", False),
        *(("tokenize_sketch", False), ("encode_visual", False), ("detokenize", True)),
        *(("tokenize", True), ("encode_visual", True), ("detokenize", False)),
    ]
