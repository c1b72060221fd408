"""Uniform numbers keyed by (seed, sample, position): Philox4x32-10 (Salmon et al., SC 2011).

Counter-based, so a position's number does not depend on which positions were drawn before it: any
schedule, batch or backend sees the same draw.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(
    counter: npt.NDArray[np.uint32], key: tuple[int, int], rounds: int = 10
) -> npt.NDArray[np.uint32]:
    """uint32 [n, 4] counters and a 2-word key -> uint32 [n, 4] random words."""
    c0, c1, c2, c3 = (counter[:, k].astype(np.uint64) for k in range(4))
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> _HALF) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _HALF) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniforms(seed: int, sample: int, positions: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
    """float32 [n] in [0, 1): one number for each position (a place in the token volume).

    seed: 0 .. 2**64 - 1; sample: 0 .. 2**32 - 1, which of several samples of one seed.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} is not in [0, 2**64 - 1]")
    if not 0 <= sample < 2**32:
        raise ValueError(f"sample {sample} is not in [0, 2**32 - 1]")
    counter = np.zeros((len(positions), 4), np.uint32)
    counter[:, 0] = positions
    counter[:, 1] = sample
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))[:, 0]
    # 24 bits: every value is exact in fp32 and below 1.
    return ((words >> np.uint32(8)).astype(np.float64) * 2.0**-24).astype(np.float32)
