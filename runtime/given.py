"""What a request gives of its result: which tokens are known, which pixels must come back as given.

V2V gives whole frames; I2I, TI2I and TV2V give all that lies outside the mask. Pure functions of a
request; knows no model beyond the size of its token grid.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nuwa.spec.grid import Grid
from nuwa.spec.tasks import Task

from .core import GenerationRequest, Pixels


def known_positions(request: GenerationRequest, grid: Grid) -> npt.NDArray[np.bool_]:
    """bool [grid.size] in raster order: the token is given.

    A token is given only if its whole patch is: a patch that the mask so much as touches is
    generated.
    """
    known = np.zeros(grid.shape, bool)
    if request.task is Task.V2V and request.frames is not None:
        known[: len(request.frames)] = True
    elif request.task.needs_mask and request.mask is not None:
        height, width = request.mask.shape
        patches = request.mask.reshape(
            grid.height, height // grid.height, grid.width, width // grid.width
        )
        known[:] = ~patches.any(axis=(1, 3))
    return known.reshape(-1)


def restore_given(request: GenerationRequest, index: int, pixels: Pixels) -> Pixels:
    """Frame `index` of the result, u8 [H, W, 3], with every given pixel exactly as it was given.

    The image tokenizer does not reproduce pixels exactly, so decoding known tokens is not enough.
    """
    if request.frames is None or index >= len(request.frames):
        return pixels
    if request.mask is None:
        return request.frames[index]
    return np.where(request.mask[..., None], pixels, request.frames[index])
