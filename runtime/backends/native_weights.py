"""Weights of a graph as the native library is told of them: addresses, by name."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..onnx_weights import fitting, floats, read_weights
from .native_library import AbiMatrix


class NativeWeights:
    """Those of the file `path`; they stay in memory for as long as this does.

    Methods raise UnavailableError where there are none of that name, or none of that shape.
    """

    def __init__(self, path: Path) -> None:
        self._found, self._graph = read_weights(path), path.stem
        self._kept: list[npt.NDArray] = []

    def array(self, name: str, *shape: int) -> npt.NDArray:
        """As it is, but for a norm's, which may be kept as [C, 1, 1]."""
        found = self._found.get(name)
        if found is not None and math.prod(found.shape[len(shape) :]) == 1:
            found = found.reshape(found.shape[: len(shape)])
        return fitting(found, self._graph, name, shape)

    def floats(self, name: str, *shape: int) -> int:
        """The address of the weights in f32."""
        self._kept.append(floats(self.array(name, *shape)))
        return self._kept[-1].ctypes.data

    def matrix(self, name: str, *shape: int) -> AbiMatrix:
        self._kept.append(np.ascontiguousarray(self.array(name, *shape)))
        return AbiMatrix.of(self._kept[-1])

    def pair(self, name: str, *shape: int) -> tuple[int, int]:
        """The addresses of a norm's or a layer's weight of this shape, and of its bias."""
        return self.floats(f"{name}.weight", *shape), self.floats(f"{name}.bias", shape[0])
