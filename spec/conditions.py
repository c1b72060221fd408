"""What a condition slot holds, entry by entry, and which of its entries a position attends to.

Cross attention is one softmax over text and visual entries alike. A slot holds both forms of the
text, so that guidance's unconditional rows need no slot of their own. Pure numpy.

Masked columns may be read, as entry 0 and weighed with zero, so that entry must be a finite number
for whoever uses the slot: every request writes the text at the slot's beginning.

Legend: M text length, N positions of a volume, m columns, v columns of the visual window.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from .config import ModelConfig
from .grid import MASKED, Grid, Int, neighbours, window_offsets
from .tasks import UNCONDITIONAL_PROMPT


@dataclass(frozen=True)
class ConditionLayout:
    """Where the parts of a condition slot begin.

    text: what the request's first lane sees; none: the text of UNCONDITIONAL_PROMPT; visual: the
    visual encoder's volume in raster order; entries: size of the slot; length: M.
    """

    text: int
    none: int
    visual: int
    entries: int
    length: int

    @classmethod
    def of(cls, config: ModelConfig) -> ConditionLayout:
        """The layout of a model."""
        length = config.text.length
        volume = 0 if config.visual is None else config.decoder.grid.size
        return cls(0, length, 2 * length, 2 * length + volume, length)


def visual_columns(config: ModelConfig) -> int:
    """v: positions of the window in which a decoder position attends to the visual volume."""
    if config.visual is None:
        return 0
    extent = config.visual.cross.resolve(config.decoder.grid)
    return len(window_offsets(extent, causal=False))


def lane_texts(prompt: str, guidance_scale: float) -> tuple[str, ...]:
    """What a request's lanes see, one or two: logits of the first move away from the second's.

    Guidance 0 draws from "none" alone, 1 from the prompt alone, and "none" cannot lead away from
    itself.
    """
    text = prompt.strip() or UNCONDITIONAL_PROMPT
    if guidance_scale == 0.0 or text == UNCONDITIONAL_PROMPT:
        return (UNCONDITIONAL_PROMPT,)
    return (text,) if guidance_scale == 1.0 else (text, UNCONDITIONAL_PROMPT)


@functools.lru_cache(maxsize=64)
def visual_window(config: ModelConfig, grid: Grid) -> Int:
    """int32 [N, v]: the slot entries that each position of `grid` attends to, -1 outside.

    The visual volume has the same grid as what is decoded.
    """
    assert config.visual is not None, "this model has no visual encoder"
    extent = config.visual.cross.resolve(config.decoder.grid)
    nearby = neighbours(grid, extent, causal=False)
    start = ConditionLayout.of(config).visual
    return np.where(nearby == MASKED, MASKED, nearby + start).astype(np.int32)


@functools.lru_cache(maxsize=64)
def visual_neighbours(config: ModelConfig, grid: Grid) -> Int:
    """int32 [N, n]: the nearby set of every position in the visual encoder's self-attention."""
    assert config.visual is not None, "this model has no visual encoder"
    return neighbours(grid, config.visual.extent.resolve(config.decoder.grid), causal=False)
