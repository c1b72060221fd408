"""The library of rows.cu is built; what its kernels do is in tests/runtime/test_device_rows.py."""

from __future__ import annotations

import ctypes
import subprocess

from .native_rows import rows_library
from .plugin_harness import built, visible


def test_the_kernels_are_built_and_are_of_the_cpus_version():
    library, here = built("nuwa_rows", "90"), ctypes.CDLL(str(rows_library()))
    assert visible(library) == visible(rows_library())
    there = ctypes.CDLL(str(library))
    for what in ("abi", "lane_size", "call_size"):
        name = f"nuwa_rows_{what}"
        assert getattr(there, name)() == getattr(here, name)() > 0
    there.nuwa_rows_unusable.restype = ctypes.c_char_p
    if subprocess.run(["which", "nvidia-smi"], capture_output=True, check=False).returncode:
        assert there.nuwa_rows_unusable(0), "without a GPU it says why"
