"""How many of the likeliest tokens a decoder_step call must sort for its rows' top-k and top-p.

Shared by everything that drives decoder_step; sampling itself is part of that graph.
"""

from __future__ import annotations

from collections.abc import Iterable


def sort_width(top_k: Iterable[int], top_p: Iterable[float], codebook_size: int) -> int:
    """W, the length of the `ranks` input, for the top_k and top_p of all rows of a call.

    codebook_size if any row has top_p < 1 without a top_k, else the largest top_k, at least 1.
    """
    width = 1
    for k, p in zip(top_k, top_p, strict=True):
        if p < 1.0 and k == 0:
            return codebook_size
        width = max(width, int(k))
    return min(width, codebook_size)
