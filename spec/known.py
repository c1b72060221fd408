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


def hidden_edges(mask_HW: Bool, height: int, width: int, levels: int) -> npt.NDArray[np.int32]:
    """int32 [h, w], in [0, levels**4): how much a mask leaves visible at the edges of each patch.

    A mask that cuts through patches says where in them there is room for what is drawn: pixels
    outside it come back as they were. The number has a digit of base `levels` for the top, bottom,
    left and right edge: 0 where the hidden pixels reach it, levels - 1 where all but the last row
    or column is visible from there. 0 for patches that are not hidden at all.
    """
    rows, columns = mask_HW.shape
    patches = mask_HW.reshape(height, rows // height, width, columns // width)
    number = np.zeros((height, width), np.int32)
    by_row, by_column = np.asarray(patches.any(axis=3)), np.asarray(patches.any(axis=1))
    for along in (by_row.swapaxes(1, 2), by_column):  # [h, w, pixels]
        most = max(1, along.shape[-1] - 1)
        for from_edge in (along, along[..., ::-1]):
            visible = from_edge.argmax(axis=-1)  # pixels before the first hidden one
            number = number * levels + -(-visible * (levels - 1) // most)
    return number.astype(np.int32)


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
