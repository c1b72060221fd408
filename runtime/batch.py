"""Puts the next wave of any number of sequences into one call of decoder_step.

A sequence takes its wave's rows once a lane: once plainly, twice if it is guided. Pure numpy; the
work is a handful of array operations, however many rows there are.

Legend: T rows of the call, m text columns.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nuwa.spec.grid import Int
from nuwa.spec.sampling import sort_width

from .backends.base import StepBatch
from .sequence import Lane, Sequence

# Cross attention sums over m columns, of which the masked ones add zero. Sums over a ragged number
# of columns round differently, so a request's logits would depend on the length of its neighbours'
# prompts. With m rounded up to whole vector registers they are the same bits (tests measure it).
TEXT_COLUMNS = 16


def assemble(sequences: Iterable[Sequence], codebook_size: int, text_length: int) -> StepBatch:
    """One ragged batch: the sequences' waves in order, the rows of each lane together.

    text_length: ids of a prompt, the most text columns there can be.
    """
    pairs = [(sequence, lane) for sequence in sequences for lane in sequence.lanes]
    lanes = [lane for _, lane in pairs]
    parts = [(sequence.plan, sequence.rows) for sequence, _ in pairs]
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
    return StepBatch(
        tokens=np.concatenate([sequence.fed() for sequence, _ in pairs]),
        coordinates=np.concatenate([plan.coordinates[rows] for plan, rows in parts]),
        slot=slot,
        write_index=np.concatenate([plan.write_index[rows] for plan, rows in parts]),
        neighbours=np.concatenate([plan.neighbours[rows] for plan, rows in parts]),
        condition_slot=condition_slot,
        cross_neighbours=_text_columns(lanes, text_length).repeat(widths, axis=0),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        uniform=np.concatenate([sequence.uniform[sequence.rows] for sequence, _ in pairs]),
        guidance=guidance,
        unconditional_row=np.arange(len(slot), dtype=np.int32) + to_partner,
        ranks=np.arange(width, dtype=np.int32),
    )


def _text_columns(lanes: list[Lane], text_length: int) -> Int:
    """i32 [lanes, m]: each lane's text positions, then -1."""
    used = [lane.text_length for lane in lanes]
    count = min(-(-max(used) // TEXT_COLUMNS) * TEXT_COLUMNS, text_length)
    columns = np.arange(count, dtype=np.int32)
    return np.where(columns < np.array(used)[:, None], columns, np.int32(-1))
