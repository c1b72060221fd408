"""What benchmarks for GPUs count and build, as far as that needs no GPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

pytest.importorskip("onnx")

from nuwa import plugins_trt  # noqa: E402
from nuwa.export.engines import EngineOptions  # noqa: E402
from nuwa.runtime.bench import making  # noqa: E402
from nuwa.spec.config import preset  # noqa: E402
from nuwa.spec.engines import TENSORRT, TENSORRT_RTX  # noqa: E402
from nuwa.spec.manifest import MANIFEST  # noqa: E402
from nuwa.spec.plan import decode_plan  # noqa: E402
from nuwa.training.sampling import sample  # noqa: E402

from .calls import Sizes  # noqa: E402

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A script of benchmarks/ by its name."""

    def loaded(name):
        monkeypatch.syspath_prepend(str(FOLDER))
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return loaded


def test_bytes_that_a_call_must_move(load):
    kernels = load("kernels")
    sizes = Sizes(rows=3, slots=1, entries=9, neighbours=2, heads=2, head_dim=32)
    row = 64 * 2
    near = np.array([[0, 1], [1, 2], [-1, 8]], np.int32)
    index = np.array([1, -1, 5], np.int32)
    # query and out; keys and values of 0, 1, 2, 8; the neighbours and a slot a row
    moved = kernels.moved_bytes("fp16", sizes, {"neighbours": near})
    assert moved == (2 * 3 + 2 * 4) * row + 4 * (6 + 3)
    # 1 is what the call writes itself; new keys and values, two of which are written
    moved = kernels.moved_bytes("fp16", sizes, {"neighbours": near, "write_index": index})
    assert moved == (2 * 3 + 2 * 3 + 2 * 3 + 2 * 2) * row + 4 * (6 + 3 + 3)


def test_calls_that_are_timed_are_as_those_of_a_step(load):
    kernels = load("kernels")
    sizes = Sizes(rows=11, slots=1, entries=20, neighbours=14, heads=2, head_dim=32)
    text = kernels.spread(kernels.NEARBY, sizes)["neighbours"]
    assert (text == np.arange(14)).all()
    made = kernels.spread(kernels.CACHED, sizes)
    for row in made["neighbours"]:
        assert len(set(row.tolist())) == 14 and row.min() >= 0 and row.max() < 20
    assert len(set(made["write_index"].tolist())) == 11


def test_errors_alone_need_no_gpu(load, monkeypatch, capsys):
    kernels = load("kernels")
    sizes = ["--rows", "1", "--neighbours", "14", "--head-dims", "64", "--width", "128"]
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--on-cpu", *sizes])
    assert kernels.main() == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [each["type"] for each in report["calls"]] == 2 * ["fp32", "fp16", "bf16"]
    assert 0 < report["worst_error_over_plain"] <= 2


@pytest.mark.parametrize("error", [1e-5, 1e-3, 1e-1])
def test_a_draw_whose_margin_exceeds_the_error_is_the_same(load, error):
    """And of those whose margin does not, some are not."""
    mismatches = load("mismatches")
    draw = np.random.default_rng(0)
    rows, codes = 4000, 300
    logits = (draw.standard_normal((rows, codes)) * 3).astype(np.float32)
    logits[: rows // 4] *= 10  # of which one token has nearly all
    off = (logits + error * draw.choice([-1, 1], logits.shape)).astype(np.float32)
    uniform = (draw.integers(0, 1 << 24, rows) / (1 << 24)).astype(np.float32)

    def tokens(of):
        ones = torch.ones(rows)
        none = torch.zeros(rows, dtype=torch.int32)
        made = sample(torch.from_numpy(of), ones, none, ones, torch.from_numpy(uniform), none[:1])
        return made.numpy()

    margin = mismatches.margins(logits, uniform, tokens(logits))
    differ = tokens(logits) != tokens(off)
    actual = np.abs(off.astype(np.float64) - logits).max(axis=1)
    assert not (differ & (margin > actual)).any()
    assert (margin > actual).mean() > 0.5, "it says something of most"
    assert differ.any() or error < 1e-4


def test_only_the_first_wave_that_differs_counts(load):
    mismatches = load("mismatches")

    def call(places, tokens):
        logits = np.zeros((len(places), 4), np.float32)
        uniform = np.full(len(places), 0.5, np.float32)
        return mismatches.Call(np.array(places), np.array(tokens), uniform, logits)

    reference = [call([0], [1]), call([1, 4], [2, 2]), call([2, 5, 8], [1, 1, 1])]
    other = [call([0], [1]), call([1], [2]), call([4], [3]), call([2, 5, 8], [0, 0, 0])]
    found = mismatches.compared(reference, other)
    assert found.differ.tolist() == [False, False, True]
    assert mismatches.summary([found, found])["draws"] == 6
    assert mismatches.summary([found, found])["differing"] == 2


def test_engines_that_are_measured_have_the_plugins(load, monkeypatch, tmp_path):
    batches, library = load("batches"), tmp_path / "libnuwa_plugins.so"
    library.touch()
    monkeypatch.setattr(plugins_trt, "library", lambda: library)
    ran: list[list[str]] = []
    monkeypatch.setattr(making, "_run", lambda words, what: ran.append(words))
    for runtime, wanted in ((TENSORRT, library), (TENSORRT_RTX, None)):
        options = argparse.Namespace(backend=runtime, function_bodies=False)
        assert batches.plugins(options) == wanted
        EngineOptions(runtime, plugins=wanted)
        making.with_engines(tmp_path, tmp_path / runtime, runtime, 2, (1, 16))
        assert ("--plugins" in ran[-1]) == (wanted is not None)
    options = argparse.Namespace(backend=TENSORRT, function_bodies=True)
    assert batches.plugins(options) is None


def test_engines_that_are_measured_are_as_wide_as_what_is(load, tmp_path, monkeypatch, capsys):
    """And TensorRT times what they have in common once."""
    batches = load("batches")
    config = preset("base")
    manifest = types.SimpleNamespace(config=config)
    monkeypatch.setattr(batches, "Manifest", types.SimpleNamespace(from_json=lambda _: manifest))
    (tmp_path / MANIFEST).write_text("{}")
    options = argparse.Namespace(
        backend=TENSORRT, function_bodies=True, batches=[4], frames=[1, 10], timing_cache=None
    )
    widest = decode_plan(config.decoder, config.decoder.grid).widest
    assert batches.engine_options(tmp_path, options).most_rows == 4 * widest
    options.frames = [1]
    assert batches.engine_options(tmp_path, options).most_rows < 4 * widest
    ran: list[list[str]] = []

    def run(words, **_):
        ran.append(words)
        return types.SimpleNamespace(stdout='{"batches": [1]}')

    monkeypatch.setattr(batches.subprocess, "run", run)
    command = ["batches.py", str(tmp_path), "--backend", TENSORRT, "--function-bodies"]
    monkeypatch.setattr(sys, "argv", command)
    assert batches.main() == 0
    caches = {words[words.index("--timing-cache") + 1] for words in ran}
    assert len(ran) == 2 and len(caches) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["batches"] == [1, 1]


def test_what_a_row_must_read_of_a_text(load):
    ceiling = load("ceiling")
    assert ceiling.text_entries(preset("base"), 12) == 77, "padding too"
    assert ceiling.text_entries(preset("sprites"), 12) == 12
