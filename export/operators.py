"""The two `nuwa` operators as ONNX functions of standard operators, and their schemas.

NearbyAttention and CachedNearbyAttention, domain `nuwa`, version 1; spec/reference.py says what
they compute. The bodies are what runs wherever no kernel of that name is registered. Knows nothing
of PyTorch and nothing of the graphs that call the functions, except the sizes that `attach` reads.

How the bodies are laid out, and why:

- Index arithmetic depends on slot, neighbours and write_index alone. All layers of a graph share
  these inputs, so common-subexpression elimination leaves one copy of it.
- The cache, seen as [S * R * heads, head_dim], is gathered straight into [T, heads, n, head_dim]:
  no transpose of gathered rows, and two batched matrix products do the rest. Measured on ONNX
  Runtime's CPU provider (1 thread, T = 1, 8, 20, 32) against GatherND, Einsum, Mul + ReduceSum, the
  Attention operator and gathering [T, n, d]: fastest from T = 8 on, within 5 % at T = 1.
- A row that writes nothing repeats the write of the first row that does, so that shapes are static
  and the order of writes cannot matter. If no row writes, all of them write back what one entry
  already holds. (NonZero would need fewer nodes, but TensorRT-RTX has none.) Attention reads
  ScatterND's output, never its input: with one buffer bound to both, the write is in place.
- What is computed of a row's index stays on the device: ONNX Runtime's CUDA provider has no ArgMax
  of whole numbers, and a number of rows, which a shape gives, is on the host. One copy between the
  two a step would rule out CUDA graphs.
- Gather of rows, not GatherND, which ONNX Runtime's CUDA provider before 1.31 prepares in memory of
  the host that is gone when a recorded step is launched again (microsoft/onnxruntime#32120).
- Sizes that are the same in every call of a file are constants of its bodies (`Sizes`): runtimes
  fold no arithmetic on the shape of a tensor with a dynamic axis.
- Entries of masked neighbours are read as entry 0 and weighed with zero: what a cache holds must be
  finite, also where nothing was written yet.

Legend: T positions in a call, W of them that write, S cache slots, R entries a slot, n neighbours,
H heads, e = head_dim, d = H * e; in the bodies a name's suffix gives its shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import fields as fields_of

import onnx
import onnx.parser
import onnx_ir as ir
from onnx import FunctionProto
from onnx.defs import OpSchema

DOMAIN = "nuwa"
VERSION = 1
NEARBY = "NearbyAttention"
CACHED = "CachedNearbyAttention"
# On every node of these operators, so that TensorRT's parser prefers a plugin of that namespace.
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}

_INPUTS = {
    NEARBY: ("query", "key", "value", "slot", "neighbours", "bias"),
    CACHED: (
        *("query", "key_new", "value_new", "key_cache", "value_cache"),
        *("slot", "write_index", "neighbours", "bias"),
    ),
}
_OUTPUTS = {NEARBY: ("out",), CACHED: ("out", "key_cache_out", "value_cache_out")}
_INDEX_INPUTS = ("slot", "write_index", "neighbours")

_WRITE = """
  no_entry = Constant <value = int32 {0}> ()
  row_0 = Constant <value = int64 {0}> ()
  next = Constant <value = int64 {1}> ()
  to_row = Constant <value_ints = [0]> ()
  to_column = Constant <value_ints = [1]> ()
  skips_T = Less (write_index, no_entry)
  writes_T = Not (skips_T)
  writes_f_T = Cast <to = 1> (writes_T)
  writes_f_T1 = Unsqueeze (writes_f_T, to_column)
  writer_1 = ArgMax <axis = 0, keepdims = 0> (writes_f_T1)
  writer_place_1 = Gather (write_index, writer_1)
  writer_slot_1 = Gather (slot, writer_1)
  none_writes_1 = Less (writer_place_1, no_entry)
  spare_place_1 = Max (writer_place_1, no_entry)
  count_1 = Shape (write_index)
  end_1 = Add (count_1, next)
  end = Squeeze (end_1, to_row)
  own_T = Range (next, end, next)
  after_writer_1 = Add (writer_1, next)
  spare_row_1 = Where (none_writes_1, row_0, after_writer_1)
  source_T = Where (skips_T, spare_row_1, own_T)
  slot_T = Where (skips_T, writer_slot_1, slot)
  place_T = Where (skips_T, spare_place_1, write_index)
  slot_T1 = Unsqueeze (slot_T, to_column)
  place_T1 = Unsqueeze (place_T, to_column)
  target_i32_T2 = Concat <axis = 1> (slot_T1, place_T1)
  target_T2 = Cast <to = 7> (target_i32_T2)
  writer_first_1 = Mul (writer_slot_1, entries_i32)
  kept_1 = Add (writer_first_1, spare_place_1)
  key_entries = Reshape (key_cache, wide_shape)
  value_entries = Reshape (value_cache, wide_shape)
  key_kept_1d = Gather (key_entries, kept_1)
  value_kept_1d = Gather (value_entries, kept_1)
  key_rows_d = Concat <axis = 0> (key_kept_1d, key_new)
  value_rows_d = Concat <axis = 0> (value_kept_1d, value_new)
  key_Td = Gather (key_rows_d, source_T)
  value_Td = Gather (value_rows_d, source_T)
  key_cache_out = ScatterND (key_cache, target_T2, key_Td)
  value_cache_out = ScatterND (value_cache, target_T2, value_Td)
"""

_CONSTANTS = """
  zero = Constant <value = int32 {0}> ()
  one = Constant <value = int32 {1}> ()
  zero_f = Constant <value = float {0}> ()
  one_f = Constant <value = float {1}> ()
  never = Constant <value = float {-1e30}> ()
  axis_0 = Constant <value_ints = [0]> ()
  axis_1 = Constant <value_ints = [1]> ()
  axes_02 = Constant <value_ints = [0, 2]> ()
  axes_12 = Constant <value_ints = [1, 2]> ()
  axes_23 = Constant <value_ints = [2, 3]> ()
  rest_1 = Constant <value_ints = [-1]> ()
  one_1 = Constant <value_ints = [1]> ()
  heads_0 = Constant <value_int: int = @heads> ()
  heads_1 = Unsqueeze (heads_0, axis_0)
  heads_i32 = Cast <to = 6> (heads_0)
"""

_WIDTH = """
  width_1 = Mul (e_1, heads_1)
  wide_shape = Concat <axis = 0> (rest_1, width_1)
"""

_HEAD_DIM_KNOWN = "e_1 = Constant <value_ints = [HEAD_DIM]> ()"
_HEAD_DIM_READ = """
  d_1 = Shape <start = 1, end = 2> (query)
  e_1 = Div (d_1, heads_1)
"""
_ENTRIES_KNOWN = "entries_i32 = Constant <value = int32[1] {ENTRIES}> ()"
_ENTRIES_READ = """
  entries_1 = Shape <start = 1, end = 2> (STORED)
  entries_i32 = Cast <to = 6> (entries_1)
"""

_INDEX = """
  stride = Mul (entries_i32, heads_i32)
  head_H = Range (zero, heads_i32, one)
  head_1H1 = Unsqueeze (head_H, axes_02)
  entry_Tn = Max (neighbours, zero)
  offset_Tn = Mul (entry_Tn, heads_i32)
  base_T = Mul (slot, stride)
  base_T1 = Unsqueeze (base_T, axis_1)
  row_Tn = Add (offset_Tn, base_T1)
  row_T1n = Unsqueeze (row_Tn, axis_1)
  row_THn = Add (row_T1n, head_1H1)
  masked_Tn = Less (neighbours, zero)
  mask_Tn = Where (masked_Tn, never, zero_f)
  mask_T11n = Unsqueeze (mask_Tn, axes_12)
  last_T1 = ReduceMax <keepdims = 1> (neighbours, axis_1)
  empty_T1 = Less (last_T1, zero)
  any_T1 = Where (empty_T1, zero_f, one_f)
  any_T111 = Unsqueeze (any_T1, axes_23)
"""

_BIAS_NEVER = "mask = Identity (mask_T11n)"
_BIAS_ALWAYS = """
  bias_f = Cast <to = 1> (bias)
  bias_H1n = Unsqueeze (bias_f, axis_1)
  mask = Add (mask_T11n, bias_H1n)
"""
# Gemm without its optional third input is zero: an absent bias becomes zeros.
_BIAS_MAYBE = """
  n_1 = Shape <start = 1, end = 2> (neighbours)
  H1 = Concat <axis = 0> (heads_1, one_1)
  _1n = Concat <axis = 0> (one_1, n_1)
  zeros_f_H1 = Expand (zero_f, H1)
  zeros_f_1n = Expand (zero_f, _1n)
  zeros_H1 = CastLike (zeros_f_H1, query)
  zeros_1n = CastLike (zeros_f_1n, query)
  bias_or_zeros = Gemm (zeros_H1, zeros_1n, bias)
  bias_f = Cast <to = 1> (bias_or_zeros)
  bias_H1n = Unsqueeze (bias_f, axis_1)
  mask = Add (mask_T11n, bias_H1n)
"""

_ATTEND = """
  e_f = Cast <to = 1> (e_1)
  root = Sqrt (e_f)
  scale = Reciprocal (root)
  query_shape = Concat <axis = 0> (rest_1, heads_1, one_1, e_1)
  rows_shape = Concat <axis = 0> (rest_1, e_1)
  query_f = Cast <to = 1> (query)
  query_Td = Mul (query_f, scale)
  query_TH1e = Reshape (query_Td, query_shape)
  key_rows = Reshape (KEY, rows_shape)
  value_rows = Reshape (VALUE, rows_shape)
  key_stored = Gather (key_rows, row_THn)
  value_stored = Gather (value_rows, row_THn)
  key_THne = Cast <to = 1> (key_stored)
  value_THne = Cast <to = 1> (value_stored)
  key_THen = Transpose <perm = [0, 1, 3, 2]> (key_THne)
  product_TH1n = MatMul (query_TH1e, key_THen)
  scores_TH1n = Add (product_TH1n, mask)
  softmax_TH1n = Softmax <axis = -1> (scores_TH1n)
  weights_TH1n = Mul (softmax_TH1n, any_T111)
  mean_TH1e = MatMul (weights_TH1n, value_THne)
  out_f = Reshape (mean_TH1e, wide_shape)
  out = CastLike (out_f, query)
"""


@dataclass(frozen=True)
class Sizes:
    """What all calls of one function in a file have in common; None where they differ.

    head_dim: e; entries: R; bias: whether a bias is given.
    """

    head_dim: int | None = None
    entries: int | None = None
    bias: bool | None = None


def function(name: str, opset: int, sizes: Sizes = Sizes()) -> FunctionProto:  # noqa: B008
    """The function `name`, its body in the standard operators of `opset` (18 or later).

    A body made for some `sizes` is right for calls of those sizes only; one made for calls without
    a bias has no such input, as TensorRT takes calls only that give a function all its inputs.
    """
    inputs = _INPUTS[name][:-1] if sizes.bias is False else _INPUTS[name]
    attributes = ", ".join(f'{key}: string = "{value}"' for key, value in PLUGIN_ATTRIBUTES.items())
    text = f"""<opset_import: ["" : {opset}], domain: "{DOMAIN}">
{name} <heads, {attributes}> ({", ".join(inputs)}) => ({", ".join(_OUTPUTS[name])}) {{
{_body(name, sizes)}
}}"""
    return onnx.parser.parse_function(text)


def _body(name: str, sizes: Sizes) -> str:
    head_dim = _HEAD_DIM_READ if sizes.head_dim is None else _HEAD_DIM_KNOWN
    entries = _ENTRIES_READ if sizes.entries is None else _ENTRIES_KNOWN
    bias = {None: _BIAS_MAYBE, True: _BIAS_ALWAYS, False: _BIAS_NEVER}[sizes.bias]
    write = _WRITE if name == CACHED else ""
    body = "\n".join([_CONSTANTS, head_dim, _WIDTH, entries, write, _INDEX, bias, _ATTEND])
    if name == CACHED:
        stored, key, value = "key_cache", "key_cache_out", "value_cache_out"
    else:
        stored, key, value = "key", "key", "value"
    words = {"HEAD_DIM": str(sizes.head_dim), "ENTRIES": str(sizes.entries)}
    words |= {"STORED": stored, "KEY": key, "VALUE": value}
    for word, meaning in words.items():
        body = body.replace(word, meaning)
    return body


def schemas() -> dict[str, OpSchema]:
    """The operators' schemas by name; T is the storage type, indices are int32."""
    return {name: _schema(name) for name in (NEARBY, CACHED)}


def _schema(name: str) -> OpSchema:
    def parameter(formal: str) -> OpSchema.FormalParameter:
        kind = "tensor(int32)" if formal in _INDEX_INPUTS else "T"
        optional = OpSchema.FormalParameterOption.Optional
        single = OpSchema.FormalParameterOption.Single
        option = optional if formal == "bias" else single
        return OpSchema.FormalParameter(formal, kind, param_option=option)

    strings = [
        OpSchema.Attribute(key, onnx.helper.make_attribute(key, value))
        for key, value in PLUGIN_ATTRIBUTES.items()
    ]
    return OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[parameter(formal) for formal in _INPUTS[name]],
        outputs=[parameter(formal) for formal in _OUTPUTS[name]],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
        attributes=[OpSchema.Attribute("heads", OpSchema.AttrType.INT, required=True), *strings],
    )


def attach(model: ir.Model) -> None:
    """Adds to `model`, in place, the functions that its nodes call, made for those calls."""
    nodes = operator_nodes(model)
    for name in (NEARBY, CACHED):
        calls = [node for node in nodes if node.op_type == name]
        if calls:
            proto = function(name, model.opset_imports[""], common_sizes(calls))
            body = ir.serde.deserialize_function(proto)
            model.functions[body.identifier()] = body
    if nodes:
        model.opset_imports[DOMAIN] = VERSION


def operator_nodes(model: ir.Model) -> list[ir.Node]:
    """The graph's nodes of domain `nuwa`, in order."""
    return [node for node in model.graph if node.domain == DOMAIN]


def common_sizes(calls: Sequence[ir.Node]) -> Sizes:
    """What these calls of one operator have in common."""
    found = [_sizes(node) for node in calls]
    fields = {field.name: {getattr(s, field.name) for s in found} for field in fields_of(Sizes)}
    return Sizes(**{name: one.pop() if len(one) == 1 else None for name, one in fields.items()})


def _sizes(node: ir.Node) -> Sizes:
    given = dict(zip(_INPUTS[node.op_type], node.inputs, strict=False))

    def size(formal: str, axis: int) -> int | None:
        shape = given[formal].shape
        return shape[axis] if shape is not None and isinstance(shape[axis], int) else None

    width, heads = size("query", 1), node.attributes["heads"].as_int()
    stored = "key_cache" if node.op_type == CACHED else "key"
    return Sizes(
        head_dim=None if width is None else width // heads,
        entries=size(stored, 1),
        bias=given.get("bias") is not None,
    )
