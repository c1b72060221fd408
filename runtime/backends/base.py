"""What the engine asks of a device: four verbs over numpy arrays; caches stay with the backend.

Knows no request, no schedule and no bundle folder. A backend is driven by one thread.

Legend: T positions of a call, n neighbour columns, m text columns, W candidates to sort, B batch,
M text length, H x W pixels and h x w tokens of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nuwa.spec.grid import Int

from ..core import Pixels

Float = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class StepBatch:
    """One call of decoder_step, its inputs under their own names: T positions of any sequences.

    tokens i32 [T], fed in, codebook_size = <bos>; coordinates i32 [T, 3]; slot i32 [T], cache slot;
    write_index i32 [T] and neighbours i32 [T, n], entries of that slot, -1 masked; condition_slot
    i32 [T]; cross_neighbours i32 [T, m], text positions, -1 masked; temperature, top_p, uniform,
    guidance f32 [T]; top_k i32 [T]; unconditional_row i32 [T], its own index where a row is not
    guided; ranks i32 [W] = arange(W), W as spec/sampling.py says.
    """

    tokens: Int
    coordinates: Int
    slot: Int
    write_index: Int
    neighbours: Int
    condition_slot: Int
    cross_neighbours: Int
    temperature: Float
    top_k: Int
    top_p: Float
    uniform: Float
    guidance: Float
    unconditional_row: Int
    ranks: Int


class Backend(Protocol):
    """A model on a device. All memory is allocated when it is made."""

    @property
    def name(self) -> str:
        """What ModelInfo.backend says."""
        ...

    def encode_text(self, ids: Int, condition_slots: Sequence[int]) -> None:
        """Puts the cross-attention keys and values of ids i32 [B, M] into B condition slots."""

    def step(self, batch: StepBatch) -> Int:
        """Runs one call; i32 [T], valid until the next one."""
        ...

    def tokenize(self, pixels: Pixels) -> Int:
        """u8 [B, H, W, 3] -> codes i32 [B, h, w]."""
        ...

    def detokenize(self, codes: Int) -> Pixels:
        """codes i32 [B, h, w] -> u8 [B, H, W, 3]."""
        ...
