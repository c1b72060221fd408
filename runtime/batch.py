"""Puts the next wave of any number of sequences into one call of decoder_step.

A sequence takes its wave's rows once a lane: once plainly, twice if it is guided. Pure numpy; the
work is a handful of array operations, however many rows there are.

Legend: T rows of the call, m columns of cross attention, v columns of the visual window.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nuwa.spec.conditions import visual_columns
from nuwa.spec.config import ModelConfig
from nuwa.spec.grid import MASKED, Int
from nuwa.spec.sampling import sort_width

from .backends.base import StepBatch
from .sequence import Lane, Sequence

# Cross attention sums over m columns, of which the masked ones add zero. Sums over a ragged number
# of columns round differently, so a request's logits would depend on what its neighbours look at.
# With m rounded up to whole vector registers they are the same bits (tests measure it), as long as
# masked columns are all that company adds, and adds at the end.
COLUMN_BLOCK = 16

# Text columns ahead of the visual ones, enough for most captions: a longer one makes its call carry
# the visual columns too, needed or not.
TEXT_BEFORE_VISUAL = 32


class CrossColumns:
    """Which columns of cross attention a call has: a prefix of one sequence, fixed for a model.

    The sequence is the first TEXT_BEFORE_VISUAL text columns, the visual window's, the other text
    columns. A call takes as many as its lanes need, in blocks of COLUMN_BLOCK. So every column
    keeps its place whatever runs beside it, and short text beside a sketch does not grow.

    bias: i32 [m], which column of the cross bias each stands for; None without visual encoder.
    """

    def __init__(self, config: ModelConfig) -> None:
        length, window = config.text.length, visual_columns(config)
        self._head = _blocks(min(length, TEXT_BEFORE_VISUAL)) if window else length
        self._gap = _blocks(window)
        after = self._head + self._gap
        self._total = after + (_blocks(max(0, length - self._head)) if window else 0)
        self._visual = slice(self._head, self._head + window)
        place = np.full(self._total, length, np.int32)  # in the text; `length` is no place in it
        place[: self._head] = np.arange(self._head)
        place[after:] = np.arange(self._head, self._head + self._total - after)
        self._place = place
        self.bias: Int | None = None
        if window:
            self.bias = np.full(self._total, window, np.int32)
            self.bias[self._visual] = np.arange(window)

    def count(self, lanes: Iterable[Lane]) -> int:
        """m of a call with these lanes."""
        needed = max(self._needed(lane) for lane in lanes)
        return min(_blocks(needed), self._total)

    def neighbours(self, lanes: list[Lane], positions: list[Int]) -> Int:
        """i32 [T, m]: the entries that the rows see; lane k's rows are at positions[k]."""
        place = self._place[: self.count(lanes)]
        first = np.array([lane.text_first for lane in lanes], np.int32)[:, None]
        length = np.array([lane.text_length for lane in lanes])[:, None]
        texts = np.where(place < length, place + first, np.int32(MASKED))
        rows, start = texts.repeat([len(each) for each in positions], axis=0), 0
        for lane, each in zip(lanes, positions, strict=True):
            if lane.visual is not None:
                rows[start : start + len(each), self._visual] = lane.visual[each]
            start += len(each)
        return rows

    def _needed(self, lane: Lane) -> int:
        text = lane.text_length + (self._gap if lane.text_length > self._head else 0)
        return text if lane.visual is None else max(text, self._visual.stop)


def assemble(sequences: Iterable[Sequence], codebook_size: int, columns: CrossColumns) -> StepBatch:
    """One ragged batch: the sequences' waves in order, the rows of each lane together."""
    pairs = [(sequence, lane) for sequence in sequences for lane in sequence.lanes]
    lanes = [lane for _, lane in pairs]
    calls = [sequence.call for sequence, _ in pairs]
    sampling = [sequence.sampling for sequence, _ in pairs]
    widths = [sequence.width for sequence, _ in pairs]

    whole = np.array(
        [
            [lane.cache_slot for lane in lanes],
            [lane.condition_slot for lane in lanes],
            [each.top_k for each in sampling],
            [width if lane.guided else 0 for lane, width in zip(lanes, widths, strict=True)],
        ],
        np.int32,
    )
    real = np.array(
        [
            [each.temperature for each in sampling],
            [each.top_p for each in sampling],
            [s.sampling.guidance_scale if lane.guided else 1.0 for s, lane in pairs],
        ],
        np.float32,
    )
    slot, condition_slot, top_k, to_partner = whole.repeat(widths, axis=1)
    temperature, top_p, guidance = real.repeat(widths, axis=1)
    width = sort_width([s.top_k for s in sampling], [s.top_p for s in sampling], codebook_size)
    seen = columns.neighbours(lanes, [call.position for call in calls])
    return StepBatch(
        tokens=np.concatenate([sequence.fed() for sequence, _ in pairs]),
        coordinates=np.concatenate([call.coordinates for call in calls]),
        slot=slot,
        write_index=np.concatenate([call.write_index for call in calls]),
        neighbours=np.concatenate([call.neighbours for call in calls]),
        condition_slot=condition_slot,
        cross_neighbours=seen,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        uniform=np.concatenate([sequence.uniform() for sequence, _ in pairs]),
        guidance=guidance,
        unconditional_row=np.arange(len(slot), dtype=np.int32) + to_partner,
        ranks=np.arange(width, dtype=np.int32),
        cross_columns=None if columns.bias is None else columns.bias[: seen.shape[1]],
    )


def _blocks(columns: int) -> int:
    """`columns` rounded up to whole blocks."""
    return -(-columns // COLUMN_BLOCK) * COLUMN_BLOCK
