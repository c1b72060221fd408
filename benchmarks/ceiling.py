"""What a step must do at least: its matrix products alone, and its bytes, at this machine's rates.

The products run as one ONNX graph on ONNX Runtime, in fp32, or int8 with sums in int32; or in bf16,
which it does not multiply, by oneDNN as PyTorch brings it, with packed weights. Each has weights of
its own, so that they come from where a step finds them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import onnxruntime as ort

from nuwa.runtime.bench.card import Shapes, products, step_flops, weights_bytes
from nuwa.spec.config import ModelConfig

SHORT_TEXT = 16  # tokens

Calls = Callable[[int], Callable[[], object]]  # rows -> the products of so many

__all__ = [
    "Products",
    "copy_bandwidth",
    "products",
    "step_bytes",
    "step_flops",
    "text_entries",
    "timed",
    "weights_bytes",
]


def text_entries(model: ModelConfig, used: int) -> int:
    """Entries of a text of `used` tokens that a row sees: padding too where it is not masked."""
    return used if model.text.mask_padding else model.text.length


def step_bytes(model: ModelConfig, rows: int, weight_bytes: int = 4) -> float:
    """Bytes that a step reads and writes: weights once; keys, values, text by row, in fp32."""
    decoder = model.decoder
    weights = weights_bytes(model, weight_bytes)
    seen = decoder.neighbour_count + text_entries(model, SHORT_TEXT)
    return weights + rows * decoder.layers * 2 * (seen + 1) * decoder.width * 4


class Products:
    """All matrix products of a step, for any number of rows."""

    def __init__(self, shapes: Shapes, threads: int, precision: str = "fp32") -> None:
        self.library = "onednn" if precision == "bf16" else "onnxruntime"
        of = _of_onednn if precision == "bf16" else _of_onnxruntime
        self._calls = of(shapes, threads, precision)

    def seconds(self, rows: int) -> float:
        """Median time of the products for so many rows."""
        return timed(self._calls(rows))


def copy_bandwidth(size: int, threads: int) -> float:
    """Bytes a second, read and written, of copying `size` bytes; numpy copies on one core."""
    from concurrent.futures import ThreadPoolExecutor

    parts = [np.ones(size // threads, np.uint8) for _ in range(threads)]
    targets = [np.empty_like(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        seconds = timed(lambda: list(pool.map(np.copyto, targets, parts)))
    return 2 * size / seconds


def timed(call: Callable[[], object], repeats: int = 15) -> float:
    """Median seconds of a call, after two to warm up."""
    spent = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        call()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[2:])


def _of_onnxruntime(shapes: Shapes, threads: int, precision: str) -> Calls:
    dtype = np.int8 if precision == "int8" else np.float32
    session = _session(shapes, threads, dtype)
    widths = {inputs for inputs, _ in shapes}

    def of(rows: int) -> Callable[[], object]:
        feeds = {f"x{width}": np.ones((rows, width), dtype) for width in widths}
        return lambda: session.run(None, feeds)

    return of


def _of_onednn(shapes: Shapes, threads: int, precision: str) -> Calls:
    import torch

    torch.set_num_threads(threads)
    dtype = {"bf16": torch.bfloat16}[precision]
    weights = [torch.randn(outputs, inputs, dtype=dtype) for inputs, outputs in shapes]

    def of(rows: int) -> Callable[[], object]:
        # What torch.compile makes of linear layers with frozen weights.
        pack, multiply = (
            torch.ops.mkldnn._reorder_linear_weight,
            torch.ops.mkldnn._linear_pointwise,
        )
        given = {inputs: torch.ones(rows, inputs, dtype=dtype) for inputs, _ in shapes}
        packed = [(given[weight.shape[1]], pack(weight, rows)) for weight in weights]
        return lambda: [multiply(x, weight, None, "none", [], "") for x, weight in packed]

    return of


def _session(shapes: Shapes, threads: int, dtype: type) -> ort.InferenceSession:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    whole = dtype is np.int8
    product, given, made = (
        ("MatMulInteger", TensorProto.INT8, TensorProto.INT32)
        if whole
        else ("MatMul", TensorProto.FLOAT, TensorProto.FLOAT)
    )
    draw = np.random.default_rng(0)
    nodes, weights, outputs = [], [], []
    for index, (rows, columns) in enumerate(shapes):
        weight = draw.standard_normal((rows, columns)) * (40 if whole else 1)
        weights.append(numpy_helper.from_array(weight.astype(dtype), f"w{index}"))
        nodes.append(helper.make_node(product, [f"x{rows}", f"w{index}"], [f"y{index}"]))
        nodes.append(helper.make_node("ReduceMax", [f"y{index}"], [f"m{index}"], keepdims=0))
        outputs.append(helper.make_tensor_value_info(f"m{index}", made, []))
    inputs = [
        helper.make_tensor_value_info(f"x{rows}", given, ["T", rows])
        for rows in sorted({rows for rows, _ in shapes})
    ]
    graph = helper.make_graph(nodes, "products", inputs, outputs, weights)
    opset = [helper.make_opsetid("", 20)]
    proto = helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.checker.check_model(proto)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    return ort.InferenceSession(
        proto.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
