"""Draws tokens from logits given one uniform number per row; exported as part of `decoder_step`.

Per-row parameters, mixed freely in a batch. No random state: the caller brings the uniforms.

Probabilities are summed as whole numbers: sums of floats depend on how a runtime adds them up, and
with K terms that is enough to draw another token now and then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nuwa.spec.sampling import sort_width

__all__ = ["guide", "sample", "sort_width"]

# The likeliest token weighs 2**24, as fine as fp32 and as uniform numbers are. With K <= 2**14
# codes a sum times a uniform number stays within 2**62.
_ONE = 1 << 24


def guide(logits_TK: Tensor, guidance_T: Tensor, unconditional_row_T: Tensor) -> Tensor:
    """Classifier-free guidance: u + g * (c - u), u being the logits of another row of the call.

    A row that names itself as its unconditional one keeps its logits exactly.
    """
    # Indexing with a tensor would be exported as GatherND: see export/operators.py.
    unconditional_TK = logits_TK.index_select(0, unconditional_row_T)
    return unconditional_TK + guidance_T[:, None] * (logits_TK - unconditional_TK)


def sample(
    logits_TK: Tensor,
    temperature_T: Tensor,
    top_k_T: Tensor,
    top_p_T: Tensor,
    uniform_T: Tensor,
    ranks_W: Tensor,
) -> Tensor:
    """int32 [T]: inverse CDF, in vocabulary order, of the filtered distribution of each row.

    temperature 0 is argmax; top_k 0 keeps all; top_p 1 keeps all, else the least set of likeliest
    tokens whose probability reaches it. ranks is arange(W): how many of the likeliest tokens are
    sorted to find the cut-offs; W must be K if any row has top_p < 1 without a top_k, else at
    least the largest top_k, else 1. Tokens tied with the last kept one are kept too. -1 where a
    row's logits are not all finite numbers.
    """
    greedy_T = logits_TK.argmax(dim=-1)
    scaled_TK = logits_TK / torch.where(temperature_T > 0, temperature_T, 1.0)[:, None]
    best_TW = scaled_TK.topk(ranks_W.shape[0], dim=-1).values
    highest_T1 = best_TW[:, :1]

    within_k_TW = (top_k_T == 0)[:, None] | (ranks_W[None, :] < top_k_T[:, None])
    weight_TW = torch.where(within_k_TW, _weights(best_TW, highest_T1), 0)
    running_TW = weight_TW.cumsum(dim=-1)
    before_TW = (running_TW - weight_TW) * _ONE
    within_p_TW = before_TW < _whole(top_p_T)[:, None] * running_TW[:, -1:]
    kept_T1 = (within_k_TW & within_p_TW).sum(dim=-1, keepdim=True)
    cut_T1 = best_TW.gather(1, (kept_T1 - 1).clamp_min(0))
    filters_T1 = ((top_k_T > 0) | (top_p_T < 1.0))[:, None]

    kept_TK = (scaled_TK >= cut_T1) | ~filters_T1
    drawn_T = _draw(torch.where(kept_TK, _weights(scaled_TK, highest_T1), 0), uniform_T)
    drawn_T = drawn_T.clamp_max(logits_TK.shape[1] - 1)  # whatever the numbers are, not outside
    chosen_T = torch.where(temperature_T > 0, drawn_T, greedy_T)
    finite_T = (logits_TK - logits_TK).sum(dim=-1) == 0.0  # any other number less itself is NaN
    return torch.where(finite_T, chosen_T, -1).to(torch.int32)


def _draw(weight_TK: Tensor, uniform_T: Tensor) -> Tensor:
    """int64 [T]: how many running sums are at most uniform times the sum of all.

    Summed up in blocks of b tokens, and these in turn: ONNX Runtime's CUDA provider adds up every
    output of a CumSum from the first term on, which in one go would be K * K / 2 additions a row.
    What padding would count is more than the sum times any uniform number.
    """
    rows, codes = weight_TK.shape
    size = _block_size(codes)
    if missing := -codes % size:
        # Not F.pad: ONNX Runtime's CUDA provider has no Pad of whole numbers.
        nothing = weight_TK.new_zeros(1, missing).expand(rows, missing)
        weight_TK = torch.cat([weight_TK, nothing], dim=1)
    within_TBb = weight_TK.unflatten(1, (-1, size)).cumsum(dim=-1)
    block_TB = within_TBb[:, :, -1]
    end_TB = block_TB.cumsum(dim=-1)
    reached_T1 = _whole(uniform_T)[:, None] * end_TB[:, -1:]
    left_TB = reached_T1 - (end_TB - block_TB) * _ONE
    return (within_TBb * _ONE <= left_TB[:, :, None]).flatten(1).sum(dim=-1)


def _block_size(codes: int) -> int:
    """Up to 256, and a divisor of the number of codes if one is large enough, else 128."""
    if codes <= 256:
        return codes
    for size in range(128, 257):  # from about the root of 12288 on
        if codes % size == 0:
            return size
    return 128


def _weights(scaled: Tensor, highest: Tensor) -> Tensor:
    """int64 exp(scaled - highest), the highest being _ONE."""
    return _whole(torch.exp(scaled - highest))


def _whole(fraction: Tensor) -> Tensor:
    """[0, 1] as int64 in units of 1 / _ONE, cut; exact for the uniforms of spec/philox.py."""
    return (fraction * float(_ONE)).to(torch.int64)
