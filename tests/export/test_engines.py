"""TensorRT-RTX builds an engine of every graph, through the function bodies; no GPU needed."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import re
import shutil

import pytest

pytest.importorskip("tensorrt_rtx")

from nuwa.export import engines as building  # noqa: E402
from nuwa.export.bundle import export_bundle  # noqa: E402
from nuwa.export.engines import (  # noqa: E402
    EngineError,
    EngineOptions,
    build_engines,
    size_ranges,
)
from nuwa.export.engines_cli import command as build_command  # noqa: E402
from nuwa.runtime.cli import main  # noqa: E402
from nuwa.runtime.engine import (  # noqa: E402
    MOST_ROWS,
    cache_slots,
    condition_slots,
    usual_rows,
)
from nuwa.spec.config import preset  # noqa: E402
from nuwa.spec.engines import (  # noqa: E402
    ENGINES,
    MOST_SORTED,
    EngineKey,
    find_engines,
    graphs_hash,
)
from nuwa.spec.manifest import MANIFEST, BundleError, Manifest, file_hash  # noqa: E402
from nuwa.spec.plan import RollingPlan, decode_plan  # noqa: E402

from ..conftest import make_tiny_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def bundle(tiny_bundle, tmp_path_factory):
    """A copy: engines are kept in the bundle."""
    copy = tmp_path_factory.mktemp("engines") / "bundle"
    shutil.copytree(tiny_bundle, copy)
    return copy


@pytest.fixture(scope="module")
def manifest(bundle):
    return Manifest.from_json((bundle / MANIFEST).read_text())


@pytest.fixture(scope="module")
def built(bundle):
    """By the command, for two GPUs."""
    targets = ["--target", "sm_89", "--target", "sm_120"]
    assert main(["build-engines", str(bundle), *targets, "--slots", "2", "--rows", "1", "32"]) == 0
    (folder,) = (bundle / ENGINES).iterdir()
    return folder


def test_every_graph_gets_an_engine_that_is_found_again(bundle, manifest, built):
    import tensorrt_rtx as trt

    wanted = EngineKey("tensorrt-rtx", trt.__version__, ("sm_120",), None, graphs_hash(manifest))
    folder, record = find_engines(bundle, wanted, 2)
    assert folder == built and record.rows == (1, 32)
    assert set(record.files) == {f"{graph}.engine" for graph in manifest.graphs}
    for name, digest in record.files.items():
        assert file_hash(folder / name) == digest
        assert (folder / name).stat().st_size > 10_000
    with pytest.raises(BundleError, match="for sm_89, sm_120, and this GPU is sm_86"):
        find_engines(bundle, EngineKey("tensorrt-rtx", *_rest(wanted, "sm_86")), 2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
def test_half_precision_and_as_many_codes_as_base_has_build_without_a_warning(
    tmp_path, caplog, precision
):
    """A profile that asks TopK for more than it can is no more than a warning, and fails later."""
    codes = preset("base").image.codebook_size
    assert codes > MOST_SORTED
    make_tiny_checkpoint(tmp_path / "checkpoint", codes=codes)
    manifest = export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", precision=precision)
    options = EngineOptions(targets=("sm_89",), slots=2, rows=(1, 32))
    with caplog.at_level(logging.WARNING, "nuwa.export"):
        _, record = build_engines(tmp_path / "bundle", options)
    assert set(record.files) == {f"{graph}.engine" for graph in manifest.graphs}
    assert warned(caplog) == []


def warned(caplog) -> list[str]:
    """Of TensorRT: PyTorch says things while it exports, too."""
    return [each.getMessage() for each in caplog.records if each.name == "nuwa.export"]


def test_what_tensorrt_warns_of_is_told(bundle, monkeypatch, caplog, tmp_path):
    """Here of a profile for a longer sort than there are codes."""
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns(ENGINES))
    monkeypatch.setattr("nuwa.export.engines.widest_sort", lambda codes: 2 * MOST_SORTED)
    with caplog.at_level(logging.WARNING, "nuwa.export"):
        build_engines(copy, EngineOptions(targets=("sm_89",), rows=(1,)))
    assert any("kMAX values are not self-consistent" in message for message in warned(caplog))


def test_what_a_bundle_without_engines_tells_to_do_can_be_done(tmp_path):
    for wanted in (
        EngineKey("tensorrt-rtx", "1.7.1.116", ("sm_89",), None, "ab" * 32),
        EngineKey("tensorrt", "11.4.0.106", ("sm_90",), 1, "ab" * 32),
        EngineKey("tensorrt", "11.4.0.106", ("sm_90",), None, "ab" * 32),
    ):
        with pytest.raises(BundleError) as raised:
            find_engines(tmp_path, wanted, 8)
        (words,) = re.findall("`nuwa build-engines (.*)`", str(raised.value))
        parser = argparse.ArgumentParser()
        build_command(parser)
        given = parser.parse_args(words.split())
        assert (given.runtime, given.slots) == (wanted.runtime, 8)
        assert (given.plugins is not None) == (wanted.plugin_abi is not None)
        assert given.rows is None  # those that are usual
        EngineOptions(given.runtime, tuple(given.target), given.slots)


def _rest(key: EngineKey, target: str) -> tuple:
    return key.version, (target,), key.plugin_abi, key.graphs


def test_a_bundle_with_engines_is_still_one(bundle, built):
    from nuwa.runtime.bundle import open_bundle

    assert open_bundle(bundle).path == bundle


def test_nothing_is_left_of_engines_that_cannot_be_built(bundle, built, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (bundle / ENGINES).rglob("*")}
    broken = tmp_path / "bundle"
    shutil.copytree(bundle, broken, ignore=shutil.ignore_patterns(ENGINES))
    graph = broken / "text_encoder.onnx"
    graph.write_bytes(b"no graph")
    options = EngineOptions(targets=("sm_89",), rows=(1,))
    with pytest.raises(BundleError, match="text_encoder.onnx is not the file that the manifest"):
        build_engines(broken, options)
    made = Manifest.from_json((broken / MANIFEST).read_text())
    made = dataclasses.replace(made, files=made.files | {graph.name: file_hash(graph)})
    (broken / MANIFEST).write_text(made.to_json())
    with pytest.raises(EngineError, match="tensorrt-rtx cannot read .*text_encoder.onnx"):
        build_engines(broken, options)
    assert list((broken / ENGINES).iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in (bundle / ENGINES).rglob("*")} == before


def test_a_gpu_that_it_does_not_build_for_is_told(bundle):
    with pytest.raises(EngineError, match="does not build for sm_90; it does for .*sm_89"):
        build_engines(bundle, EngineOptions(targets=("sm_90",)))


def test_a_machine_without_a_gpu_must_be_told_of_one(bundle, monkeypatch):
    import ctypes

    def none(_name):
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", none)
    with pytest.raises(EngineError, match="no GPU here to build for; name one with --target"):
        build_engines(bundle, EngineOptions())


def test_a_tensorrt_that_is_not_there_is_named(bundle, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match="tensorrt is not installed; pip install tensorrt-cu13"):
        build_engines(bundle, EngineOptions(runtime="tensorrt"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"runtime": "onnx"}, "runtime 'onnx' is not one of tensorrt, tensorrt-rtx"),
        ({"slots": 0}, "slots 0 is not at least 1"),
        ({"rows": (16, 1)}, r"rows \[16, 1\] are not rising numbers"),
        ({"most_rows": 0}, "most_rows 0 is not at least 1"),
        ({"rows": ()}, r"rows \[\] are not rising numbers"),
        ({"targets": ("sm89",)}, "target 'sm89' is not an architecture such as sm_89"),
        ({"runtime": "tensorrt", "targets": ("sm_90",)}, "leave --target out"),
        ({"plugins": "x.so"}, "TensorRT-RTX takes no plugins"),
        ({"timing_cache": "x"}, "TensorRT-RTX times nothing"),
        ({"version_compatible": True}, "--version-compatible is for TensorRT"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        EngineOptions(**options)


class TimingCaches:
    """What TensorRT does with timing caches: it takes those that were made on this GPU."""

    def __init__(self, takes: tuple[bytes, ...]) -> None:
        self.takes, self.used = takes, None

    def create_timing_cache(self, data: bytes) -> bytes | None:
        return None if data == b"garbage" else data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache in self.takes:
            self.used = cache
        return cache in self.takes


@pytest.mark.parametrize(
    ("kept", "takes", "used", "says"),
    [
        (None, (b"",), b"", ""),
        (b"mine", (b"", b"mine"), b"mine", ""),
        (b"another GPU's", (b"",), b"", "does not take .*timings: it starts from an empty one"),
        (b"garbage", (b"",), b"", "starts from an empty one"),
        (b"mine", (), None, "starts from an empty one|is not written"),
    ],
)
def test_a_timing_cache_of_another_gpu_is_not_used(tmp_path, caplog, kept, takes, used, says):
    path = tmp_path / "timings"
    if kept is not None:
        path.write_bytes(kept)
    config = TimingCaches(takes)
    assert building._timing_cache(config, path) == config.used == used
    assert bool(caplog.messages) == bool(says)
    assert all(re.search(says, message) for message in caplog.messages)


def test_profiles_are_for_what_the_runtime_asks(manifest):
    """Each number of rows has one, up to those of the widest usual call."""
    ranges = size_ranges("decoder_step", manifest.config, 3, (1, 16, 64))
    assert [each["T"] for each in ranges] == [(1, 1, 1), (2, 16, 16), (17, 64, 64)]
    assert {each["S"] for each in ranges} == {(cache_slots(3),) * 3}
    assert {each["C"] for each in ranges} == {(condition_slots(3),) * 3}
    many = [each["T"] for each in size_ranges("decoder_step", manifest.config, 100, (1, 16))]
    usual = usual_rows(100, manifest.config.decoder)
    assert usual > MOST_ROWS and many[:3] == [(1, 1, 1), (2, 16, 16), (17, 64, 64)]
    assert many[-1][2] == usual
    for (_, _, before), (least, best, most) in itertools.pairwise(many):
        assert least == before + 1 and best == most <= max(4 * before, 16)


@pytest.mark.parametrize(("most", "ends"), [(None, (1, 16)), (8, (1, 8))])
def test_a_record_says_how_many_rows_calls_may_have(bundle, tmp_path, monkeypatch, most, ends):
    monkeypatch.setattr(building, "_build", lambda *_: b"an engine")
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns(ENGINES))
    options = EngineOptions(targets=("sm_89",), rows=(1, 16), most_rows=most)
    assert build_engines(copy, options)[1].rows == ends


def test_profiles_end_where_no_call_is_wider(manifest):
    def ends(rows, most):
        return [each["T"] for each in size_ranges("decoder_step", manifest.config, 3, rows, most)]

    assert ends((1, 16, 64), 20) == [(1, 1, 1), (2, 16, 16), (17, 20, 20)]
    assert ends((1, 16, 64), 64) == [(1, 1, 1), (2, 16, 16), (17, 64, 64)]
    assert ends((1, 16), 100) == [(1, 1, 1), (2, 16, 16), (17, 64, 64), (65, 100, 100)]
    assert ends((16, 64), 11) == [(1, 11, 11)]


def test_profiles_reach_the_waves_of_clips_of_any_length():
    """Of `base` those beyond ten frames are wider than any within."""
    config = preset("base")
    grid = config.decoder.grid
    longer = [RollingPlan(config.decoder, frames, 2).widest for frames in (11, 30)]
    assert decode_plan(config.decoder, grid).widest == 160 and max(longer) > 160
    for slots in (1, 4):
        ranges = size_ranges("decoder_step", config, slots, (1, 16, 64, 256))
        assert ranges[-1]["T"][2] == usual_rows(slots, config.decoder) >= 2 * slots * max(longer)


def test_int8_is_refused_before_anything_is_built(manifest, tmp_path):
    (tmp_path / MANIFEST).write_text(dataclasses.replace(manifest, precision="int8").to_json())
    with pytest.raises(EngineError, match="no product of a bundle's int8 matrices; export with"):
        build_engines(tmp_path, EngineOptions(targets=("sm_89",)))


def test_no_profile_sorts_more_than_a_topk_can(manifest):
    own = manifest.config.image.codebook_size
    for codes, most in ((own, own), (MOST_SORTED, MOST_SORTED), (12288, MOST_SORTED)):
        image = dataclasses.replace(manifest.config.image, codebook_size=codes)
        config = dataclasses.replace(manifest.config, image=image)
        ranges = size_ranges("decoder_step", config, 1, (1, 16))
        assert {each["W"] for each in ranges} == {(1, 1, most)}


def test_large_weights_count_as_their_graphs(manifest):
    """They are in a file beside the graph, which is the same for all weights."""
    files = manifest.files | {"decoder_step.onnx.data": "ab" * 32}
    others = manifest.files | {"decoder_step.onnx.data": "cd" * 32}
    hashes = {graphs_hash(dataclasses.replace(manifest, files=each)) for each in (files, others)}
    assert len(hashes) == 2
    text = manifest.files | {"tokenizer.json": "ef" * 32}
    assert graphs_hash(dataclasses.replace(manifest, files=text)) == graphs_hash(manifest)
