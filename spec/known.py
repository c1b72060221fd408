"""What is known of a picture with a hidden part: which tokens, and pixels that give nothing away.

Training and serving must agree on both. Pure numpy.

Legend: F frames, H, W pixels, h, w tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]


def known_cells(mask_HW: Bool, height: int, width: int) -> Bool:
    """bool [h, w]: the token's whole patch lies outside the mask (True = hidden)."""
    rows, columns = mask_HW.shape
    patches = mask_HW.reshape(height, rows // height, width, columns // width)
    return np.asarray(~patches.any(axis=(1, 3)))


def blank_hidden(frames_FHW3: Pixels, known_Fhw: Bool) -> Pixels:
    """The frames with every patch whose token is not known in one plain colour.

    A tokenizer's receptive field reaches beyond a token's patch: without this, known tokens would
    tell what is hidden. The colour is the median, by channel, of all pixels whose tokens are
    known, black if there are none.
    """
    frames, rows, columns, _ = frames_FHW3.shape
    _, height, width = known_Fhw.shape
    keep_FHW = known_Fhw.repeat(rows // height, axis=1).repeat(columns // width, axis=2)
    kept = frames_FHW3[keep_FHW]
    colour = _median(kept) if len(kept) else np.zeros(3, np.uint8)
    return np.where(keep_FHW[..., None], frames_FHW3, colour)


def _median(pixels_N3: Pixels) -> Pixels:
    """u8 [3]: of an even number of pixels, the mean of the two middle values, rounded down.

    Counted, not sorted as in np.median, which takes five times as long.
    """
    counts = [np.bincount(channel, minlength=256) for channel in pixels_N3.T]
    middle = [(len(pixels_N3) - 1) // 2, len(pixels_N3) // 2]
    values = [np.searchsorted(count.cumsum(), middle, side="right") for count in counts]
    return (np.sum(values, axis=1) // 2).astype(np.uint8)
