"""The two `nuwa` operators as ONNX functions of standard operators, and their schemas.

NearbyAttention and CachedNearbyAttention, domain `nuwa`, version 1; spec/reference.py says what
they compute. The bodies are what runs wherever no kernel of that name is registered. Knows nothing
of PyTorch and nothing of the graphs that call the functions.

How the bodies are laid out, and why:

- Index arithmetic depends on slot, neighbours and write_index alone. All layers of a graph share
  these inputs, so common-subexpression elimination leaves one copy of it.
- The cache, seen as [S * R * heads, head_dim], is gathered straight into [T, heads, n, head_dim]:
  no transpose of gathered rows, and two batched matrix products do the rest. Measured on ONNX
  Runtime's CPU provider against Einsum, Mul + ReduceSum, the Attention operator and gathering
  [T, n, d]: fastest or equal at every T.
- A row that writes nothing repeats the write of the first row that does, so that every shape is
  static and the order of writes cannot matter. If no row writes, all of them write back what entry
  0 of the first row's slot already holds.
- Attention reads ScatterND's output, never its input: with one buffer bound to both, the write is
  in place.
- `Gemm` without its optional third input is zero: this is how an absent bias becomes zeros.
- Entries of masked neighbours are read as entry 0 and weighed with zero: what a cache holds must be
  finite, also where nothing was written yet.

Legend: T positions in a call, S cache slots, R entries a slot, n neighbours, H heads, e = head_dim,
d = H * e; in the bodies a name's suffix gives its shape.
"""

from __future__ import annotations

import onnx
import onnx.parser
from onnx import FunctionProto, ModelProto, NodeProto
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
  no_write = Constant <value = int32 {0}> ()
  first_axis = Constant <value_ints = [0]> ()
  last_axis = Constant <value_ints = [1]> ()
  one_row = Constant <value_ints = [1]> ()
  skips_T = Less (write_index, no_write)
  writes_T = Not (skips_T)
  writes_i32_T = Cast <to = 6> (writes_T)
  first_writer_1 = ArgMax <axis = 0, keepdims = 1> (writes_i32_T)
  count = Shape (write_index)
  first_write_1 = Gather (write_index, first_writer_1)
  first_slot_1 = Gather (slot, first_writer_1)
  none_writes_1 = Less (first_write_1, no_write)
  spare_row_1 = Where (none_writes_1, count, first_writer_1)
  spare_entry_1 = Max (first_write_1, no_write)
  start = Constant <value = int64 {0}> ()
  step = Constant <value = int64 {1}> ()
  no_axes = Constant <value_ints = [0]> ()
  count_0 = Squeeze (count, no_axes)
  own_row_T = Range (start, count_0, step)
  source_T = Where (skips_T, spare_row_1, own_row_T)
  to_slot_T = Where (skips_T, first_slot_1, slot)
  to_entry_T = Where (skips_T, spare_entry_1, write_index)
  to_slot_T1 = Unsqueeze (to_slot_T, last_axis)
  to_entry_T1 = Unsqueeze (to_entry_T, last_axis)
  to_i32_T2 = Concat <axis = 1> (to_slot_T1, to_entry_T1)
  to_T2 = Cast <to = 7> (to_i32_T2)
  kept_i32_2 = Concat <axis = 0> (first_slot_1, spare_entry_1)
  kept_12 = Unsqueeze (kept_i32_2, first_axis)
  kept_i64_12 = Cast <to = 7> (kept_12)
  kept_key_1d = GatherND (key_cache, kept_i64_12)
  key_rows = Concat <axis = 0> (key_new, kept_key_1d)
  key_Td = Gather (key_rows, source_T)
  key_cache_out = ScatterND (key_cache, to_T2, key_Td)
  kept_value_1d = GatherND (value_cache, kept_i64_12)
  value_rows = Concat <axis = 0> (value_new, kept_value_1d)
  value_Td = Gather (value_rows, source_T)
  value_cache_out = ScatterND (value_cache, to_T2, value_Td)
"""

_ATTEND = """
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
  rest = Constant <value_ints = [-1]> ()
  single = Constant <value_ints = [1]> ()

  heads_0 = Constant <value_int: int = @heads> ()
  heads_1 = Unsqueeze (heads_0, axis_0)
  heads_i32 = Cast <to = 6> (heads_0)
  width_1 = Shape <start = 1, end = 2> (query)
  size_1 = Div (width_1, heads_1)
  rows_shape = Concat <axis = 0> (rest, size_1)
  query_shape = Concat <axis = 0> (rest, heads_1, single, size_1)
  out_shape = Concat <axis = 0> (rest, width_1)
  size_f = Cast <to = 1> (size_1)
  root = Sqrt (size_f)
  scale = Reciprocal (root)

  entries_1 = Shape <start = 1, end = 2> (KEY)
  entries_i32 = Cast <to = 6> (entries_1)
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

  columns = Shape <start = 1, end = 2> (neighbours)
  zeros_H1_shape = Concat <axis = 0> (heads_1, single)
  zeros_1n_shape = Concat <axis = 0> (single, columns)
  zeros_f_H1 = Expand (zero_f, zeros_H1_shape)
  zeros_f_1n = Expand (zero_f, zeros_1n_shape)
  zeros_H1 = CastLike (zeros_f_H1, query)
  zeros_1n = CastLike (zeros_f_1n, query)
  given_Hn = Gemm (zeros_H1, zeros_1n, bias)
  bias_Hn = Cast <to = 1> (given_Hn)
  bias_H1n = Unsqueeze (bias_Hn, axis_1)
  bias_TH1n = Add (mask_T11n, bias_H1n)

  query_f = Cast <to = 1> (query)
  query_TH1e = Reshape (query_f, query_shape)
  key_rows_e = Reshape (KEY, rows_shape)
  value_rows_e = Reshape (VALUE, rows_shape)
  key_stored = Gather (key_rows_e, row_THn)
  value_stored = Gather (value_rows_e, row_THn)
  key_THne = Cast <to = 1> (key_stored)
  value_THne = Cast <to = 1> (value_stored)
  key_THen = Transpose <perm = [0, 1, 3, 2]> (key_THne)
  product_TH1n = MatMul (query_TH1e, key_THen)
  scaled_TH1n = Mul (product_TH1n, scale)
  scores_TH1n = Add (scaled_TH1n, bias_TH1n)
  weights_TH1n = Softmax <axis = -1> (scores_TH1n)
  mean_TH1e = MatMul (weights_TH1n, value_THne)
  out_TH1e = Mul (mean_TH1e, any_T111)
  out_f = Reshape (out_TH1e, out_shape)
  out = CastLike (out_f, query)
"""


def functions(opset: int) -> tuple[FunctionProto, FunctionProto]:
    """The two functions, bodies in the standard operators of `opset` (18 or later)."""
    attend = _ATTEND.replace("KEY", "key").replace("VALUE", "value")
    attend_cached = _ATTEND.replace("KEY", "key_cache_out").replace("VALUE", "value_cache_out")
    return _function(NEARBY, attend, opset), _function(CACHED, _WRITE + attend_cached, opset)


def _function(name: str, body: str, opset: int) -> FunctionProto:
    attributes = ", ".join(f'{key}: string = "{value}"' for key, value in PLUGIN_ATTRIBUTES.items())
    text = f"""<opset_import: ["" : {opset}], domain: "{DOMAIN}">
{name} <heads, {attributes}> ({", ".join(_INPUTS[name])}) => ({", ".join(_OUTPUTS[name])}) {{
{body}
}}"""
    return onnx.parser.parse_function(text)


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


def attach(model: ModelProto) -> None:
    """Adds to `model`, in place, the functions that its nodes call."""
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    called = {node.op_type for node in operator_nodes(model)}
    model.functions.extend(f for f in functions(opset) if f.name in called)
    if called and all(entry.domain != DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))


def operator_nodes(model: ModelProto) -> list[NodeProto]:
    """The graph's nodes of domain `nuwa`."""
    return [node for node in model.graph.node if node.domain == DOMAIN]
