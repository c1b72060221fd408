"""How many floating-point operations requests need at least: of their products and convolutions.

What attention, normalization and activations cost comes on top, so time at a machine's rate of
products is a floor.
"""

from __future__ import annotations

from functools import cache
from math import prod
from pathlib import Path

import onnx

from nuwa.runtime.bench.card import card
from nuwa.runtime.bundle import read_manifest
from nuwa.runtime.core import GenerationRequest
from nuwa.spec.known import known_cells


class Work:
    """Of a bundle's requests."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._manifest = folder, read_manifest(folder)
        self._count = cache(self._graph)

    def flops(self, request: GenerationRequest) -> dict[str, float]:
        """By phase: encoding what is given, decoding, pixels."""
        grid, task = self._manifest.config.decoder.grid, request.task
        frames, given = request.frame_count, 0 if request.frames is None else len(request.frames)
        known = None
        if request.mask is not None:
            known = known_cells(request.mask, grid.height, grid.width)
        costs = card(
            self._manifest,
            task,
            frames=frames,
            guidance=request.sampling.guidance_scale,
            given_frames=given if not task.needs_mask else 0,
            known=known,
        )
        encode = self._count("text_encoder", B=1) if request.prompt else 0.0
        if given:
            encode += self._count("image_tokenizer", B=given)
        if request.sketch is not None:
            encode += self._count("sketch_tokenizer", B=len(request.sketch))
        if request.sketch is not None or known is not None:
            encode += self._count("visual_encoder", N=frames * grid.height * grid.width)
        return {
            "encode": encode,
            "decode": costs.flops,
            "pixels": self._count("image_detokenizer", B=frames),
        }

    def _graph(self, name: str, **sizes: int) -> float:
        """Of a graph whose dimensions of these names have these sizes."""
        model = onnx.load(self._folder / f"{name}.onnx")
        for given in model.graph.input:
            for dimension in given.type.tensor_type.shape.dim:
                if dimension.dim_param in sizes:
                    dimension.dim_value = sizes[dimension.dim_param]
        shapes = _shapes(onnx.shape_inference.infer_shapes(model, data_prop=True).graph)
        total = 0.0
        for node in model.graph.node:
            if node.op_type not in ("Conv", "Gemm", "MatMul"):
                continue
            left, right, out = (shapes[each] for each in (*node.input[:2], node.output[0]))
            # A result is a sum over the filter's inputs, or over the columns of the left matrix.
            summed = prod(right[1:]) if node.op_type == "Conv" else left[-1]
            total += 2.0 * prod(out) * summed
        return total


def _shapes(graph: onnx.GraphProto) -> dict[str, list[int]]:
    found = {each.name: list(each.dims) for each in graph.initializer}
    for each in (*graph.input, *graph.value_info, *graph.output):
        found[each.name] = [dimension.dim_value for dimension in each.type.tensor_type.shape.dim]
    return found
