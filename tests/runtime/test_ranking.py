"""Where rankers come from: a graph of the bundle, and the entry points of other packages."""

from __future__ import annotations

import importlib.metadata
import sys
import types

import numpy as np
import pytest

from nuwa.runtime import ranking
from nuwa.runtime.client import LocalClient
from nuwa.runtime.engine import load_engine
from nuwa.runtime.ranking import BundleRanker, find_rankers, ranker_names
from nuwa.spec.manifest import RANKERS

FRAMES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)


@pytest.fixture
def bundle(tmp_path):
    """What a ranker needs of a bundle; its graph is the sum of the tokens plus the mean pixel."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("ReduceSum", ["tokens"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["words"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["frames"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["mean"], keepdims=0),
        helper.make_node("Add", ["words", "mean"], ["score"]),
    ]
    inputs = [
        helper.make_tensor_value_info("tokens", TensorProto.INT32, ["M"]),
        helper.make_tensor_value_info("frames", TensorProto.UINT8, ["F", "H", "W", 3]),
    ]
    outputs = [helper.make_tensor_value_info("score", TensorProto.FLOAT, [])]
    graph = helper.make_graph(nodes, "ranker", inputs, outputs)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=onnx.IR_VERSION_2023_5_5
    )
    onnx.save(model, tmp_path / "ranker.onnx")
    return types.SimpleNamespace(
        manifest=types.SimpleNamespace(rankers=RANKERS),
        text_tokenizer=types.SimpleNamespace(
            encode=lambda text: np.array([len(text), 1, 0], np.int32)
        ),
        graph=lambda name: tmp_path / f"{name}.onnx",
    )


def entry(monkeypatch, name: str, value: str) -> None:
    found = importlib.metadata.EntryPoint(name, value, ranking.GROUP)

    def entry_points(*, group):
        assert group == "nuwa.rankers"
        return [found]

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)


def test_the_ranker_of_a_bundle(bundle):
    (ranker,) = find_rankers(bundle).values()
    assert ranker("a red 3", FRAMES) == pytest.approx(8 + FRAMES.mean())
    assert ranker("a", FRAMES[:1]) == pytest.approx(2 + FRAMES[:1].mean())


def test_a_ranker_is_loaded_when_it_is_first_used(bundle, tmp_path):
    ranker = BundleRanker(bundle)
    (tmp_path / "ranker.onnx").rename(tmp_path / "elsewhere.onnx")
    with pytest.raises(Exception, match="ranker.onnx"):
        ranker("a", FRAMES)
    (tmp_path / "elsewhere.onnx").rename(tmp_path / "ranker.onnx")
    assert ranker("a", FRAMES) > 0


def test_rankers_of_other_packages(bundle, monkeypatch):
    entry(monkeypatch, "brightness", "bright.things:score")
    assert ranker_names(bundle.manifest) == ("clip", "brightness")
    rankers = find_rankers(bundle)
    assert list(rankers) == ["clip", "brightness"]
    with pytest.raises(ModuleNotFoundError):  # when it is used, not before
        rankers["brightness"]("a", FRAMES)
    module = types.ModuleType("bright.things")
    module.score = lambda prompt, frames: float(frames.mean())
    monkeypatch.setitem(sys.modules, "bright", types.ModuleType("bright"))
    monkeypatch.setitem(sys.modules, "bright.things", module)
    assert rankers["brightness"]("a", FRAMES) == FRAMES.mean()


def test_the_ranker_of_a_bundle_goes_before_a_packages(bundle, monkeypatch):
    entry(monkeypatch, "clip", "no_such_module:score")
    assert ranker_names(bundle.manifest) == ("clip",)
    assert isinstance(find_rankers(bundle)["clip"], BundleRanker)


def test_a_bundle_without_rankers(bundle, monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda *, group: [])
    bundle.manifest.rankers = ()
    assert ranker_names(bundle.manifest) == () and find_rankers(bundle) == {}


def test_the_best_of_a_real_bundle(tiny_bundle):
    engine = load_engine(tiny_bundle, slots=2)
    prompt = "a red digit 3 moves left to right on black"
    with LocalClient(engine) as client:
        assert client.get_model().rankers[0] == "clip"
        options = {"seed": 4, "sample_index": 2}
        result = client.generate_video(
            "t2v", prompt, samples=5, rank_by="clip", return_count=5, **options
        )
        assert sorted(result.scores) == [2, 3, 4, 5, 6]
        scores = [sample.score for sample in result.samples]
        assert scores == sorted(result.scores.values(), reverse=True) and len(set(scores)) > 1
        options["sample_index"] = result.samples[0].sample_index
        alone = client.generate_video("t2v", prompt, **options)
    np.testing.assert_array_equal(alone.frames, result.frames)
    assert engine.rankers["clip"](prompt, alone.frames) == scores[0]
