"""Where bf16 is faster than fp32: on processors that multiply in it. Others emulate it, slowly."""

from __future__ import annotations

import functools

import torch


@functools.cache
def fast_bf16(device_type: str) -> bool:
    """Whether this machine's "cpu" or "cuda" has bf16 products of its own."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    cpu = torch.cpu
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
