"""The ONNX Runtime CPU backend: caches in place, and rows that do not depend on their company."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nuwa.runtime.backends.base import StepBatch
from nuwa.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from nuwa.runtime.batch import TEXT_COLUMNS, assemble
from nuwa.runtime.bundle import open_bundle
from nuwa.runtime.core import Sampling
from nuwa.runtime.sequence import Lane, Sequence
from nuwa.spec.grid import MASKED
from nuwa.spec.manifest import STEP_ROW_INPUTS
from nuwa.spec.philox import uniforms
from nuwa.spec.plan import decode_plan

SLOTS, CONDITIONS = 6, 4


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


@pytest.fixture
def backend(bundle):
    made = OnnxRuntimeCpu(
        bundle,
        cache_slots=SLOTS,
        condition_slots=CONDITIONS,
        threads=1,
        spinning=False,
        logits=True,
    )
    prompts = ("none", "a red digit 3 moves left to right on black", "word " * 30, "no " * 99)
    ids = np.stack([bundle.text_tokenizer.encode(prompt) for prompt in prompts])
    made.encode_text(ids, range(CONDITIONS))
    made.text_lengths = [bundle.text_tokenizer.used(row) for row in ids]
    return made


def batch_of(bundle, sequences) -> StepBatch:
    config = bundle.manifest.config
    return assemble(sequences, config.image.codebook_size, config.text.length)


def sequence(bundle, *lanes: Lane, seed: int = 0, calls: int = 0, **sampling) -> Sequence:
    """A clip of random tokens that has `calls` of its calls behind it."""
    config = bundle.manifest.config
    plan = decode_plan(config.decoder, config.decoder.grid)
    tokens = np.random.default_rng(seed).integers(0, 64, plan.grid.size + 1, np.int32)
    tokens[-1] = config.bos
    draws = uniforms(seed, 0, plan.position)
    known = np.ones(plan.grid.size, bool)
    made = Sequence(plan, lanes, Sampling(**sampling), draws, tokens, known)
    for _ in range(calls):
        made.accept(np.zeros(made.width, np.int32))
    return made


def test_a_batch_has_the_inputs_of_the_graph():
    fields = [field.name for field in dataclasses.fields(StepBatch)]
    assert fields == [*STEP_ROW_INPUTS, "ranks"]


def test_caches_are_written_in_place(bundle, backend):
    before = {name: array.copy() for name, array in backend.caches.items()}
    where = {name: array.ctypes.data for name, array in backend.caches.items()}
    batch = batch_of(bundle, [sequence(bundle, Lane(2, 1, 5), calls=4)])
    backend.step(batch)
    outputs = dict(
        zip(
            [each.name for each in backend._decoder.get_outputs()][2:],
            backend._binding.get_outputs()[:-2],  # the tokens and logits are bound anew each step
            strict=True,
        )
    )
    rows = batch.write_index
    for name, array in backend.caches.items():
        bound = outputs[f"{name}_out"]
        assert bound.data_ptr() == where[name] == array.ctypes.data
        assert (array[2, rows] != 0).any(axis=-1).all(), "this call's entries are in the array"
        untouched = np.ones(array.shape[:2], bool)
        untouched[2, rows] = False
        assert (array[untouched] == before[name][untouched]).all(), "and nothing else is changed"


def test_a_later_call_reads_what_an_earlier_one_wrote(bundle, backend):
    batches = [batch_of(bundle, [sequence(bundle, Lane(0, 1, 5), calls=calls)]) for calls in (0, 1)]
    backend.step(batches[0])
    backend.step(batches[1])
    seen = backend.logits
    for array in backend.caches.values():
        array[:] = 0
    backend.step(batches[1])
    assert (backend.logits != seen).any()


def test_conditions_are_kept_apart(bundle, backend):
    def logits(condition: int) -> np.ndarray:
        length = backend.text_lengths[condition]
        backend.step(batch_of(bundle, [sequence(bundle, Lane(0, condition, length))]))
        return backend.logits

    first = [logits(condition) for condition in range(CONDITIONS)]
    assert len({each.tobytes() for each in first}) == CONDITIONS
    backend.encode_text(bundle.text_tokenizer.encode("a blue cat stands still")[None], [1])
    second = [logits(condition) for condition in range(CONDITIONS)]
    same = [(a == b).all() for a, b in zip(first, second, strict=True)]
    assert same == [True, False, True, True]


def test_logits_have_the_same_bits_in_any_company(bundle, backend):
    """What co-batching rests on: not close, equal. With other calls, prompts, caches beside."""
    rng = np.random.default_rng(1)
    for array in backend.caches.values():
        array[:] = rng.standard_normal(array.shape)

    def lane(slot: int) -> Lane:
        condition = slot % CONDITIONS
        return Lane(slot, condition, backend.text_lengths[condition])

    def frozen(sequences) -> StepBatch:
        """Without writes, so that every call meets the same caches."""
        batch = batch_of(bundle, sequences)
        return dataclasses.replace(batch, write_index=np.full_like(batch.write_index, MASKED))

    crowd = [sequence(bundle, lane(s), seed=s, calls=2 * s, top_p=0.9) for s in range(SLOTS)]
    drawn = backend.step(frozen(crowd))
    together, start = backend.logits, 0
    assert len(together) > 16
    for each in crowd:
        rows = slice(start, start + each.width)
        start += each.width
        tokens = backend.step(frozen([each]))
        assert (backend.logits == together[rows]).all()
        assert (tokens == drawn[rows]).all()
        whole = batch_of(bundle, [each])
        for row in range(each.width):  # and as single rows
            part = {
                name: getattr(whole, name)[row : row + 1].copy() for name in STEP_ROW_INPUTS
            } | {"write_index": np.int32([MASKED]), "unconditional_row": np.int32([0])}
            backend.step(StepBatch(**part, ranks=whole.ranks))
            assert (backend.logits[0] == together[rows][row]).all()


def test_text_columns_are_rounded_up(bundle):
    for length, columns in ((1, 16), (16, 16), (17, 32), (65, 77), (77, 77)):
        batch = batch_of(bundle, [sequence(bundle, Lane(0, 0, length), calls=3)])
        assert batch.cross_neighbours.shape == (len(batch.tokens), columns)
        expected = [*range(length), *[MASKED] * (columns - length)]
        assert (batch.cross_neighbours == expected).all()
    assert TEXT_COLUMNS == 16


def test_guided_rows_are_moved_away_from_their_partners(bundle, backend):
    conditional, unconditional = Lane(0, 1, backend.text_lengths[1]), Lane(1, 0, 3)

    def logits(*lanes: Lane, scale: float) -> np.ndarray:
        backend.step(batch_of(bundle, [sequence(bundle, *lanes, guidance_scale=scale)]))
        return backend.logits

    c = logits(conditional, scale=1.0)
    u = logits(unconditional, scale=1.0)
    both = logits(dataclasses.replace(conditional, guided=True), unconditional, scale=2.5)
    width = len(c)
    np.testing.assert_array_equal(both[:width], u + np.float32(2.5) * (c - u))
    np.testing.assert_array_equal(both[width:], u)


def test_tokens_of_each_row_follow_its_own_settings(bundle, backend):
    """Greedy, one-candidate and free rows in one call."""
    lanes = [Lane(slot, 1, backend.text_lengths[1]) for slot in range(3)]
    settings = ({"temperature": 0.0}, {"top_k": 1, "temperature": 5.0}, {"temperature": 100.0})
    crowd = [
        sequence(bundle, lane, calls=4, **each) for lane, each in zip(lanes, settings, strict=True)
    ]
    for array in backend.caches.values():
        array[:] = 0
    tokens = backend.step(batch_of(bundle, crowd)).reshape(3, -1)
    likeliest = backend.logits.argmax(axis=1).reshape(3, -1)
    assert (tokens[:2] == likeliest[:2]).all()
    assert (tokens[2] != likeliest[2]).any()


def test_serving_binds_no_logits(bundle):
    backend = OnnxRuntimeCpu(bundle, cache_slots=1, condition_slots=1, threads=1, spinning=False)
    tokens = backend.step(batch_of(bundle, [sequence(bundle, Lane(0, 0, 3))]))
    assert tokens.dtype == np.int32 and tokens.shape == (1,)
    assert backend.logits is None
    assert len(backend._binding.get_outputs()) == 1 + len(backend.caches)


def test_codes_and_pixels_go_both_ways(bundle, backend):
    codes = np.random.default_rng(2).integers(0, 64, (5, 4, 4), np.int32)
    pixels = backend.detokenize(codes)
    assert pixels.shape == (5, 16, 16, 3) and pixels.dtype == np.uint8
    back = backend.tokenize(pixels)
    assert back.shape == codes.shape and back.dtype == np.int32
    assert ((back >= 0) & (back < 64)).all()


def test_threads_are_at_least_one(bundle):
    with pytest.raises(ValueError, match="threads 0 is not at least 1"):
        OnnxRuntimeCpu(bundle, cache_slots=1, condition_slots=1, threads=0)
