"""`nuwa export`, through the function that its entry point names."""

from __future__ import annotations

import argparse
import sys

import pytest

pytest.importorskip("onnx")
pytest.importorskip("torch")

from nuwa.export import engines_cli  # noqa: E402
from nuwa.export.cli import command, figures_text  # noqa: E402
from nuwa.export.engines import EngineError, EngineOptions  # noqa: E402
from nuwa.runtime.bundle import open_bundle  # noqa: E402
from nuwa.spec.engines import TENSORRT_RTX  # noqa: E402


def export(*words: str) -> int:
    parser = argparse.ArgumentParser()
    run = command(parser)
    return run(parser.parse_args(list(words)))


@pytest.mark.slow
def test_exports_and_prints_sizes_and_figures(tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "bundle"
    assert export(str(tiny_checkpoint), str(out), "--precision", "fp16") == 0
    printed = capsys.readouterr().out
    assert open_bundle(out).manifest.precision == "fp16"
    assert "decoder_step.onnx" in printed and "token mismatches:" in printed
    assert "tiny, 0.71 M parameters, fp16, licence of the weights: CC0-1.0" in printed


def test_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="nothing is not a checkpoint folder"):
        export(str(tmp_path / "nothing"), str(tmp_path / "bundle"))


def test_precision_is_one_of_those_known(tiny_checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export(str(tiny_checkpoint), str(tmp_path / "bundle"), "--precision", "fp4")
    assert "fp32" in capsys.readouterr().err


@pytest.mark.slow
def test_engines_are_built_of_what_was_exported(tiny_checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    asked = []
    monkeypatch.setattr(engines_cli, "build", lambda *words: asked.append(words))
    out = tmp_path / "bundle"
    words = ["--tensorrt", "tensorrt-rtx", "--target", "sm_89", "--slots", "4", "--rows", "1", "64"]
    assert export(str(tiny_checkpoint), str(out), *words) == 0
    options = EngineOptions(TENSORRT_RTX, targets=("sm_89",), slots=4, rows=(1, 64))
    assert asked == [(out, options)] and open_bundle(out)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--tensorrt", "tensorrt-rtx", "--target", "sm_12"], EngineError, "not build for sm_12"),
        (["--tensorrt", "tensorrt-rtx", "--plugins", "a.so"], ValueError, "takes no plugins"),
        (["--tensorrt", "tensorrt"], EngineError, "tensorrt is not installed; pip install"),
        (["--tensorrt"], EngineError, "tensorrt is not installed; pip install"),
        (["--target", "sm_89"], ValueError, "--target: of engines, so give --tensorrt, too"),
        (["--rows", "64", "--slots", "2"], ValueError, "--slots, --rows: of engines"),
    ],
)
def test_engines_that_cannot_be_built_are_told_before(
    tiny_checkpoint, tmp_path, monkeypatch, words, error, message
):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(error, match=message):
        export(str(tiny_checkpoint), str(tmp_path / "bundle"), *words)
    assert not (tmp_path / "bundle").exists()


def test_figures_are_told_in_words():
    parity = {"logits_absolute": 1e-5, "logits_relative": 1.5e-6, "odd": 2, "odd_of": 300}
    assert figures_text(parity) == "logits relative: 1.5e-06\nodd: 2 of 300"
    assert figures_text({}) == ""
