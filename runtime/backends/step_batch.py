"""The inputs of a bundle's decoder_step graph: the rows of any number of parts, in one call.

For backends that run the graph as it is. Pure numpy; the work is a handful of array operations,
however many rows there are.

Legend: T rows of the call, n neighbour columns, m columns of cross attention, W candidates to sort.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nuwa.spec.conditions import visual_columns
from nuwa.spec.config import ModelConfig
from nuwa.spec.grid import MASKED, Int
from nuwa.spec.sampling import sort_width

from .base import Float, Lane, Part, Stream

# Cross attention sums over m columns, of which the masked ones add zero. Sums over a ragged number
# of columns round differently, so a request's logits would depend on what its neighbours look at.
# With m rounded up to whole vector registers they are the same bits (tests measure it), as long as
# masked columns are all that company adds, and adds at the end.
COLUMN_BLOCK = 16

# Text columns ahead of the visual ones, enough for most captions: a longer one makes its call carry
# the visual columns too, needed or not.
TEXT_BEFORE_VISUAL = 32


@dataclass(frozen=True, eq=False)
class StepBatch:
    """One call of decoder_step, its inputs under their own names: T rows of any streams.

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


class CrossColumns:
    """Which columns of cross attention a call has: a prefix of one sequence, fixed for a model.

    The sequence is the first TEXT_BEFORE_VISUAL text columns, the visual window's, the other text
    columns. A call takes as many as its rows need, in blocks of COLUMN_BLOCK. So every column
    keeps its place whatever runs beside it, and short text beside a sketch does not grow.

    bias: i32 [m], which column of the cross bias each stands for; None without visual encoder.
    place: i32 [m], of each text column in the text, the others are past it; first_visual: the first
    column of the visual window.
    """

    def __init__(self, config: ModelConfig) -> None:
        length, window = config.text.length, visual_columns(config)
        self._head = _blocks(min(length, TEXT_BEFORE_VISUAL)) if window else length
        self._gap = _blocks(window)
        after = self._head + self._gap
        self._total = after + (_blocks(max(0, length - self._head)) if window else 0)
        self._visual = slice(self._head, self._head + window)
        self.first_visual = self._head
        self.place = np.full(self._total, length, np.int32)
        self.place[: self._head] = np.arange(self._head)
        self.place[after:] = np.arange(self._head, self._head + self._total - after)
        self.bias: Int | None = None
        if window:
            self.bias = np.full(self._total, window, np.int32)
            self.bias[self._visual] = np.arange(window)

    def count(self, pairs: Sequence[tuple[Part, Lane]]) -> int:
        """m: how many columns a call of these lanes has."""
        needed = max(self._needed(part.stream, lane) for part, lane in pairs)
        return min(_blocks(needed), self._total)

    def neighbours(self, pairs: Sequence[tuple[Part, Lane]]) -> Int:
        """i32 [T, m]: the entries that the rows see, a lane's rows after another's."""
        place = self.place[: self.count(pairs)]
        first = np.array([lane.text_first for _, lane in pairs], np.int32)[:, None]
        length = np.array([lane.text_length for _, lane in pairs])[:, None]
        texts = np.where(place < length, place + first, np.int32(MASKED))
        rows, start = texts.repeat([part.count for part, _ in pairs], axis=0), 0
        for part, _ in pairs:
            visual = part.stream.rows.visual
            if visual is not None:
                seen = visual[part.first : part.first + part.count]
                rows[start : start + part.count, self._visual] = seen
            start += part.count
        return rows

    def _needed(self, stream: Stream, lane: Lane) -> int:
        text = lane.text_length + (self._gap if lane.text_length > self._head else 0)
        return text if stream.rows.visual is None else max(text, self._visual.stop)


def assemble(
    parts: Iterable[Part],
    tokens: Callable[[Stream], Int],
    codebook_size: int,
    columns: CrossColumns,
) -> StepBatch:
    """The batch of a call; `tokens` gives the array of those that a stream holds."""
    pairs = [(part, lane) for part in parts for lane in part.stream.lanes]
    streams = [part.stream for part, _ in pairs]
    counts = [part.count for part, _ in pairs]
    guided = [
        stream.guided and lane is stream.lanes[0] for stream, (_, lane) in _zip(streams, pairs)
    ]
    sampling = [stream.sampling for stream in streams]

    def gather(name: str) -> Any:
        rows = [
            getattr(part.stream.rows, name)[part.first : part.first + part.count]
            for part, _ in pairs
        ]
        return np.concatenate(rows)

    whole = np.array(
        [
            [lane.cache_slot for _, lane in pairs],
            [lane.condition_slot for _, lane in pairs],
            [each.top_k for each in sampling],
            [count if moved else 0 for count, moved in zip(counts, guided, strict=True)],
        ],
        np.int32,
    )
    real = np.array(
        [
            [each.temperature for each in sampling],
            [each.top_p for each in sampling],
            [each.guidance_scale if moved else 1.0 for each, moved in _zip(sampling, guided)],
        ],
        np.float32,
    )
    slot, condition_slot, top_k, to_partner = whole.repeat(counts, axis=1)
    temperature, top_p, guidance = real.repeat(counts, axis=1)
    width = sort_width([s.top_k for s in sampling], [s.top_p for s in sampling], codebook_size)
    seen = columns.neighbours(pairs)
    return StepBatch(
        tokens=np.concatenate([_fed(part, tokens(part.stream)) for part, _ in pairs]),
        coordinates=gather("coordinates"),
        slot=slot,
        write_index=gather("write_index"),
        neighbours=gather("neighbours"),
        condition_slot=condition_slot,
        cross_neighbours=seen,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        uniform=gather("uniform"),
        guidance=guidance,
        unconditional_row=np.arange(len(slot), dtype=np.int32) + to_partner,
        ranks=np.arange(width, dtype=np.int32),
        cross_columns=None if columns.bias is None else columns.bias[: seen.shape[1]],
    )


def _zip(*lists: Iterable) -> zip:
    return zip(*lists, strict=True)


def _fed(part: Part, tokens: Int) -> Int:
    """i32 [count]: the tokens that a part's rows are fed."""
    fed = part.stream.rows.fed[part.first : part.first + part.count]
    return np.where(fed < 0, -1 - fed, tokens[np.maximum(fed, 0)])


def _blocks(columns: int) -> int:
    """`columns` rounded up to whole blocks."""
    return -(-columns // COLUMN_BLOCK) * COLUMN_BLOCK
