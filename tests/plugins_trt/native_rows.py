"""plugins_trt/rows_cpu.cc, compiled: what the kernels of rows.cu do, on a CPU."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

from .needs import compiler

FOLDER = Path(__file__).parents[2] / "plugins_trt"


@functools.cache
def rows_library() -> Path:
    """Skips the test where there is no C++ compiler."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "libnuwa_rows_cpu.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(
        [compiler(), *flags, "-o", path, FOLDER / "rows_cpu.cc"], check=True, timeout=120
    )
    return path
