"""benchmarks/torch_reference.py, what speeds are compared with, draws the same tokens as we do."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from nuwa.spec.grid import Grid
from nuwa.training.decode import generate

from .test_nuwa import SMALL, model

FOLDER = Path(__file__).parents[2] / "benchmarks"
GRID = Grid(3, 4, 4)


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("reference", FOLDER / "torch_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "reference", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("top_k", [0, 5])
def test_tokens_are_ours(reference, top_k):
    nuwa, seeds = model(SMALL), [3, 4]
    text = torch.randint(0, SMALL.text.vocabulary_size - 1, (2, SMALL.text.length))
    text[1, 7:] = SMALL.text.vocabulary_size - 1
    options = {"temperature": 0.8, "top_k": top_k}
    made = reference.Reference(nuwa, GRID, batch=2, device="cpu", compiled=False, **options)
    for shift in (0, 10):
        now = [seed + shift for seed in seeds]
        wanted = generate(nuwa, text, GRID, seeds=now, kind="raster", **options)
        assert torch.equal(made.generate(text, now), wanted)
        assert len(wanted.unique()) > 5
        text = text.flip(0)


class Seen(Exception):
    """Stops a compilation before code is generated."""


@pytest.mark.slow
def test_a_compiled_step_writes_its_caches_in_place(reference, monkeypatch):
    """In one graph: what copied whole caches every token would make ours look faster than it is."""
    from torch._inductor import compile_fx

    found, passes = [], compile_fx.post_grad_passes

    def seen(graph, *arguments, **options):
        passes(graph, *arguments, **options)
        found.extend(node for node in graph.graph.nodes if node.op == "call_function")
        raise Seen

    monkeypatch.setattr(compile_fx, "post_grad_passes", seen)
    config = dataclasses.replace(SMALL, decoder=dataclasses.replace(SMALL.decoder, layers=2))
    text = torch.zeros(1, config.text.length, dtype=torch.int64)
    torch.compiler.reset()
    with pytest.raises(Exception, match="Seen"):
        reference.Reference(model(config), GRID, device="cpu").generate(text, [3])
    torch.compiler.reset()
    kinds = [str(node.target).removeprefix("aten.") for node in found]
    assert kinds.count("index_put_.default") == 2 * 2 + 1, "keys, values and the token"
    assert not {"select_scatter.default", "index_put.default", "clone.default"} & {*kinds}
    cells = GRID.size * config.decoder.width
    copied = [node for node in found if "copy_" in str(node.target)]
    assert all(node.meta["val"].numel() < cells for node in copied)
