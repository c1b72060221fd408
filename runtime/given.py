"""What a request gives of its result: which tokens are known, which pixels must come back as given.

V2V gives whole frames; I2I, TI2I and TV2V give all that lies outside the mask. Pure functions of a
request; knows no model beyond the size of its token grid.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nuwa.spec.grid import Grid
from nuwa.spec.known import known_cells
from nuwa.spec.tasks import Task

from .core import GenerationRequest, Mask, Pixels

SEAM = 4  # pixels inside a mask that are blended with what surrounds it

Float = npt.NDArray[np.float32]

_AROUND = np.indices((3, 3)).reshape(2, 9, 1) - 1  # rows and columns of the 3 x 3 around a pixel


def known_positions(request: GenerationRequest, grid: Grid) -> npt.NDArray[np.bool_]:
    """bool [grid.size] in raster order: the token is given.

    A token is given only if its whole patch is: a patch that the mask so much as touches is
    generated.
    """
    known = np.zeros(grid.shape, bool)
    if request.task is Task.V2V and request.frames is not None:
        known[: len(request.frames)] = True
    elif request.task.needs_mask and request.mask is not None:
        known[:] = known_cells(request.mask, grid.height, grid.width)
    return known.reshape(-1)


def given_frame(request: GenerationRequest, index: int) -> Pixels | None:
    """Frame `index` of the result, u8 [H, W, 3], where all of it is given."""
    if request.frames is None or request.mask is not None or index >= len(request.frames):
        return None
    return request.frames[index]


def restore_given(request: GenerationRequest, index: int, pixels: Pixels) -> Pixels:
    """Frame `index` of the result, u8 [H, W, 3], with every given pixel exactly as it was given.

    The image tokenizer does not reproduce pixels exactly, so decoding known tokens is not enough.
    Within SEAM pixels of the mask's border, and inside it only, generated pixels are corrected so
    that no step shows there; further inside they are as they were decoded.
    """
    if request.frames is None or index >= len(request.frames):
        return pixels
    given = request.frames[index]
    if request.mask is None:
        return given
    difference = given.astype(np.float32) - pixels
    blended = np.rint(pixels + seam_correction(difference, request.mask)).clip(0, 255)
    return np.where(request.mask[..., None], blended.astype(np.uint8), given)


def seam_correction(difference: Float, mask: Mask) -> Float:
    """f32 [H, W, 3] to add to decoded pixels: zero outside the mask and deeper in it than SEAM.

    difference f32 [H, W, 3], given minus decoded, of which only what lies outside the mask is
    read. It is carried inwards ring by ring, each pixel the mean of its neighbours nearer to the
    border (a membrane stretched inwards from the border), and fades out linearly.
    """
    edge = ((1, 1), (1, 1))  # room for the neighbours of pixels at the picture's edge
    hidden, reached = np.pad(mask, edge), np.pad(~mask, edge)
    carried = np.pad(difference, (*edge, (0, 0))) * reached[..., None]
    correction = np.zeros_like(carried)
    for depth in range(1, SEAM + 1):
        ring = np.nonzero(hidden & ~reached & _grown(reached))
        if not len(ring[0]):
            break
        around = tuple(place + offset for place, offset in zip(ring, _AROUND, strict=True))
        count = reached[around].sum(axis=0)
        carried[ring] = carried[around].sum(axis=0) / count[:, None]
        correction[ring] = carried[ring] * np.float32(1.0 - depth / (SEAM + 1))
        reached[ring] = True
    return correction[1:-1, 1:-1]


def _grown(region: Mask) -> Mask:
    """bool [H, W]: the region and the eight neighbours of each of its pixels."""
    rows = region.copy()
    rows[1:] |= region[:-1]
    rows[:-1] |= region[1:]
    grown = rows.copy()
    grown[:, 1:] |= rows[:, :-1]
    grown[:, :-1] |= rows[:, 1:]
    return grown
