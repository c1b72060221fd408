"""plugins_trt/attention_cpu.cc, compiled and called: the arithmetic of the GPU kernels."""

from __future__ import annotations

import ctypes
import subprocess
from ctypes import POINTER, Structure, byref, c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path

import numpy as np

from .needs import compiler

FOLDER = Path(__file__).parents[2] / "plugins_trt"
STORAGES = ("fp32", "fp16", "bf16")
_POINTERS = ("query", "key", "value", "slot", "neighbours", "bias")
_WRITES = ("key_new", "value_new", "write_index")


class Call(Structure):
    """AttentionCall of attention_call.h."""

    _fields_ = [
        *((name, c_int32) for name in ("storage", "rows", "slots", "entries", "n", "heads")),
        ("head_dim", c_int32),
        *((name, c_void_p) for name in (*_POINTERS, *_WRITES, "out")),
    ]


class NativeAttention:
    def __init__(self, folder: Path) -> None:
        path = folder / "libnuwa_attention_cpu.so"
        command = [
            compiler(),
            "-std=c++17",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-shared",
            "-fPIC",
        ]
        subprocess.run([*command, "-o", path, FOLDER / "attention_cpu.cc"], check=True, timeout=120)
        self._library = ctypes.CDLL(str(path))
        self._library.nuwa_attend_on_cpu.restype = c_char_p
        self._library.nuwa_attend_on_cpu.argtypes = [POINTER(Call)]
        self._library.nuwa_convert.argtypes = [c_int32, c_int64, c_void_p, c_void_p, c_void_p]

    def stored(self, values: np.ndarray, storage: str) -> tuple[np.ndarray, np.ndarray]:
        """f32 values as they are stored, and read back as f32."""
        values = np.ascontiguousarray(values, np.float32)
        if storage == "fp32":
            return values.copy(), values.copy()
        bits, back = np.empty(values.shape, np.uint16), np.empty_like(values)
        self._library.nuwa_convert(
            STORAGES.index(storage), values.size, *(a.ctypes.data for a in (values, bits, back))
        )
        return bits, back

    def __call__(self, storage: str, *, heads: int, **tensors: np.ndarray | None) -> np.ndarray:
        """Runs a call on stored tensors, which it changes; ValueError if it cannot."""
        query, key, neighbours = tensors["query"], tensors["key"], tensors["neighbours"]
        out = np.full_like(query, 7)
        call = Call(
            storage=STORAGES.index(storage),
            rows=len(query),
            slots=key.shape[0],
            entries=key.shape[1],
            n=neighbours.shape[1],
            heads=heads,
            head_dim=query.shape[1] // heads,
            out=out.ctypes.data,
        )
        for name in (*_POINTERS, *_WRITES):
            array = tensors.get(name)
            assert array is None or array.flags.c_contiguous
            setattr(call, name, None if array is None else array.ctypes.data)
        reason = self._library.nuwa_attend_on_cpu(byref(call))
        if reason is not None:
            raise ValueError(reason.decode())
        return out
