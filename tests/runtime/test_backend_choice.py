"""Which backend a bundle gets, and what is said where the one asked for is not to be had."""

from __future__ import annotations

import dataclasses
import shutil
import sys

import pytest

from nuwa.runtime.backends import native_cpu, native_library, onnxruntime_graphs
from nuwa.runtime.backends.choice import make_backend
from nuwa.runtime.backends.native_cpu import NativeCpu
from nuwa.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from nuwa.runtime.bundle import open_bundle
from nuwa.runtime.cli import main
from nuwa.runtime.engine import load_engine
from nuwa.runtime.errors import UnavailableError

SIZES = {"cache_slots": 1, "condition_slots": 1, "threads": 1}


@pytest.fixture
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


@pytest.fixture
def no_library(monkeypatch):
    def load(level):
        raise UnavailableError("libnuwa_cpu.so was not built")

    monkeypatch.setattr(native_cpu, "load", load)


def test_auto_takes_the_native_one_where_it_is_built(bundle):
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler, so no native decoder")
    if native_library.load(0).nuwa_best_level() < 3:
        pytest.skip("this machine has no AVX2, where auto takes ONNX Runtime or level 0")
    assert make_backend("auto", bundle, **SIZES).name == "native-cpu"
    assert make_backend("onnxruntime-cpu", bundle, **SIZES).name == "onnxruntime-cpu"


def test_a_library_of_another_version_is_told_by_that(monkeypatch):
    """Which may lack what this version looks for."""

    class Older:
        nuwa_abi_version = staticmethod(lambda: 1)

    monkeypatch.setattr(native_library.ctypes, "CDLL", lambda path: Older())
    native_library.load.cache_clear()
    try:
        with pytest.raises(
            UnavailableError, match=r"of another version \(1, this is \d\); install"
        ):
            native_library.load(0)
    finally:
        native_library.load.cache_clear()


def test_auto_goes_on_without_it(bundle, no_library):
    assert isinstance(make_backend("auto", bundle, **SIZES), OnnxRuntimeCpu)


def test_asking_for_it_by_name_says_why_not(tiny_bundle, no_library):
    with pytest.raises(UnavailableError, match="was not built"):
        load_engine(tiny_bundle, backend="native-cpu")


def test_an_unknown_backend_is_refused_with_the_choices(tiny_bundle):
    with pytest.raises(ValueError, match="'cuda' is not one of auto, native-cpu, onnxruntime-cpu"):
        load_engine(tiny_bundle, backend="cuda")


def test_a_gpu_that_is_not_there_is_told(bundle, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UnavailableError, match="needs ONNX Runtime with CUDA: install"):
        make_backend("onnxruntime-cuda", bundle, **SIZES)
    whole = dataclasses.replace(bundle.manifest, precision="int8")
    with pytest.raises(UnavailableError, match="of fp32, fp16 and bf16, and this one is of int8"):
        make_backend("onnxruntime-cuda", dataclasses.replace(bundle, manifest=whole), **SIZES)


def test_sizes_that_fit_no_vector_are_named(bundle, monkeypatch):
    class Library:
        nuwa_best_level = staticmethod(lambda: 4)
        nuwa_lanes = staticmethod(lambda: 48)

    monkeypatch.setattr(native_cpu, "load", lambda level: Library)
    with pytest.raises(UnavailableError, match="the model's width, 32, is not a multiple of 96"):
        NativeCpu(bundle, **SIZES)


def test_the_command_line_says_it_in_a_sentence(tiny_bundle, no_library, capsys):
    assert main(["serve", str(tiny_bundle), "--backend", "native-cpu", "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nuwa serve: ") and "was not built" in error
    assert "Traceback" not in error


def test_a_library_that_does_not_load_is_one_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "libnuwa_cpu.so").write_bytes(b"no library")
    monkeypatch.setattr(sys.modules["nuwa.runtime"], "__path__", [str(tmp_path)])
    native_library.load.cache_clear()
    try:
        with pytest.raises(UnavailableError, match="cannot be loaded"):
            native_library.load(0)
    finally:
        native_library.load.cache_clear()


@pytest.mark.parametrize(
    ("text", "count"),
    [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("9999999 100000", 8), ("", 8)],
)
def test_threads_follow_a_containers_quota(tmp_path, monkeypatch, text, count):
    quota = tmp_path / "cpu.max"
    quota.write_text(f"{text}\n")
    monkeypatch.setattr(onnxruntime_graphs, "_CPU_MAX", quota)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert onnxruntime_graphs.cores() == count
