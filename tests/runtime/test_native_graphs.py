"""Encoders, tokenizers and detokenizer of the native backend: against ONNX Runtime's."""

from __future__ import annotations

import ctypes
import logging
import types

import numpy as np
import pytest

from nuwa.runtime.backends import native_library, native_team, native_weights
from nuwa.runtime.backends.cores import Cores
from nuwa.runtime.backends.frame_graph import FrameGraph
from nuwa.runtime.backends.native_cpu import NativeCpu
from nuwa.runtime.backends.native_encoders import NativeEncoder
from nuwa.runtime.backends.native_frames import NativeFrames
from nuwa.runtime.backends.native_team import NativeTeam
from nuwa.runtime.errors import UnavailableError
from nuwa.spec.conditions import ConditionLayout
from nuwa.spec.config import VQGANConfig
from nuwa.spec.manifest import IMAGE_DETOKENIZER, IMAGE_TOKENIZER

from .backend_kinds import CONDITIONS, NATIVE, PROMPTS, loaded, made_as, other_bundle, volume

DEEP = VQGANConfig(  # attention at two sizes, two blocks a level, widths that change, odd sides
    resolution=20,
    base_channels=32,
    channel_multipliers=(1, 2, 3),
    res_blocks=2,
    attention_resolutions=(5, 10),
    z_channels=24,
    embedding_dim=7,
    codebook_size=50,
)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return other_bundle("fp16", tmp_path_factory.mktemp("fp16"))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    return other_bundle("bf16", tmp_path_factory.mktemp("bf16"))


def native(kind: str, bundle, threads: int = 1) -> NativeCpu:
    made = made_as(kind, bundle, cache_slots=1, condition_slots=1, threads=threads)
    assert isinstance(made, NativeCpu)
    return made


def frames_of(config: VQGANConfig, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    draw, size = np.random.default_rng(seed), config.resolution
    return {
        "codes": draw.integers(
            0, config.codebook_size, (count, config.grid_size, config.grid_size), np.int32
        ),
        "pixels": draw.integers(0, 256, (count, size, size, 3), np.uint8),
        "classes": draw.integers(0, 8, (count, size, size), np.uint8),  # some beyond the known
    }


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_frames_become_what_onnxruntime_makes_of_them(bundle, half, kind, precision):
    bundle = half if precision == "fp16" else bundle
    expected, made = loaded(bundle, "onnxruntime"), native(kind, bundle, threads=2)
    given = frames_of(bundle.manifest.config.image, 5)
    # In fp16 ONNX Runtime rounds between the layers, too.
    pixels = np.abs(
        made.detokenize(given["codes"]).astype(int) - expected.detokenize(given["codes"])
    )
    assert pixels.max() <= (1 if precision == "fp32" else 3)
    assert (pixels > 0).mean() < (0.001 if precision == "fp32" else 0.2)
    same = made.tokenize(given["pixels"]) == expected.tokenize(given["pixels"])
    drawn = made.tokenize_sketch(given["classes"]) == expected.tokenize_sketch(given["classes"])
    least = 1.0 if precision == "fp32" else 0.9
    assert same.mean() >= least and drawn.mean() >= least


@pytest.mark.parametrize("kind", NATIVE)
def test_frames_in_bf16_are_nearly_those(narrow, kind):
    """Without tiles, nothing is rounded here that ONNX Runtime does not round, too."""
    made, expected = native(kind, narrow, threads=2), loaded(narrow, "onnxruntime")
    given = frames_of(narrow.manifest.config.image, 5)
    pixels = made.detokenize(given["codes"]).astype(int) - expected.detokenize(given["codes"])
    assert np.abs(pixels).max() <= 8 and np.abs(pixels).mean() < 1
    if made._library.nuwa_has_tiles():
        assert (pixels != 0).mean() > 0.01
    assert (made.tokenize(given["pixels"]) == expected.tokenize(given["pixels"])).mean() > 0.8


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_no_bit_of_a_frame_depends_on_threads_or_on_company(bundle, narrow, kind, stored):
    bundle = narrow if stored == "bf16" else bundle
    alone, many = native(kind, bundle), native(kind, bundle, threads=3)
    given = frames_of(bundle.manifest.config.image, 4)
    for run, name in (
        ("detokenize", "codes"),
        ("tokenize", "pixels"),
        ("tokenize_sketch", "classes"),
    ):
        frames = given[name]
        whole = getattr(alone, run)(frames)
        np.testing.assert_array_equal(getattr(many, run)(frames), whole)
        np.testing.assert_array_equal(getattr(many, run)(frames[1:2], busy=True), whole[1:2])


def only_graphs(folder, vqgan, config: VQGANConfig):
    """What NativeFrames reads of a bundle, of a VQ-GAN with random weights for pictures."""
    from nuwa.export.graphs import image_detokenizer, image_tokenizer, write_graph

    for graph in (image_tokenizer(vqgan), image_detokenizer(vqgan)):
        write_graph(graph, folder / f"{graph.name}.onnx")
    described = types.SimpleNamespace(image=config, sketch=None)
    manifest = types.SimpleNamespace(config=described, precision="fp32")
    return types.SimpleNamespace(manifest=manifest, graph=lambda name: folder / f"{name}.onnx")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    import torch

    from nuwa.training.vqgan import VQGAN

    with torch.random.fork_rng():
        torch.manual_seed(3)
        vqgan = VQGAN(DEEP).eval().requires_grad_(False)
        for name, parameter in vqgan.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        torch.nn.init.normal_(vqgan.quantize.embedding.weight, std=0.5)
        return vqgan, only_graphs(tmp_path_factory.mktemp("deep"), vqgan, DEEP)


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
def test_any_vqgan_that_can_be_configured_runs(bundle, deep, kind, narrow):
    """Against PyTorch; the widths of features are multiples of nothing."""
    import torch

    from nuwa.training.vqgan import to_bytes, to_signed

    native(kind, bundle)  # or the test is skipped
    vqgan, graphs = deep
    level, given = int(kind.split()[-1]), frames_of(DEEP, 3)
    team = NativeTeam(native_library.load(level), Cores(2))
    with torch.no_grad():
        pixels = to_bytes(vqgan.decode(torch.from_numpy(given["codes"]).long())).numpy()
        codes = vqgan.encode(to_signed(torch.from_numpy(given["pixels"]))).codes.numpy()
    made = NativeFrames(team, graphs, IMAGE_DETOKENIZER, narrow=narrow)
    rounded = narrow and team.library.nuwa_has_tiles()
    worst = np.abs(made.run(given["codes"], busy=False).astype(int) - pixels)
    assert worst.max() <= (8 if rounded else 1) and worst.mean() < (1 if rounded else 0.001)
    found = NativeFrames(team, graphs, IMAGE_TOKENIZER, narrow=narrow).run(
        given["pixels"], busy=True
    )
    assert found.dtype == np.int32 and (found == codes).mean() >= (0.8 if rounded else 1.0)


@pytest.mark.parametrize("kind", NATIVE)
def test_the_nearest_code_is_the_first_of_equals(bundle, deep, kind, monkeypatch):
    native(kind, bundle)
    _, graphs = deep
    team = NativeTeam(native_library.load(int(kind.split()[-1])), Cores(1))
    read = native_weights.read_weights

    def doubled(path):
        weights = read(path)
        codes = weights["vqgan.quantize.embedding.weight"]
        return weights | {"vqgan.quantize.embedding.weight": np.concatenate([codes[:25]] * 2)}

    monkeypatch.setattr(native_weights, "read_weights", doubled)
    pixels = frames_of(DEEP, 4)["pixels"]
    assert (
        NativeFrames(team, graphs, IMAGE_TOKENIZER, narrow=False).run(pixels, busy=False) < 25
    ).all()


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_conditions_are_those_of_onnxruntime(bundle, half, narrow, kind, precision):
    """Of every text what is no padding, and the whole volume; nothing else is written."""
    bundle = {"fp32": bundle, "fp16": half, "bf16": narrow}[precision]
    # Its encoders see the same weights; in fp16 it rounds between the layers, in bf16 we do.
    near = {"fp32": 2e-6, "fp16": 5e-3, "bf16": 5e-2}[precision]
    expected, made = loaded(bundle, "onnxruntime"), loaded(bundle, kind, threads=2)
    if precision == "fp32":  # its heads are narrower than vectors of level 4
        assert (made._volumes is None) == kind.endswith("4")
    else:
        assert made._texts is not None and made._volumes is not None
    layout = ConditionLayout.of(bundle.manifest.config)
    for name, wanted in expected.conditions.items():
        wanted, found = wanted.astype(np.float32), made.conditions[name]
        most = np.abs(wanted).max()
        for slot in range(CONDITIONS):
            used = bundle.text_tokenizer.used(bundle.text_tokenizer.encode(PROMPTS[slot]))
            none = bundle.text_tokenizer.used(bundle.text_tokenizer.encode(PROMPTS[0]))
            for first, count in ((layout.text, used), (layout.none, none)):
                rows = slice(first, first + count)
                assert np.abs(found[slot, rows] - wanted[slot, rows]).max() < near * most
            if made._texts is not None:
                assert not found[slot, layout.text + used : layout.text + 77].any()
            seen = slice(layout.visual, layout.visual + bundle.manifest.config.decoder.grid.size)
            assert np.abs(found[slot, seen] - wanted[slot, seen]).max() < near * most


@pytest.mark.parametrize("kind", NATIVE)
def test_a_model_that_masks_no_padding_encodes_all_of_it(bundle, kind):
    made, config = loaded(bundle, kind), bundle.manifest.config
    assert made._texts is not None
    layout, ids = ConditionLayout.of(config), bundle.text_tokenizer.encode("a")
    unmasked = types.SimpleNamespace(
        mask_padding=False, vocabulary_size=config.text.vocabulary_size
    )
    manifest = types.SimpleNamespace(config=types.SimpleNamespace(text=unmasked))
    made.bundle = types.SimpleNamespace(manifest=manifest)
    made.encode_text(ids[None], [0], layout.text)
    for name in made.conditions:
        rows = made.conditions[name][0, layout.text : layout.text + len(ids)]
        assert np.abs(rows).sum(axis=1).all()


@pytest.mark.parametrize("kind", NATIVE)
def test_no_bit_of_a_condition_depends_on_threads(bundle, kind):
    alone, many = loaded(bundle, kind), loaded(bundle, kind, threads=3)
    for _ in range(2):
        for name, rows in alone.conditions.items():
            np.testing.assert_array_equal(many.conditions[name], rows)
        many.encode_visual(*volume(bundle.manifest.config, 1), 1, busy=True)


def test_a_bundle_that_names_less_runs_on_onnxruntime(bundle, monkeypatch, caplog):
    """As those exported before the names of norms and of turned matrices were noted."""
    read = native_weights.read_weights

    def without(path):
        return {k: v for k, v in read(path).items() if "norm" not in k and "qkv" not in k}

    monkeypatch.setattr(native_weights, "read_weights", without)
    with caplog.at_level(logging.INFO, "nuwa.runtime"):
        made, expected = loaded(bundle, NATIVE[-1]), loaded(bundle, "onnxruntime")
    assert made._texts is made._volumes is None and isinstance(made._detokenizer, FrameGraph)
    told = caplog.text
    assert "image_detokenizer.onnx has no weights vqgan.decoder.mid.block_1.norm1.weight" in told
    assert "text_encoder.onnx has no weights nuwa.text.blocks.0.attention_norm.weight" in told
    assert "runs on ONNX Runtime" in told
    codes = frames_of(bundle.manifest.config.image, 2)["codes"]
    np.testing.assert_array_equal(made.detokenize(codes), expected.detokenize(codes))
    for name, rows in expected.conditions.items():
        np.testing.assert_array_equal(made.conditions[name], rows)


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_where_bf16_would_be_faster_the_log_says_so(bundle, narrow, stored, caplog):
    with caplog.at_level(logging.INFO, "nuwa.runtime"):
        made = native(NATIVE[0], narrow if stored == "bf16" else bundle)
    tiles = bool(made._library.nuwa_has_tiles())
    assert ("multiplies bf16 faster than fp32" in caplog.text) == (tiles and stored == "fp32")
    assert ("with AMX" in made.runs_on) == (tiles and stored == "bf16")


def test_sizes_that_are_no_multiples_of_a_vector_are_refused(bundle, monkeypatch):
    team = NativeTeam(native_library.load(0), Cores(1))
    memory = [np.zeros((1, 1, 32), np.float32)] * 2
    monkeypatch.setattr(team, "library", types.SimpleNamespace(nuwa_lanes=lambda: 64))
    with pytest.raises(
        UnavailableError, match="width of text_encoder, 32, is not a multiple of 128"
    ):
        NativeEncoder(team, bundle, "text_encoder", memory, memory)


def test_a_forked_process_is_told_to_load_its_own_bundle(bundle, monkeypatch):
    made = native(NATIVE[-1], bundle)
    other = types.SimpleNamespace(getpid=lambda: made._painting._process + 1)
    monkeypatch.setattr(native_team, "os", other)
    codes = frames_of(bundle.manifest.config.image, 1)["codes"]
    with pytest.raises(RuntimeError, match="a forked process has none of the threads"):
        made.detokenize(codes)
    monkeypatch.undo()
    assert made.detokenize(codes).any()


@pytest.mark.parametrize("busy", [False, True])
def test_frames_and_encoders_take_cores_while_they_run(bundle, busy):
    made = native(NATIVE[-1], bundle, threads=8)
    seen, library = [], made._painting.library

    def convolve(net, given, threads, to):
        seen.append((threads, made._cores.free))
        return library.nuwa_convnet_run(net, given, threads, to)

    lent = types.SimpleNamespace(
        nuwa_convnet_run=convolve,
        nuwa_convnet_free=library.nuwa_convnet_free,
        nuwa_team_free=library.nuwa_team_free,
    )
    made._painting.library = lent
    codes = frames_of(bundle.manifest.config.image, 3)["codes"]
    made.detokenize(codes, busy=busy)
    assert seen == 3 * [(2, 6) if busy else (8, 1)] and made._cores.free == 8


def test_structures_of_the_other_headers_are_as_large_as_they_say():
    sizes = {
        native_library.AbiOp: 64,
        native_library.AbiEncoderShape: 52,
        native_library.AbiEncoderBlock: 168,
        native_library.AbiEncoderWeights: 80,
        native_library.AbiEncoding: 56,
        native_library.AbiMatrix: 24,
    }
    assert {each: ctypes.sizeof(each) for each in sizes} == sizes
