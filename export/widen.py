"""A graph of bfloat16 as one of fp32, for runtimes on processors, which have no arithmetic in it.

Every number keeps its value, so that the graph's structure and its rounded weights can be checked
anywhere; what rounding between its operators does can be seen on a GPU only. Weights of fp8 stay.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from .graphs import INLINE_LIMIT

_NARROW, _WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def widen(path: Path, out: Path) -> None:
    """Writes the graph of `path` to `out`, weights beside it where they are large."""
    model, size = ir.load(path), 0
    for value in model.graph.initializers.values():
        assert value.const_value is not None, "an initializer has a value"
        if value.const_value.dtype is _NARROW:
            value.const_value = _wide(value.const_value)
        size += value.const_value.nbytes
        _retype(value)
    for part in (model.graph, *model.functions.values()):
        for value in part.inputs:
            _retype(value)
        for node in part.all_nodes():
            for value in node.outputs:
                _retype(value)
            for name, attribute in node.attributes.items():
                if node.op_type == "Cast" and name == "to" and attribute.value == _NARROW:
                    node.attributes[name] = ir.AttrInt64(name, _WIDE)
                elif attribute.type is ir.AttributeType.TENSOR and attribute.value.dtype is _NARROW:
                    node.attributes[name] = ir.AttrTensor(name, _wide(attribute.value))
    ir.save(model, out, external_data=f"{out.name}.data" if size > INLINE_LIMIT else None)


def _wide(tensor: ir.TensorProtocol) -> ir.Tensor:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _retype(value: ir.Value) -> None:
    if value.dtype is _NARROW:
        value.dtype = _WIDE
