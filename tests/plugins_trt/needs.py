"""What the tests of this folder need of a machine, and what happens where it is not there."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
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


def no_engines(runtime: str) -> str:
    """Why a runtime can have no engines for this machine's GPU; "" if it can.

    Imports it: two TensorRTs do not go into one process.
    """
    from nuwa.export import engines
    from nuwa.spec.engines import MODULES, TENSORRT_RTX

    if importlib.util.find_spec(MODULES[runtime]) is None:
        return f"{runtime} is not installed"
    if runtime == TENSORRT_RTX:  # which leaves some GPUs out, the others being TensorRT's own
        target, _ = engines._own_gpu()
        try:
            engines._capability(engines._module(runtime), target)
        except engines.EngineError as error:
            return str(error)
    return ""


@functools.cache
def gpus() -> int:
    """How many NVIDIA GPUs there are."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value
