"""Class maps (sketches) given by users: which ids their colours stand for, and which ids there are.

Pure numpy; knows no files and no requests. Positions in messages count from 0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nuwa.spec.palette import MOST_CLASSES, voc_palette

Bool = npt.NDArray[np.bool_]
ClassMaps = npt.NDArray[np.uint8]  # [F, H, W]


def check_ids(maps: ClassMaps, classes: int) -> None:
    """ValueError naming the first id of u8 [F, H, W] that is not below `classes`."""
    if maps.size and maps.max() >= classes:
        frame, row, column = np.argwhere(maps >= classes)[0]
        raise ValueError(
            f"has class id {maps[frame, row, column]} at column {column}, row {row} of frame "
            f"{frame}; this model's class ids are 0 to {classes - 1}"
        )


def ids_of_indices(indices: ClassMaps, palette: npt.NDArray[np.uint8]) -> ClassMaps:
    """Palette indices u8 [F, H, W] and their colours u8 [n, 3] -> ids u8 [F, H, W], unchecked.

    The indices are the ids, unless every colour in use is that of a class (spec/palette.py) and
    some of another class than its index says: then the colours are what is meant. Programs that
    shrink files number the colours anew.
    """
    used = np.flatnonzero(np.bincount(indices.reshape(-1), minlength=256))
    if used[-1] >= len(palette):
        return indices
    ids, known = _classes_of(palette[used], MOST_CLASSES)
    if not known.all() or np.array_equal(ids, used):
        return indices
    renumbered = np.zeros(256, np.uint8)
    renumbered[used] = ids
    return renumbered[indices]


def ids_of_colours(frames: npt.NDArray[np.uint8], classes: int) -> ClassMaps:
    """u8 [F, H, W, 3] -> ids u8 [F, H, W], all below `classes`; ValueError naming what is wrong.

    Where every pixel is grey and every grey value an id, the values are the ids. Else every pixel
    must have the colour of a class (spec/palette.py).
    """
    red, green, blue = np.moveaxis(frames, -1, 0)
    grey = np.array_equal(red, green) and np.array_equal(green, blue)
    if grey and red.max(initial=0) < classes:
        return red
    ids, known = _classes_of(frames, classes)
    if known.all():
        return ids
    if grey:
        check_ids(red, classes)
    frame, row, column = np.argwhere(~known)[0]
    colour = tuple(frames[frame, row, column].tolist())
    raise ValueError(
        f"has the colour {colour} at column {column}, row {row} of frame {frame}, which no class "
        f"from 0 to {classes - 1} has in the palette of PASCAL VOC; send those colours exactly "
        f"(without lossy compression), or class ids as palette indices or grey values"
    )


def _classes_of(colours: npt.NDArray[np.uint8], classes: int) -> tuple[ClassMaps, Bool]:
    """u8 [..., 3] -> [...]: the class of each colour, and whether there is one below `classes`."""
    palette, codes = _codes(voc_palette(classes)), _codes(colours)
    order = np.argsort(palette)
    place = np.searchsorted(palette[order], codes).clip(max=classes - 1)
    ids = order[place].astype(np.uint8)
    return ids, palette[ids] == codes


def _codes(colours: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """[..., 3] -> [...]: one number a colour."""
    red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
    return (red << 16) | (green << 8) | blue
