"""How torch.onnx writes the PyTorch operators that it does not know, or knows less well.

The `nuwa` operators become one opaque node each. Dense attention is written plainly: the exporter's
own translation takes 4-D tensors only and computes its scale from shapes at run time. Counts of
true values are summed as fp32, which runtimes do much faster than int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from onnxscript import values

from nuwa.training import nearby  # noqa: F401  defines torch.ops.nuwa

from . import operators, quantize  # noqa: F401  defines the operators of quantized layers

_OPSET = values.Opset(operators.DOMAIN, operators.VERSION)
_NODES = {name: values.Op(_OPSET, name, schema) for name, schema in operators.schemas().items()}
_NEVER = -1e30  # below any score in fp32; fp16 takes its own lowest number


def translations() -> dict[Any, Callable]:
    """For torch.onnx.export's custom_translation_table."""
    return {
        torch.ops.nuwa.nearby_attention.default: _nearby_attention,
        torch.ops.nuwa.cached_nearby_attention.default: _cached_nearby_attention,
        torch.ops.nuwa.matmul_integer.default: _matmul_integer,
        torch.ops.nuwa.dequantize.default: _dequantize,
        torch.ops.aten.scaled_dot_product_attention.default: _dense_attention,
        torch.ops.aten.sum.dim_IntList: _sum,
    }


def _nearby_attention(query, key, value, slot, neighbours, bias=None, heads=1):
    inputs = (query, key, value, slot, neighbours, bias)
    return _NODES[operators.NEARBY](*inputs, heads=heads, **operators.PLUGIN_ATTRIBUTES)


def _cached_nearby_attention(
    query,
    key_new,
    value_new,
    key_cache,
    value_cache,
    slot,
    write_index,
    neighbours,
    bias=None,
    heads=1,
):
    caches = (key_cache, value_cache)
    inputs = (query, key_new, value_new, *caches, slot, write_index, neighbours, bias)
    return _NODES[operators.CACHED](*inputs, heads=heads, **operators.PLUGIN_ATTRIBUTES)


def _matmul_integer(a, b):
    return op.MatMulInteger(a, b)


def _dequantize(weight, scale):
    return op.DequantizeLinear(weight, scale, axis=1)


def _dense_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    assert dropout_p == 0.0 and not is_causal and not enable_gqa, "no model here uses these"
    rank = len(query.shape)
    perm = [*range(rank - 2), rank - 1, rank - 2]
    root = scale or 1.0 / math.sqrt(query.shape[-1])
    factor = op.CastLike(op.Constant(value_float=root), query)
    scores = op.MatMul(op.Mul(query, factor), op.Transpose(key, perm=perm))
    if attn_mask is not None:
        scores = op.Where(attn_mask, scores, op.CastLike(op.Constant(value_float=_NEVER), query))
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _sum(self, dim=None, keepdim=False, dtype=None):
    assert dtype is None, "no model here uses it"
    axes = op.Constant(value_ints=list(dim))
    truths = _cast_from_bool(self)
    if truths is None:
        return op.ReduceSum(self, axes, keepdims=keepdim)
    counts = op.ReduceSum(op.Cast(truths, to=ir.DataType.FLOAT), axes, keepdims=keepdim)
    return op.Cast(counts, to=ir.DataType.INT64)  # exact: fp32 counts to 2**24


def _cast_from_bool(value: ir.Value) -> ir.Value | None:
    """The boolean tensor that `value` is a cast of; None if it is something else."""
    producer = value.producer()
    if producer is None or producer.op_type != "Cast":
        return None
    source = producer.inputs[0]
    return source if source is not None and source.dtype == ir.DataType.BOOL else None
