"""The native decoder: against ONNX Runtime, and what is its own."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import types
from unittest import mock

import numpy as np
import pytest

from nuwa.runtime.backends import native_cpu, native_library
from nuwa.runtime.backends.base import Lane
from nuwa.runtime.backends.native_cpu import NativeCpu
from nuwa.runtime.errors import UnavailableError
from nuwa.runtime.onnx_weights import BF16
from nuwa.spec.conditions import visual_window
from nuwa.spec.onnx_file import widened

from .backend_kinds import (
    CONDITIONS,
    NATIVE,
    SLOTS,
    batch_of,
    drawn,
    loaded,
    made_as,
    opened,
    other_bundle,
    sequence,
)


@pytest.mark.parametrize("sees", ["visual", "plain"])
@pytest.mark.parametrize("kind", NATIVE)
def test_native_logits_are_those_of_onnxruntime(bundle, plain, kind, sees):
    """Step by step through a guided clip beside a plain one, both backends fed the same tokens."""
    bundle = plain if sees == "plain" else bundle
    config = bundle.manifest.config
    expected, native = loaded(bundle, "onnxruntime"), loaded(bundle, kind)
    window = None if sees == "plain" else visual_window(config, config.decoder.grid)
    length = expected.text_lengths[1]
    guided = Lane(0, 1, length), Lane(1, 1, 3, 77)
    clips = [
        sequence(bundle, *guided, visual=window, guidance_scale=3.0, top_k=5),
        sequence(bundle, Lane(2, 2, expected.text_lengths[2]), seed=1, top_p=0.7),
    ]
    same = []
    for _ in range(clips[0].plan.steps):
        tokens = []
        for backend in (expected, native):
            assert all(backend.step(opened(backend, *clips)))
            tokens.append(np.concatenate(drawn(backend, *clips)))
        same.append(tokens[0] == tokens[1])
        np.testing.assert_allclose(native.logits, expected.logits, rtol=1e-4, atol=1e-4)
        for each in clips:
            each.advance(each.width)
    for name, array in expected.caches.items():
        np.testing.assert_allclose(native.caches[name], array, rtol=1e-4, atol=1e-4)
    assert np.concatenate(same).mean() > 0.99  # all, unless a draw falls between two roundings


@pytest.mark.parametrize("kind", NATIVE)
def test_native_decoder_runs_other_models_too(other, kind):
    bundle, config = other, other.manifest.config
    expected, native = loaded(bundle, "onnxruntime"), loaded(bundle, kind, threads=2)
    # Of int8, a rounding that falls the other way moves what follows by about a hundredth.
    near = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 1e-1, "int8": 5e-2}[bundle.manifest.precision]
    window = None if config.visual is None else visual_window(config, config.decoder.grid)
    lanes = [Lane(s, s, expected.text_lengths[s]) for s in range(2)]
    clips = [sequence(bundle, lane, seed=lane.cache_slot, visual=window) for lane in lanes]
    for _ in range(clips[0].plan.steps):
        expected.step(opened(expected, *clips))
        native.step(opened(native, *clips))
        np.testing.assert_allclose(native.logits, expected.logits, rtol=near, atol=near)
        for each in clips:
            each.advance(each.width)


@pytest.mark.parametrize("kind", NATIVE)
def test_native_draws_are_right_for_their_logits(bundle, kind):
    """By the judge of the export, in fp64, under settings of all sorts."""
    from nuwa.export.draws import draw_errors

    backend, rng = loaded(bundle, kind), np.random.default_rng(5)
    for _ in range(40):
        settings = [
            {
                "temperature": rng.choice([0.0, 0.001, 0.5, 1.0, 100.0]),
                "top_k": int(rng.choice([0, 0, 1, 3, 64, 1000])),
                "top_p": rng.choice([1.0, 1.0, 0.9, 0.3, 1e-6]),
            }
            for _ in range(SLOTS)
        ]
        crowd = [
            sequence(bundle, Lane(s, s % CONDITIONS, 5), seed=s, calls=5, **each)
            for s, each in enumerate(settings)
        ]
        for each in crowd:
            uniform = rng.random(len(each.stream.rows), np.float32)
            each.stream.rows = dataclasses.replace(each.stream.rows, uniform=uniform)
        backend.step(opened(backend, *crowd))
        batch = batch_of(bundle, *crowd)
        rows = (batch.temperature, batch.top_k, batch.top_p, batch.uniform)
        tokens = np.concatenate(drawn(backend, *crowd))
        assert draw_errors(backend.logits, *rows, tokens).max() < 1e-6


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 5), (64, 32), (256, 70)])
def test_whole_numbers_add_up_to_the_same_on_every_level(bundle, kind, inputs, outputs):
    """The sums are exact, so what is left is two roundings of a product; rows of any size."""
    made_as(kind, bundle, cache_slots=1, condition_slots=1, threads=1)  # or the test is skipped
    draw = np.random.default_rng(inputs)
    rows = draw.standard_normal((29, inputs)).astype(np.float32) * 10.0 ** draw.integers(
        -20, 20, (29, 1)
    )
    rows = np.concatenate([rows, np.zeros((1, inputs))]).astype(np.float32)
    weight = draw.integers(-127, 128, (inputs, outputs)).astype(np.int8)
    weight[:, 0], rows[0] = 127, -rows[0].max()  # as large as a sum can be
    scale = draw.random(outputs, np.float32)
    unit = np.maximum(np.abs(rows).max(1, keepdims=True) * np.float32(1 / 127), np.float32(1e-30))
    sums = np.rint(rows / unit).astype(np.int64) @ weight.astype(np.int64)
    made = native_library.multiply(int(kind.split()[-1]), rows, weight, scale)
    wanted = sums.astype(np.float64) * unit * scale
    np.testing.assert_allclose(made, wanted, rtol=3e-7, atol=0.0)


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("count", [1, 5, 13, 200])
def test_halves_give_the_bits_of_floats_of_the_same_values(bundle, kind, count):
    """Read as they are for a few rows, unpacked for many; also where they are tiny, or infinite."""
    made_as(kind, bundle, cache_slots=1, condition_slots=1, threads=1)
    draw = np.random.default_rng(count)
    rows = draw.standard_normal((count, 64)).astype(np.float32)
    weight = draw.standard_normal((70, 64)).astype(np.float16)
    weight[0] = draw.integers(0, 1 << 10, 64).astype(np.uint16).view(np.float16)  # subnormal
    weight[1, :3] = (np.inf, -0.0, 65504.0)
    weight[2, 5] = np.nan
    level = int(kind.split()[-1])
    made = native_library.multiply(level, rows, weight)
    wanted = native_library.multiply(level, rows, weight.astype(np.float32))
    np.testing.assert_array_equal(made, wanted)
    assert np.isinf(made[:, 1]).all() and np.isnan(made[:, 2]).all() and made[:, 0].any()


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize(("count", "inputs"), [(1, 64), (5, 48), (16, 16), (33, 272), (70, 64)])
def test_products_in_bf16_have_the_same_bits_on_every_level(bundle, kind, count, inputs):
    """On tiles, in vectors and in numpy: of 32 inputs first the even ones, then the odd ones."""
    made_as(kind, bundle, cache_slots=1, condition_slots=1, threads=1)  # or the test is skipped
    draw = np.random.default_rng(count)
    rows = draw.standard_normal((count, inputs)).astype(np.float32)
    rows[0, :3] = (1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8 + 2**-20))  # ties go to even
    weight = rounded(draw.standard_normal((70, inputs)).astype(np.float32))
    weight[0, :2] = rounded(np.float32([np.inf, 0]))
    if count > 1:
        rows[-1, 5] = np.nan
    made = native_library.multiply(int(kind.split()[-1]), rows, weight)
    given, matrix = (
        np.pad(widened(bits), ((0, 0), (0, -inputs % 32))) for bits in (rounded(rows), weight)
    )
    wanted = np.zeros((count, 70), np.float32)
    with np.errstate(invalid="ignore"):
        for first in range(0, given.shape[1], 32):
            halves = [np.zeros_like(wanted), np.zeros_like(wanted)]
            for place in range(first, first + 32):
                halves[place % 2] += np.outer(given[:, place], matrix[:, place])
            wanted += halves[0] + halves[1]
    np.testing.assert_array_equal(made, wanted)
    assert np.isinf(made[0, 0]) and np.isfinite(made[0, 1:]).all()
    assert np.isnan(made[-1]).all() == (count > 1)


def rounded(values: np.ndarray) -> np.ndarray:
    """f32 to the bits of bf16, to the nearest, of two to the even one."""
    bits = values.view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(BF16)


@pytest.mark.parametrize("kind", NATIVE)
def test_matrices_are_kept_as_the_bundle_stores_them(bundle, kind, tmp_path):
    half = other_bundle("fp16", tmp_path)
    decoder_weights, kept = native_cpu._decoder_weights, {}
    kept |= decoder_weights(half)
    halves = {name for name, array in kept.items() if array.dtype == np.float16}
    assert halves == {name for name in kept if name.endswith(native_library.MATRICES)}
    clips = [sequence(half, Lane(s, s, 5), seed=s, calls=5, temperature=1.0) for s in range(3)]
    backend = loaded(half, kind)
    backend.step(opened(backend, *clips))
    logits = backend.logits.copy()
    with mock.patch.object(
        native_cpu,
        "_decoder_weights",
        lambda _: {name: array.astype(np.float32) for name, array in kept.items()},
    ):
        backend = loaded(half, kind)
    backend.step(opened(backend, *clips))
    np.testing.assert_array_equal(backend.logits, logits)


@pytest.mark.parametrize("kind", NATIVE)
def test_products_of_real_numbers(bundle, kind):
    made_as(kind, bundle, cache_slots=1, condition_slots=1, threads=1)
    draw = np.random.default_rng(1)
    rows = draw.standard_normal((29, 64)).astype(np.float32)
    weight = draw.standard_normal((70, 64)).astype(np.float32)
    made = native_library.multiply(int(kind.split()[-1]), rows, weight)
    np.testing.assert_allclose(made, rows.astype(np.float64) @ weight.T, rtol=1e-5, atol=1e-5)


def test_structures_are_as_large_as_the_header_says():
    """As a C compiler lays out decoder_abi.h on a 64-bit machine."""
    sizes = {
        native_library.AbiShape: 56,  # rows: fills what was a gap
        native_library.AbiLayer: 240,
        native_library.AbiWeights: 72,
        native_library.AbiStream: 124 + 4,
        native_library.AbiPart: 24,
        native_library.AbiStep: 112,
    }
    assert {each: ctypes.sizeof(each) for each in sizes} == sizes


def test_a_bundle_that_does_not_name_its_weights_is_refused(plain, monkeypatch):
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler, so no native decoder")
    read = native_cpu.read_weights

    def without(name):
        return lambda path: {k: v for k, v in read(path).items() if not k.endswith(name)}

    def reshaped(path):
        return {k: v.T if k.endswith("ff_in.weight") else v for k, v in read(path).items()}

    for found, says in ((without("0.bias"), "no weights"), (reshaped, r"shape \(32, 128\) as")):
        monkeypatch.setattr(native_cpu, "read_weights", found)
        with pytest.raises(UnavailableError, match=f"{says}.*export the checkpoint again"):
            NativeCpu(plain, cache_slots=1, condition_slots=1, threads=1)


def test_a_forked_process_is_told_to_load_its_own(bundle, monkeypatch):
    backend = loaded(bundle, NATIVE[-1])
    parts = opened(backend, sequence(bundle, Lane(0, 0, 3)))
    other = types.SimpleNamespace(getpid=lambda: backend._process + 1)
    monkeypatch.setattr(native_cpu, "os", other)
    with pytest.raises(RuntimeError, match="a forked process has none of the decoder's threads"):
        backend.step(parts)


@pytest.mark.parametrize("kind", NATIVE)
def test_native_bits_do_not_depend_on_threads(bundle, kind):
    alone, many = loaded(bundle, kind), loaded(bundle, kind, threads=3)
    crowd = [
        sequence(bundle, Lane(s, s % CONDITIONS, 5), seed=s, calls=2 * s) for s in range(SLOTS)
    ]
    for count in (1, 2, SLOTS):
        for backend in (alone, many):
            backend.step(opened(backend, *crowd[:count]))
        assert drawn(alone, *crowd[:count]) == drawn(many, *crowd[:count])
        assert (alone.logits == many.logits).all()
    for name, array in alone.caches.items():
        assert (array == many.caches[name]).all()


@pytest.mark.parametrize("kind", NATIVE)
def test_a_step_takes_the_cores_that_others_leave(bundle, kind):
    alone, many = loaded(bundle, kind), loaded(bundle, kind, threads=3)
    crowd = [sequence(bundle, Lane(s, s % CONDITIONS, 5), seed=s) for s in range(SLOTS)]
    expected = None
    for lent in [0, 1, 5, 0, 2, 1, 0] * 5:  # threads that wait come back, and go again
        for backend, taken in ((alone, 0), (many, lent)):
            parts = opened(backend, *crowd)
            with backend._cores.lend(taken):
                backend.step(parts)
                free = ctypes.c_int32.from_address(backend._step.threads).value
                assert free == max(1, backend.threads - taken)
        expected = alone.logits if expected is None else expected
        assert (alone.logits == expected).all() and (many.logits == expected).all()
