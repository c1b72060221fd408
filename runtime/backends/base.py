"""What the engine asks of a device: a few verbs over numpy arrays; caches stay with the backend.

Knows no request, no schedule and no bundle folder. A backend is driven by one thread.

Legend: T positions of a call, n neighbour columns, m columns of cross attention, W candidates to
sort, B batch, M text length, N positions of a volume, H x W pixels and h x w tokens of a frame.
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

AUTO = "auto"
NATIVE_CPU, ONNXRUNTIME_CPU = "native-cpu", "onnxruntime-cpu"
BACKENDS = (AUTO, NATIVE_CPU, ONNXRUNTIME_CPU)  # what choice.make_backend takes


@dataclass(frozen=True, eq=False)
class StepBatch:
    """One call of decoder_step, its inputs under their own names: T positions of any sequences.

    tokens i32 [T], fed in, codebook_size = <bos>; coordinates i32 [T, 3]; slot i32 [T], cache slot;
    write_index i32 [T] and neighbours i32 [T, n], entries of that slot, -1 masked; condition_slot
    i32 [T]; cross_neighbours i32 [T, m], entries of that slot (spec/conditions.py), -1 masked;
    temperature, top_p, uniform, guidance f32 [T]; top_k i32 [T]; unconditional_row i32 [T], its own
    index where a row is not guided; ranks i32 [W] = arange(W), W as spec/sampling.py says;
    cross_columns i32 [m], which column of the cross bias each column stands for, the visual
    window's or, one past them, text's; None for a model without a visual encoder.
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
    cross_columns: Int | None = None


class Backend(Protocol):
    """A model on a device. All memory is allocated when it is made."""

    @property
    def name(self) -> str:
        """What ModelInfo.backend says."""
        ...

    def encode_text(self, ids: Int, condition_slots: Sequence[int], first: int) -> None:
        """Puts the cross-attention keys and values of ids i32 [B, M] into B condition slots.

        Into entries [first, first + M) of each.
        """

    def encode_visual(
        self, tokens: Int, coordinates: Int, neighbours: Int, condition_slot: int
    ) -> None:
        """Puts those of one volume of visual ids i32 [N] into the visual entries of a slot.

        coordinates i32 [N, 3]; neighbours i32 [N, n], positions of the volume, -1 masked. Only
        for a model with a visual encoder.
        """

    def step(self, batch: StepBatch) -> Int:
        """Runs one call; i32 [T], valid until the next one."""
        ...

    def tokenize(self, pixels: Pixels) -> Int:
        """u8 [B, H, W, 3] -> codes i32 [B, h, w]."""
        ...

    def tokenize_sketch(self, class_maps: npt.NDArray[np.uint8]) -> Int:
        """u8 [B, H, W] of class ids -> sketch codes i32 [B, h, w].

        Only for a model with a sketch tokenizer.
        """
        ...

    def detokenize(self, codes: Int) -> Pixels:
        """codes i32 [B, h, w] -> u8 [B, H, W, 3]."""
        ...
