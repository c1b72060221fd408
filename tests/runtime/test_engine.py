"""One promise: a request's tokens are its own, whatever runs beside it, and PyTorch's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nuwa.runtime.backends.base import BACKENDS, NATIVE_CPU, ONNXRUNTIME_CPU
from nuwa.runtime.core import GenerationRequest
from nuwa.runtime.engine import cache_slots, condition_slots, load_engine
from nuwa.runtime.errors import UnavailableError
from nuwa.spec.conditions import ConditionLayout
from nuwa.spec.grid import Grid
from nuwa.spec.manifest import Manifest
from nuwa.spec.plan import decode_plan
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

from .engine_run import PROMPT, Run, admit, alone, finish, step, stop, tiny_engine

SEEDS = (0, 1, 2, 3, 2**40 + 5)
SAMPLINGS = {
    "plain": Sampling(),
    "cool": Sampling(temperature=0.7),
    "top_k": Sampling(top_k=9),
    "top_p": Sampling(top_p=0.8),
    "both": Sampling(temperature=1.2, top_k=30, top_p=0.9),
    "greedy": Sampling(temperature=0.0),
    "guided": Sampling(guidance_scale=2.5),
    "guided_top_p": Sampling(guidance_scale=1.5, top_p=0.9),
    "unconditional": Sampling(guidance_scale=0.0),
}
TASKS = {"image": (Task.T2I, 1), "clip": (Task.T2V, 3), "short": (Task.T2V, 2)}


def request(kind: str = "clip", sampling: str = "plain", **fields) -> GenerationRequest:
    task, frames = TASKS[kind]
    fields = {"prompt": PROMPT} | fields
    return GenerationRequest(task, frame_count=frames, sampling=SAMPLINGS[sampling], **fields)


@pytest.fixture(scope="module")
def engine(tiny_bundle):
    return tiny_engine(tiny_bundle, slots=4)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    """tokens(request): i32 [F, h, w] from PyTorch's loop in raster order, one row a call."""
    torch = pytest.importorskip("torch")
    from nuwa.training.checkpoint import load_checkpoint
    from nuwa.training.decode import generate

    loaded = load_checkpoint(tiny_checkpoint)

    def ids(prompt: str):
        return torch.from_numpy(loaded.text_tokenizer.encode(prompt)[None]).long()

    def tokens(request: GenerationRequest) -> np.ndarray:
        most, sampling = loaded.config.decoder.grid, request.sampling
        grid = Grid(request.frame_count, most.height, most.width)
        made = generate(
            loaded.nuwa,
            ids(request.prompt),
            grid,
            seeds=[request.seed],
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            guidance=sampling.guidance_scale,
            unconditional_1M=ids("none"),
            kind="raster",
        )
        return made.numpy().reshape(grid.shape)

    return tokens


@pytest.mark.parametrize("kind", ["image", "clip"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_tokens_are_those_of_pytorch(engine, reference, kind, sampling):
    for seed in SEEDS:
        wanted = request(kind, sampling, seed=seed)
        assert (alone(engine, wanted).tokens == reference(wanted)).all()


def test_seeds_and_prompts_and_settings_matter(engine):
    """Otherwise equality elsewhere would show nothing."""
    base = alone(engine, request()).tokens
    for other in (
        request(seed=1),
        request(sample_index=1),
        request(prompt="a blue cat stands still"),
        *(request(sampling=name) for name in SAMPLINGS if name != "plain"),
    ):
        assert (alone(engine, other).tokens != base).any()


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("sampling", ["plain", "both", "guided"])
def test_waves_and_raster_order_give_the_same_tokens(engine, tiny_bundle, kind, sampling):
    decoder = Manifest.from_json((tiny_bundle / "manifest.json").read_text()).config.decoder
    grid = Grid(TASKS[kind][1], decoder.grid.height, decoder.grid.width)
    for seed in SEEDS:
        runs = {
            schedule: alone(engine, request(kind, sampling, seed=seed, schedule=schedule))
            for schedule in ("wave", "raster")
        }
        assert (runs["wave"].tokens == runs["raster"].tokens).all()
        for schedule, run in runs.items():
            assert run.steps == decode_plan(decoder, grid, schedule).steps
        assert runs["raster"].steps == grid.size > 1.5 * runs["wave"].steps


def neighbours(seed: int) -> dict[int, GenerationRequest]:
    """Three requests as different from each other as can be, for slots 1 to 3."""
    return {
        1: request("clip", "guided_top_p", seed=seed + 100, prompt="none" + " of all these" * 6),
        2: request("image", "greedy", seed=seed + 200, prompt="a blue cat stands still"),
        3: request("short", "top_k", seed=seed + 300, schedule="raster"),
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_tokens_are_the_same_alone_and_beside_others(engine, seed):
    """Every one of four requests that run together, joining at different steps."""
    requests = {0: request("clip", "both", seed=seed)} | neighbours(seed)
    expected = {slot: alone(engine, each).tokens for slot, each in requests.items()}
    runs = {}
    for slot, each in requests.items():
        runs[slot] = admit(engine, each, slot)
        step(engine, runs)
    finish(engine, runs)
    for slot, run in runs.items():
        assert (run.tokens == expected[slot]).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_neighbour_that_leaves_midway_changes_nothing(engine, seed):
    wanted = request("clip", "guided", seed=seed)
    expected = alone(engine, wanted).tokens
    runs = {0: admit(engine, wanted, 0)}
    runs |= {slot: admit(engine, each, slot) for slot, each in neighbours(seed).items()}
    for _ in range(3):
        step(engine, runs)
    for slot in (1, 3):
        stop(engine, slot, runs.pop(slot))
        step(engine, runs)
    # A newcomer takes the room of one that was stopped halfway.
    late = request("clip", "top_p", seed=seed + 400)
    runs[1] = admit(engine, late, 1)
    finish(engine, runs)
    assert (runs[0].tokens == expected).all()
    assert (runs[1].tokens == alone(engine, late).tokens).all()


def test_a_slot_remembers_nothing(tiny_bundle):
    """First use, after another request, after one that was stopped midway, in any slot."""
    engine = tiny_engine(tiny_bundle, slots=2)
    wanted = request("clip", "guided", seed=5)
    first = alone(engine, wanted).tokens
    alone(engine, request("clip", "guided", seed=6, prompt="a green digit 7 moves up then down"))
    assert (alone(engine, wanted).tokens == first).all()
    stopped = {0: admit(engine, request("image", "guided", seed=7), 0)}
    step(engine, stopped)
    stop(engine, 0, stopped[0])
    assert (alone(engine, wanted).tokens == first).all()
    assert (alone(engine, wanted, slot=1).tokens == first).all()


def test_release_is_idempotent_and_an_idle_engine_does_nothing(engine):
    engine.release(0)
    engine.release(0)
    assert engine.step() == []


def test_a_finished_slot_waits_for_its_release(engine):
    runs = {0: admit(engine, request("image"), 0), 1: admit(engine, request("clip"), 1)}
    while not runs[0].last or not runs[0].last.done:
        step(engine, runs)
    results = engine.step()
    assert [result.slot for result in results] == [1]
    for slot, run in runs.items():
        stop(engine, slot, run)


def test_frames_come_as_soon_as_their_tokens_are_complete(engine, tiny_bundle):
    decoder = Manifest.from_json((tiny_bundle / "manifest.json").read_text()).config.decoder
    plan = decode_plan(decoder, decoder.grid)
    run = admit(engine, request("clip"), 0)
    seen = []
    while not run.last or not run.last.done:
        step(engine, {0: run})
        seen.append(len(run.frames))
    stop(engine, 0, run)
    expected = [(plan.frame_done <= call).sum() for call in range(plan.steps)]
    assert seen == expected
    assert plan.frame_done[0] < plan.steps - 1, "the first frame is out before the last step"


def test_guidance_towards_the_word_none_is_no_guidance(engine):
    plain, guided = (
        alone(engine, request(sampling=name, prompt="none")) for name in ("plain", "guided")
    )
    assert (plain.tokens == guided.tokens).all()


def test_pixels_are_the_detokenizers(engine, tiny_checkpoint):
    torch = pytest.importorskip("torch")
    from nuwa.training.checkpoint import load_checkpoint
    from nuwa.training.vqgan import to_bytes

    tokens = alone(engine, request("clip")).tokens
    pixels = engine.pixels(tokens)
    assert pixels.shape == (3, 16, 16, 3) and pixels.dtype == np.uint8
    vqgan = load_checkpoint(tiny_checkpoint).vqgan
    with torch.no_grad():
        expected = to_bytes(vqgan.decode(torch.from_numpy(tokens).long())).numpy()
    assert np.abs(pixels.astype(int) - expected).max() <= 1  # rounding may tip over
    for index in range(3):
        assert (engine.pixels(tokens[index : index + 1])[0] == pixels[index]).all()


def test_a_request_that_cannot_be_prepared_leaves_its_room(engine, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no text today")

    monkeypatch.setattr(engine._backend, "encode_text", fail)
    room = engine.room
    with pytest.raises(RuntimeError, match="no text today"):
        engine.prepare(request())
    monkeypatch.undo()
    assert engine.step() == [] and engine.room == room
    alone(engine, request("image"))


def test_samples_share_what_is_prepared_once(engine, monkeypatch):
    wanted = request("clip", "guided", seed=5)
    expected = [
        alone(engine, dataclasses.replace(wanted, sample_index=index)).tokens for index in range(3)
    ]
    encoded = []
    encode = engine._backend.encode_text
    monkeypatch.setattr(
        engine._backend, "encode_text", lambda *a, **_: (encoded.append(a), encode(*a))
    )
    prepared = engine.prepare(wanted)
    runs = {slot: Run(wanted, prepared) for slot in range(3)}
    for slot in runs:
        engine.admit(prepared, slot, sample_index=slot)
    finish(engine, runs)
    for slot, run in runs.items():
        assert (run.tokens == expected[slot]).all()
    assert len(encoded) == 1


def spoil(engine, slot: int) -> None:
    """What remains of a request of which the encoders made what is no finite number."""
    layout = ConditionLayout.of(engine._config)
    for array in engine._backend.conditions.values():
        array[slot, : layout.none] = array[slot, layout.visual :] = np.nan


@pytest.mark.parametrize("backend", [NATIVE_CPU, ONNXRUNTIME_CPU])
@pytest.mark.parametrize("kind", ["promptless", "unconditional", "prompt", "sketch"])
def test_what_is_no_number_ends_with_its_request(tiny_bundle, kind, backend):
    """Whoever gets its condition slot and cache slots next has the tokens that it would have."""
    frames = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    sketch = np.zeros((1, 16, 16), np.uint8)
    wanted = {
        "promptless": GenerationRequest(Task.V2V, frame_count=3, frames=frames),
        "unconditional": request("clip", "unconditional"),
        "prompt": request("clip", "guided"),
        "sketch": GenerationRequest(Task.S2I, sketch=sketch),
    }[kind]
    try:
        engine = load_engine(tiny_bundle, threads=1, backend=backend)
    except UnavailableError as error:
        pytest.skip(str(error))
    expected = alone(engine, wanted).tokens
    for slot in range(condition_slots(1)):
        spoil(engine, slot)
    for cache in engine._backend.caches.values():
        cache[:] = np.nan
    assert (alone(engine, wanted).tokens == expected).all()


@pytest.mark.parametrize("kind", ["image", "clip"])
def test_without_guidance_there_is_one_lane(engine, kind):
    """Guidance 0 draws from the logits of "none" alone."""
    for seed in SEEDS:
        free = alone(engine, request(kind, "unconditional", seed=seed))
        assert (free.tokens == alone(engine, request(kind, seed=seed, prompt="none")).tokens).all()
        run = admit(engine, request(kind, "unconditional", seed=seed), 0)
        assert len(engine._sequences[0].stream.lanes) == 1
        stop(engine, 0, run)


def test_a_slot_at_fault_fails_alone(engine, monkeypatch):
    """One whose numbers are none, and one that the backend cannot run: others go on as if alone."""
    wanted = request("clip", "guided", seed=5)
    expected = alone(engine, wanted).tokens
    runs = {slot: admit(engine, wanted, slot) for slot in range(3)}
    for _ in range(3):
        step(engine, runs)
    stream, calls = engine._sequences[1].stream, []
    backend_step = engine._backend.step

    def refuse(parts):
        calls.append(len(parts))
        if any(part.stream is stream for part in parts):
            raise MemoryError("no memory for this one")
        return backend_step(parts)

    monkeypatch.setattr(engine._backend, "step", refuse)
    errors = {result.slot: result.error for result in engine.step()}
    monkeypatch.undo()
    assert calls == [3, 1, 1, 1] and isinstance(errors[1], MemoryError)
    assert errors[0] is None and errors[2] is None
    stop(engine, 1, runs.pop(1))
    spoil(engine, runs[2].prepared.slot)
    errors = {result.slot: result.error for result in engine.step()}
    assert errors[0] is None and isinstance(errors[2], FloatingPointError)
    stop(engine, 2, runs.pop(2))
    run = runs[0]
    while not engine._sequences[0].done:
        for result in engine.step():
            run.frames |= dict(result.frames)
    frames = np.stack([run.frames[index] for index in sorted(run.frames)])
    assert (frames == expected[-len(frames) :]).all() and len(frames) > 0
    stop(engine, 0, run)


def test_a_failing_slot_may_try_again(engine, monkeypatch):
    """A call that raised has changed nothing: the tokens are those of a run without it."""
    wanted = request("clip", "guided", seed=6)
    expected = alone(engine, wanted).tokens
    run = admit(engine, wanted, 0)
    backend_step = engine._backend.step

    def late(parts):
        backend_step(parts)
        raise RuntimeError("after all was computed")

    while not engine._sequences[0].done:
        monkeypatch.setattr(engine._backend, "step", late)
        (failed,) = engine.step()
        assert isinstance(failed.error, RuntimeError) and failed.frames == ()
        monkeypatch.undo()
        step(engine, {0: run})
    stop(engine, 0, run)
    assert (run.tokens == expected).all()


def test_info_describes_the_bundle(engine, tiny_bundle):
    manifest = Manifest.from_json((tiny_bundle / "manifest.json").read_text())
    info = engine.info
    assert (info.name, info.licence, info.precision) == ("tiny", "CC0-1.0", "fp32")
    assert info.tasks == manifest.tasks
    assert (info.height, info.width, info.max_frames, info.codebook_size) == (16, 16, 3, 64)
    assert (info.max_predicted_frames, info.sketch_classes) == (1000, 5)
    assert "clip" in info.rankers
    assert info.parameter_count == manifest.parameter_count
    assert info.backend in BACKENDS[1:]
    assert "ONNX Runtime" in info.runs_on
    assert len(info.bundle_hash) == 64


def test_slots(tiny_bundle):
    with pytest.raises(ValueError, match="slots 0 is not at least 1"):
        tiny_engine(tiny_bundle, slots=0)
    engine = tiny_engine(tiny_bundle, slots=3)
    assert engine.slots == 3
    assert len(engine._backend.caches["key_cache_0"]) == cache_slots(3) == 6
    assert len(engine._backend.conditions["cross_key_0"]) == condition_slots(3) == 5 == engine.room


def test_a_bundle_with_other_cache_sizes_is_refused(tiny_bundle, tmp_path):
    import shutil

    from nuwa.spec.manifest import BundleError

    folder = tmp_path / "small"
    shutil.copytree(tiny_bundle, folder)
    manifest = Manifest.from_json((folder / "manifest.json").read_text())
    smaller = dataclasses.replace(manifest, cache_entries=manifest.cache_entries - 1)
    (folder / "manifest.json").write_text(smaller.to_json())
    with pytest.raises(BundleError, match="export the checkpoint again"):
        tiny_engine(folder, slots=1)
