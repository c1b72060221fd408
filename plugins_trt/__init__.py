"""The libraries around the CUDA kernels of 3DNA: where they are. What they do: README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PLUGINS, OPERATORS = "libnuwa_plugins.so", "libnuwa_operators.so"
ROWS = "libnuwa_rows.so"


def library() -> Path:
    """The TensorRT plugins, for a plugin registry to load; FileNotFoundError if not built."""
    return _found(PLUGINS, "TensorRT", "TENSORRT_ROOT")


def operators() -> Path:
    """The custom operators for ONNX Runtime's CUDA provider; FileNotFoundError if not built."""
    return _found(OPERATORS, "ONNX Runtime", "ONNXRUNTIME_ROOT")


def rows() -> Path:
    """The kernels that put rows of a step together; FileNotFoundError if not built."""
    return _found(ROWS)


def register(registry: Any, plugins: Path) -> list[str]:
    """Makes the plugins of a library known to TensorRT's registry; the names of those it has not.

    Once a process: what is known already stays, as TensorRT would refuse it a second time.
    """
    wanted = {"NearbyAttention", "CachedNearbyAttention"}
    if not registered(registry) >= wanted:
        registry.load_library(str(plugins))
    return sorted(wanted - registered(registry))


def registered(registry: Any) -> set[str]:
    """The names of the plugins of 3DNA that a TensorRT registry has."""
    return {each.name for each in registry.all_creators if each.plugin_namespace == "nuwa"}


def _found(name: str, what: str = "", variable: str = "") -> Path:
    for folder in __path__:  # an editable install has them in another folder than its sources
        path = Path(folder) / name
        if path.is_file():
            return path
    headers = f" and the headers of {what}, with {variable} set to their folder" if what else ""
    raise FileNotFoundError(
        f"{name} was not built: install nuwa-runtime where there is nvcc{headers}"
    )
