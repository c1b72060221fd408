"""Judges drawn tokens: how far from its place in the cumulative distribution each was drawn.

Two right samplers may disagree where a uniform number falls on the edge between two tokens: sums
of K terms round differently, and there are K edges. So tokens are not compared with tokens, but
with the interval of the cumulative distribution, in fp64, that they stand for. Independent of
training/sampling.py, whose rules it follows.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt

Real = npt.NDArray[np.floating]
Int = npt.NDArray[np.int32]

_SLACK = (0.0, 1e-4, -1e-4)  # of top_p: whether the last token is kept may be a matter of rounding
_TIE = (0.0, 1e-6)  # of the cut: so may whether two tokens are tied


def draw_errors(
    logits_TK: Real, temperature_T: Real, top_k_T: Int, top_p_T: Real, uniform_T: Real, token_T: Int
) -> Real:
    """fp64 [T]: how much the uniform number would have to change for the token to be right.

    0 where it is right; 1 where no number gives it. With temperature 0: how much less likely the
    token is than the likeliest, in logits relative to their magnitude.
    """
    rows = zip(logits_TK, temperature_T, top_k_T, top_p_T, uniform_T, token_T, strict=True)
    return np.array([_draw_error(*row) for row in rows])


def _draw_error(
    logits_K: Real, temperature: float, top_k: int, top_p: float, uniform: float, token: int
) -> float:
    exact_K = logits_K.astype(np.float64)
    if temperature <= 0.0:
        return float((exact_K.max() - exact_K[token]) / max(1.0, np.abs(exact_K).max()))
    scaled_K = exact_K / temperature
    kept = (_kept(scaled_K, top_k, top_p * (1.0 + s), tie) for s, tie in product(_SLACK, _TIE))
    return min(_distance(scaled_K, kept_K, uniform, token) for kept_K in kept)


def _kept(scaled_K: Real, top_k: int, top_p: float, tie: float) -> npt.NDArray[np.bool_]:
    ranked_K = np.sort(scaled_K)[::-1]
    ranked_W = ranked_K[: top_k or None]
    weight_W = np.exp(ranked_W - ranked_W[0])
    before_W = np.cumsum(weight_W) - weight_W
    likeliest = before_W < top_p * weight_W.sum()
    cut = ranked_W[max(int(likeliest.sum()), 1) - 1] if 0.0 < top_p < 1.0 else ranked_W[-1]
    return scaled_K >= cut - tie * max(1.0, abs(cut))


def _distance(scaled_K: Real, kept_K: npt.NDArray[np.bool_], uniform: float, token: int) -> float:
    if not kept_K[token]:
        return 1.0
    weight_K = np.exp(scaled_K - scaled_K.max()) * kept_K
    cdf_K = np.cumsum(weight_K) / weight_K.sum()
    low, high = (cdf_K[token - 1] if token else 0.0), cdf_K[token]
    return float(max(0.0, low - uniform, uniform - high))
