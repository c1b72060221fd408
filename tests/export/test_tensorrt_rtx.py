"""TensorRT-RTX parses every graph through the function bodies and builds engines; no GPU needed."""

from __future__ import annotations

from pathlib import Path

import pytest

trt = pytest.importorskip("tensorrt_rtx")

from nuwa.spec.manifest import (  # noqa: E402
    GRAPHS,
    RANKER,
    SKETCH_TOKENIZER,
    VISUAL_ENCODER,
    graph_file,
)

_MOST = {"m": 104, "W": 64, "T": 32, "S": 4, "C": 4, "B": 4, "N": 96, "F": 10}
_FEW = {"m": 14, "W": 1, "T": 8, "S": 1, "C": 1, "B": 1, "N": 48, "F": 1}


def build(path: Path):
    """A serialized engine for shapes from 1 to `_MOST`; AssertionError with the parser's errors."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(path))
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        value = network.get_input(index)
        names = [value.get_dimension_name(axis) for axis in range(len(value.shape))]
        sizes = [
            [
                fixed if fixed != -1 else limit.get(name, 1)
                for fixed, name in zip(value.shape, names, strict=True)
            ]
            for limit in ({}, _FEW, _MOST)
        ]
        profile.set_shape(value.name, *sizes)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config)


@pytest.mark.parametrize("graph", [*GRAPHS, VISUAL_ENCODER, SKETCH_TOKENIZER, RANKER])
def test_graph_builds(tiny_bundle, graph):
    engine = build(tiny_bundle / graph_file(graph))
    assert engine is not None and engine.nbytes > 10_000
