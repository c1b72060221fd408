"""Colours of class maps: the palette of PASCAL VOC, which segmentation tools write and show."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MOST_CLASSES = 256


def voc_palette(classes: int) -> npt.NDArray[np.uint8]:
    """u8 [classes, 3]: RGB of each class id; class 0 is black. ValueError outside 1 to 256.

    The bits of an id are dealt out to the three channels, high bits first (as the VOC devkit does).
    """
    if not 1 <= classes <= MOST_CLASSES:
        raise ValueError(f"classes {classes} is not in [1, {MOST_CLASSES}]")
    ids = np.arange(classes)
    colours = np.zeros((classes, 3), np.int64)
    for level in range(8):
        for channel in range(3):
            bit = (ids >> (3 * level + channel)) & 1
            colours[:, channel] |= bit << (7 - level)
    return colours.astype(np.uint8)
