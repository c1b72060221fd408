"""How fast a GPU moves bytes and multiplies matrices, as rates.py says it of a processor.

Copies are CUDA's own, of which many are put into a stream before it is waited for; products are one
ONNX graph on ONNX Runtime's CUDA provider, bound to memory of the GPU. Neither has a clock on the
GPU: there is enough work between two looks at the host's for launching to be hidden behind it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backends.device_memory import CudaMemory, DeviceMemory
from ..errors import UnavailableError
from .rates import (
    MANY_ROWS,
    REPEATS,
    Measurement,
    Rates,
    Shapes,
    few_of,
    timed_in_bulk,
)

COPIED = 1 << 28  # bytes, more than any cache
FRUGAL_COPIED = 1 << 25
# Numbers as numpy stores them, and their types in ONNX.
STORAGE = {"fp32": (np.float32, 1), "fp16": (np.float16, 10), "bf16": (np.uint16, 16)}


def measure(
    shapes: Shapes,
    rows: Iterable[int],
    *,
    precision: str,
    working_set: int,
    tf32: bool = False,
    frugal: bool = False,
    repeats: int = REPEATS,
    device: str = "cuda",
    index: int = 0,
    memory: DeviceMemory | None = None,
) -> Rates:
    """All rates of a GPU, products in the bundle's precision unless that is int8.

    rows: of its steps, alone and shared; the greatest of them, and all doublings of MANY_ROWS below
    it, are among those that are timed. working_set: bytes of weights that a step reads, which a
    cache may hold. tf32: whether the backend may round fp32 to TF32, which is faster.

    UnavailableError without cuda-python or a GPU. Without the package onnx, and where the graph
    does not run, there are no products. device, memory: "cpu" and HostMemory do it on the host.
    """
    memory = memory or CudaMemory(index)
    copied = FRUGAL_COPIED if frugal else COPIED
    copy = copy_bandwidth(memory, copied, repeats)
    near = max(1, min(working_set // 2, copied))  # source and target are as much as is read
    read = copy_bandwidth(memory, near, repeats)
    products: dict[int, Measurement] = {}
    reason = ""
    try:
        multiply = _Products(shapes, precision, tf32, device, index)
        for size in _sizes(rows):
            products[size] = multiply.rate(size, repeats)
        read = max(read, *map(multiply.read, products.items()), key=lambda each: each.best)
    except Exception as error:  # ONNX Runtime's are of no common kind; the bandwidth stands
        products, reason = {}, f"products could not be measured: {error}".splitlines()[0]
    about: dict[str, Any] = {
        "copied_bytes": copied,
        "working_set_bytes": working_set,
        "gemm_by": reason or "ONNX Runtime, CUDA",
    }
    return Rates(copy, products, read, precision=precision if products else "none", about=about)


def _sizes(rows: Iterable[int]) -> list[int]:
    """Numbers of rows whose products are timed: more are faster, until all of the GPU works."""
    few, many = few_of(rows), [MANY_ROWS]
    while 2 * many[-1] < few[-1]:
        many.append(2 * many[-1])
    return sorted({*few, *many})


def copy_bandwidth(memory: DeviceMemory, size: int, repeats: int = REPEATS) -> Measurement:
    """Bytes a second, read and written, of copies within the GPU."""
    held: list[int] = []
    try:
        held += [memory.allocate(size) for _ in range(2)]
        source, target = held

        def copy(times: int) -> None:
            for _ in range(times):
                memory.copy(source, target, size)
            memory.wait()

        return Measurement.of(2 * size, timed_in_bulk(copy, repeats))
    finally:
        for address in held:
            memory.free(address)


class _Products:
    """All matrix products of a step as one graph, whose inputs and outputs stay on the device."""

    def __init__(self, shapes: Shapes, precision: str, tf32: bool, device: str, index: int) -> None:
        import onnxruntime as ort

        if precision not in STORAGE:
            raise UnavailableError(f"there is no graph of {precision}")
        self._precision, self._device, self._index = precision, device, index
        self._flops = 2.0 * sum(inputs * outputs for inputs, outputs in shapes)
        self._widths = sorted({inputs for inputs, _ in shapes})
        self._outputs = len(shapes)
        providers: list[Any] = ["CPUExecutionProvider"]
        if device == "cuda":
            options = {"device_id": index, "use_tf32": int(tf32)}
            providers.insert(0, ("CUDAExecutionProvider", options))
        settings = ort.SessionOptions()
        settings.log_severity_level = 3  # errors
        self._ort = ort
        self._session = ort.InferenceSession(
            _graph(shapes, precision), settings, providers=providers
        )
        if device == "cuda" and "CUDA" not in self._session.get_providers()[0]:
            raise UnavailableError("ONNX Runtime has no CUDA here")

    def rate(self, rows: int, repeats: int) -> Measurement:
        """Floating-point operations a second."""
        binding, held = self._session.io_binding(), []
        for width in self._widths:
            ones = _filled(1.0, (rows, width), self._precision)
            given = self._ort.OrtValue.ortvalue_from_numpy(ones, self._device, self._index)
            place = self._device, self._index, STORAGE[self._precision][1], ones.shape
            binding.bind_input(f"x{width}", *place, given.data_ptr())
            held.append(given)
        for index in range(self._outputs):
            binding.bind_output(f"y{index}", self._device, self._index)
        options = self._ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def multiply(times: int) -> None:
            for _ in range(times):
                self._session.run_with_iobinding(binding, options)
            binding.synchronize_outputs()

        return Measurement.of(rows * self._flops, timed_in_bulk(multiply, repeats))

    def read(self, measured: tuple[int, Measurement]) -> Measurement:
        """Bytes of weights a second of such a product (rows, its rate), each read once."""
        rows, rate = measured
        size = np.dtype(STORAGE[self._precision][0]).itemsize / (2.0 * rows)
        return replace(rate, value=rate.value * size, best=rate.best * size)


def _filled(number: float, shape: tuple[int, ...], precision: str) -> npt.NDArray[Any]:
    """Of bf16, the upper halves of fp32."""
    if precision == "bf16":
        return np.full(shape, np.float32(number).view(np.uint32) >> 16, np.uint16)
    return np.full(shape, number, STORAGE[precision][0])


def _graph(shapes: Shapes, precision: str) -> bytes:
    """Products x[inputs] w -> y, each with weights of its own."""
    onnx = importlib.import_module("onnx")
    helper, kind = onnx.helper, STORAGE[precision][1]
    weights, nodes, outputs = [], [], []
    for index, (width, columns) in enumerate(shapes):
        weight = _filled(2.0**-8, (width, columns), precision)
        raw = weight.tobytes()
        weights.append(helper.make_tensor(f"w{index}", kind, weight.shape, raw, raw=True))
        nodes.append(helper.make_node("MatMul", [f"x{width}", f"w{index}"], [f"y{index}"]))
        outputs.append(helper.make_tensor_value_info(f"y{index}", kind, ["T", columns]))
    inputs = [
        helper.make_tensor_value_info(f"x{width}", kind, ["T", width])
        for width in sorted({width for width, _ in shapes})
    ]
    graph = helper.make_graph(nodes, "products", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())
