"""Contact sheets: many small pictures in one PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from nuwa.spec.files import replacing
from nuwa.spec.palette import MOST_CLASSES, voc_palette


def contact_sheet(
    pixels: npt.NDArray[np.uint8], columns: int, *, scale: int = 1, gap: int = 2
) -> npt.NDArray[np.uint8]:
    """uint8 [N, H, W, 3] -> one picture, row by row, on grey, enlarged by whole pixels."""
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    number, height, width, _ = pixels.shape
    rows = -(-number // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 128, np.uint8)
    for index, picture in enumerate(pixels):
        top = gap + (index // columns) * (height + gap)
        left = gap + (index % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def paint_classes(maps: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
    """Class ids [..., H, W] -> uint8 [..., H, W, 3] in VOC's colours."""
    return voc_palette(MOST_CLASSES)[maps]


def save_png(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    """Writes uint8 [H, W, 3], whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG")
