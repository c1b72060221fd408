"""The libraries around the CUDA kernels of 3DNA: where they are. What they do: README.md."""

from __future__ import annotations

from pathlib import Path

PLUGINS, OPERATORS = "libnuwa_plugins.so", "libnuwa_operators.so"


def library() -> Path:
    """The TensorRT plugins, for a plugin registry to load; FileNotFoundError if not built."""
    return _found(PLUGINS, "TensorRT", "TENSORRT_ROOT")


def operators() -> Path:
    """The custom operators for ONNX Runtime's CUDA provider; FileNotFoundError if not built."""
    return _found(OPERATORS, "ONNX Runtime", "ONNXRUNTIME_ROOT")


def _found(name: str, what: str, variable: str) -> Path:
    for folder in __path__:  # an editable install has them in another folder than its sources
        path = Path(folder) / name
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{name} was not built: install nuwa-runtime where there are nvcc and the headers of "
        f"{what}, with {variable} set to their folder"
    )
