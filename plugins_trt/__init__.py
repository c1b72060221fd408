"""The TensorRT plugin library: where it is. What it does: README.md beside this file."""

from __future__ import annotations

from pathlib import Path

NAME = "libnuwa_plugins.so"


def library() -> Path:
    """The library that a plugin registry can load; FileNotFoundError if it was not built."""
    for folder in __path__:  # an editable install has it in another folder than its sources
        path = Path(folder) / NAME
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{NAME} was not built: install nuwa-runtime where there are nvcc and TensorRT's headers, "
        f"with TENSORRT_ROOT set to the folder of a TensorRT"
    )
