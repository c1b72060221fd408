"""What the tests of this folder need of a machine, and what happens where it is not there."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
from typing import NoReturn

import pytest

# Whether to fail for want of what can be installed. Set by conftest.py where tests for GPUs were
# asked for, which are green for the wrong reason if they did not run.
required = False


def asks_for_gpu(expression: str) -> bool:
    """Whether pytest's option -m asks for the tests that are marked gpu."""
    return re.search(r"(?<!not )\bgpu\b", expression) is not None


def lacking(what: str) -> NoReturn:
    """Skips the test, or RuntimeError where it is required."""
    if required:
        raise RuntimeError(f"{what}; it can be installed, and -m gpu asks for what needs it")
    pytest.skip(what)


def compiler() -> str:
    """A C++ compiler."""
    found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    return found or lacking("no C++ compiler")


def tools(*names: str) -> None:
    """Programs on PATH."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        lacking(f"no {' and no '.join(missing)}, so no CUDA libraries")


@functools.cache
def gpus() -> int:
    """How many NVIDIA GPUs there are."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value
