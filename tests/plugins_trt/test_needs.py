"""A run that asks for tests on a GPU does not end well for want of what it could have had."""

from __future__ import annotations

import shutil

import pytest

from . import needs, plugin_harness


@pytest.mark.parametrize(
    ("expression", "asks"),
    [("", False), ("not gpu", False), ("gpu", True), ("gpu and not slow", True), ("slow", False)],
)
def test_asking_for_a_gpu(expression, asks):
    assert needs.asks_for_gpu(expression) == asks


def test_what_is_missing_is_an_error_only_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(needs, "required", True)
    with pytest.raises(RuntimeError, match="no nvcc and no cmake, so no CUDA libraries; it can be"):
        plugin_harness.built("nuwa_plugins", "90")
    with pytest.raises(RuntimeError, match="no C.. compiler"):
        needs.compiler()
    monkeypatch.setattr(needs, "required", False)
    with pytest.raises(pytest.skip.Exception, match="no nvcc and no cmake"):
        plugin_harness.built("nuwa_plugins", "90")


def test_headers_that_are_missing_are_an_error_too(monkeypatch):
    monkeypatch.delenv("TENSORRT_ROOT", raising=False)
    monkeypatch.setattr(plugin_harness.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(needs, "required", True)
    with pytest.raises(RuntimeError, match="no TensorRT headers: set TENSORRT_ROOT"):
        plugin_harness.headers()


def test_engines_that_no_gpu_of_this_kind_can_have_are_no_failure(monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    from nuwa.export import engines

    monkeypatch.setattr(engines, "_own_gpu", lambda: ("sm_90", "NVIDIA H200"))
    assert "TensorRT-RTX does not build for sm_90" in needs.no_engines("tensorrt-rtx")
    monkeypatch.setattr(engines, "_own_gpu", lambda: ("sm_89", "NVIDIA L4"))
    assert needs.no_engines("tensorrt-rtx") == ""
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None)
    assert needs.no_engines("tensorrt") == "tensorrt is not installed"
