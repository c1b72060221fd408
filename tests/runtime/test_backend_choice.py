"""Which backend a bundle gets, and what is said where the one asked for is not to be had."""

from __future__ import annotations

import pytest

from nuwa.runtime.backends import native_cpu
from nuwa.runtime.backends.choice import make_backend
from nuwa.runtime.backends.native_cpu import NativeCpu, UnavailableError
from nuwa.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from nuwa.runtime.bundle import open_bundle
from nuwa.runtime.engine import load_engine

SIZES = {"cache_slots": 1, "condition_slots": 1, "threads": 1}


@pytest.fixture
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


@pytest.fixture
def no_library(monkeypatch):
    def load(level):
        raise UnavailableError("libnuwa_cpu.so was not built")

    monkeypatch.setattr(native_cpu, "_load", load)


def test_auto_takes_the_native_one_where_it_is_built(bundle):
    try:
        NativeCpu(bundle, **SIZES)
    except UnavailableError as error:
        pytest.skip(str(error))
    assert make_backend("auto", bundle, **SIZES).name == "native-cpu"
    assert make_backend("onnxruntime-cpu", bundle, **SIZES).name == "onnxruntime-cpu"


def test_auto_goes_on_without_it(bundle, no_library):
    assert isinstance(make_backend("auto", bundle, **SIZES), OnnxRuntimeCpu)


def test_asking_for_it_by_name_says_why_not(tiny_bundle, no_library):
    with pytest.raises(UnavailableError, match="was not built"):
        load_engine(tiny_bundle, backend="native-cpu")


def test_an_unknown_backend_is_refused_with_the_choices(tiny_bundle):
    with pytest.raises(ValueError, match="'cuda' is not one of auto, native-cpu, onnxruntime-cpu"):
        load_engine(tiny_bundle, backend="cuda")


def test_sizes_that_fit_no_vector_are_named(bundle, monkeypatch):
    class Library:
        nuwa_best_level = staticmethod(lambda: 4)
        nuwa_lanes = staticmethod(lambda: 48)

    monkeypatch.setattr(native_cpu, "_load", lambda level: Library)
    with pytest.raises(UnavailableError, match="the model has 2 heads in width 32"):
        NativeCpu(bundle, **SIZES)
