"""Inputs that a graph is verified on: random ones, and those of real decoding.

Everything is made from a config and a seed; nothing here runs a model or compares anything.

Legend: T positions of a call, S slots, R entries, C condition slots, M text length, n neighbour
columns, m cross columns, v visual ones of them, W candidates to sort, K codebook size, F pictures,
N positions of a volume.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from nuwa.spec.conditions import (
    ConditionLayout,
    visual_columns,
    visual_neighbours,
    visual_window,
)
from nuwa.spec.config import ModelConfig, TextConfig
from nuwa.spec.grid import MASKED, Grid
from nuwa.spec.manifest import layer_names
from nuwa.spec.plan import DecodePlan, cache_entries, decode_plan
from nuwa.spec.text import TextTokenizer
from nuwa.training.sampling import sort_width

Feeds = dict[str, npt.NDArray]

PROMPTS = ("none", "a red digit 3 moves from left to right", "A green square. " * 40, "")
_TEMPERATURES = (1.0, 0.0, 0.7, 1.5)
_TOP_KS = (0, 1, 5, 40)
_TOP_PS = (1.0, 0.9, 0.3)
_GUIDANCES = (1.0, 3.0, 0.5)
_SHAPES = ((1, 1, 1), (2, 1, 3), (7, 3, 2), (20, 2, 4), (33, 4, 1))  # T, S, C


def text_ids(tokenizer: TextTokenizer) -> npt.NDArray[np.int32]:
    """int32 [B, M]: ids of prompts, from none to one that is cut."""
    return np.stack([tokenizer.encode(prompt) for prompt in PROMPTS])


def pictures(size: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 [F, size, size, 3]: coloured discs on plain grounds, black, white, noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    drawn = []
    for _ in range(4):
        (cy, cx), radius = rng.random(2), 0.1 + 0.3 * rng.random()
        inside = ((y - cy) ** 2 + (x - cx) ** 2 < radius**2)[..., None]
        drawn.append(np.where(inside, rng.integers(0, 256, 3), rng.integers(0, 256, 3)))
    plain = [np.zeros((size, size, 3)), np.full((size, size, 3), 255)]
    noise = rng.integers(0, 256, (2, size, size, 3))
    return np.stack([*drawn, *plain, *noise]).astype(np.uint8)


def class_maps(size: int, classes: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 [F, size, size] of ids below `classes`: discs on class 0, plain ones, noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    drawn = []
    for _ in range(4):
        (cy, cx), radius = rng.random(2), 0.1 + 0.3 * rng.random()
        inside = (y - cy) ** 2 + (x - cx) ** 2 < radius**2
        drawn.append(np.where(inside, rng.integers(1, classes), 0))
    plain = [np.zeros((size, size)), np.full((size, size), classes - 1)]
    noise = rng.integers(0, classes, (2, size, size))
    return np.stack([*drawn, *plain, *noise]).astype(np.uint8)


def visual_volumes(config: ModelConfig, seed: int = 0) -> Iterator[Feeds]:
    """Feeds of `visual_encoder`: an image, a clip, both; any ids, the last ones half hidden."""
    rng = np.random.default_rng(seed)
    clip = config.decoder.grid
    image = Grid(1, clip.height, clip.width)
    for grids in ((image,), (clip,), (clip, image, image)):
        ids = [rng.integers(0, config.visual_ids, grid.size) for grid in grids]
        ids[-1][rng.random(len(ids[-1])) < 0.5] = config.hidden
        yield visual_feeds(config, zip(grids, ids, strict=True))


def visual_feeds(
    config: ModelConfig, volumes: Iterable[tuple[Grid, npt.NDArray[np.integer]]]
) -> Feeds:
    """Feeds of `visual_encoder` for volumes, one after the other: each a grid and ids [N]."""
    grids, ids = zip(*volumes, strict=True)
    starts = np.cumsum([0, *(grid.size for grid in grids[:-1])])
    nearby = [visual_neighbours(config, grid) for grid in grids]
    moved = [np.where(n == MASKED, n, n + s) for n, s in zip(nearby, starts, strict=True)]
    return typed(
        {
            "tokens": np.concatenate(ids),
            "coordinates": np.concatenate([grid.coordinates() for grid in grids]),
            "neighbours": np.concatenate(moved),
        }
    )


def random_steps(config: ModelConfig, seed: int = 0) -> Iterator[Feeds]:
    """Feeds of `decoder_step`, fp32 caches: mixed slots, masked and empty rows, all samplings.

    Of a model with a visual encoder, two calls in three have visual columns.
    """
    rng = np.random.default_rng(seed)
    for index, (rows, slots, conditions) in enumerate(_SHAPES):
        for sampling in range(3):
            visual = (index + sampling) % 3 > 0
            yield _random_step(config, rng, rows, slots, conditions, sampling, visual)


def _random_step(
    config: ModelConfig,
    rng: np.random.Generator,
    rows: int,
    slots: int,
    conditions: int,
    kind: int,
    visual: bool,
) -> Feeds:
    decoder, entries = config.decoder, cache_entries(config.decoder)
    # Distinct places, so that the order of writes cannot matter; some rows write nothing.
    places = rng.permutation(slots * entries)[:rows]
    places = np.pad(places, (0, rows - len(places)), constant_values=MASKED)
    slot = np.where(places >= 0, places // entries, 0)
    skips = (rng.random(rows) < 0.2) | (places < 0) if kind < 2 else np.ones(rows, bool)
    remembered = ConditionLayout.of(config).entries
    columns = cross_columns(config, visual, int(rng.integers(1, config.text.length + 1)))
    cross = _masked(rng, (rows, len(columns)), remembered)
    if visual and rows > 3:
        cross[3, : visual_columns(config)] = MASKED  # a row without a visual condition
    nearby = _masked(rng, (rows, decoder.neighbour_count), entries)
    if rows > 2:
        cross[1], nearby[2] = MASKED, MASKED
    tokens = rng.integers(0, config.bos, rows)
    tokens[1:2] = config.bos
    feeds = {
        "tokens": tokens,
        "coordinates": rng.integers(0, decoder.grid.shape, (rows, 3)),
        "slot": slot,
        "write_index": np.where(skips, MASKED, places % entries),
        "neighbours": nearby,
        "condition_slot": rng.integers(0, conditions, rows),
        "cross_neighbours": cross,
    } | _sampling(rng, rows, kind, config.image.codebook_size)
    if config.visual is not None:
        feeds["cross_columns"] = columns
    stored, conditioned = (slots, entries), (conditions, remembered)
    shapes = {"key_cache": stored, "value_cache": stored}
    shapes |= {"cross_key": conditioned, "cross_value": conditioned}
    for family, shape in shapes.items():
        for name in layer_names(family, decoder.layers):
            feeds[name] = rng.standard_normal((*shape, decoder.width), np.float32)
    return typed(feeds)


def _masked(rng: np.random.Generator, shape: tuple[int, int], entries: int) -> npt.NDArray:
    return np.where(rng.random(shape) < 0.25, MASKED, rng.integers(0, entries, shape))


def _sampling(rng: np.random.Generator, rows: int, kind: int, codebook: int) -> Feeds:
    """kind 0: nobody filters (W = 1); 1: top-k everywhere; 2: any mix, W = K."""
    top_k = rng.choice(_TOP_KS[1:], rows) if kind == 1 else rng.choice(_TOP_KS, rows) * (kind > 0)
    top_p = rng.choice(_TOP_PS, rows) if kind > 0 else np.ones(rows)
    guided = rng.random(rows) < 0.5
    own = np.arange(rows)
    return {
        "temperature": rng.choice(_TEMPERATURES, rows),
        "top_k": top_k,
        "top_p": top_p,
        "uniform": rng.random(rows),
        "guidance": np.where(guided, rng.choice(_GUIDANCES, rows), 1.0),
        "unconditional_row": np.where(guided, rng.integers(0, rows, rows), own),
        "ranks": np.arange(sort_width(top_k, top_p, codebook)),
    }


def typed(feeds: Feeds) -> Feeds:
    """Integers as int32, reals as fp32, all contiguous."""
    types = {name: np.int32 if a.dtype.kind in "iu" else np.float32 for name, a in feeds.items()}
    return {name: np.ascontiguousarray(array, types[name]) for name, array in feeds.items()}


# Sequences of `RealSteps`, one a slot: a guided clip with a visual condition if the model has any,
# its unconditional twin ("none", the same visual condition), and a plain clip without one that
# starts three calls later. The first two share a condition slot.
GUIDED, TWIN, PLAIN = 0, 1, 2
_CONDITIONS = np.array([0, 0, 1])
_STARTS = (0, 0, 3)
SLOTS = len(_STARTS)
SLOT_PROMPTS = (1, 2)  # of PROMPTS, by condition slot
NONE_PROMPT = 0
VISUAL_SLOT = 0


class RealSteps:
    """Wave-by-wave decoding of three sequences: what each call is fed, but for the caches.

    The caller runs the model and reports the tokens, which later calls are fed.
    """

    def __init__(self, config: ModelConfig, ids_BM: npt.NDArray[np.int32], seed: int = 0) -> None:
        """ids_BM: those of PROMPTS."""
        self.config = config
        self.plan: DecodePlan = decode_plan(config.decoder, config.decoder.grid, "wave")
        self.calls = self.plan.steps + max(_STARTS)
        self._text = _text_entries(config, ids_BM)
        self._tokens = np.full((SLOTS, config.decoder.grid.size + 1), config.bos)
        self._rng = np.random.default_rng(seed)

    def feeds(self, call: int) -> Feeds:
        """All row inputs of one call; rows are slot-major."""
        parts = [self._rows(slot, call) for slot in range(SLOTS)]
        slot = np.repeat(np.arange(SLOTS), [len(part) for part in parts])
        row, own = np.concatenate(parts), np.arange(len(slot))
        visual = self.config.visual is not None and len(parts[GUIDED]) > 0
        cross = self._cross(slot, row, visual)
        columns = cross_columns(self.config, visual, self._text.shape[1])
        guided, plain = slot == GUIDED, slot == PLAIN
        top_k, top_p = np.where(plain, 5, 0), np.where(plain, 0.9, 1.0)
        codebook = self.config.image.codebook_size
        return typed(
            {
                "tokens": self._tokens[slot, self.plan.fed[row]],
                "coordinates": self.plan.coordinates[row],
                "slot": slot,
                "write_index": self.plan.write_index[row],
                "neighbours": self.plan.neighbours[row],
                "condition_slot": _CONDITIONS[slot],
                "cross_neighbours": cross,
                "temperature": np.where(plain, 0.8, 1.0),
                "top_k": top_k,
                "top_p": top_p,
                "uniform": self._rng.random(len(row)),
                "guidance": np.where(guided, 3.0, 1.0),
                "unconditional_row": np.where(guided, own + len(parts[GUIDED]), own),
                "ranks": np.arange(sort_width(top_k, top_p, codebook)),
            }
            | ({} if self.config.visual is None else {"cross_columns": columns})
        )

    def _cross(
        self, slot: npt.NDArray[np.intp], row: npt.NDArray[np.intp], visual: bool
    ) -> npt.NDArray[np.integer]:
        text = self._text[slot]
        if not visual:
            return text
        near = visual_window(self.config, self.plan.grid)[self.plan.position[row]]
        return np.concatenate([np.where(slot[:, None] == PLAIN, MASKED, near), text], axis=1)

    def report(self, call: int, next_tokens: npt.NDArray[np.int32]) -> None:
        """Takes what the model drew in `call`; the twin's own draws do not count."""
        begin = 0
        for slot in range(SLOTS):
            rows = self._rows(slot, call)
            self._tokens[slot, self.plan.position[rows]] = next_tokens[begin : begin + len(rows)]
            begin += len(rows)
        self._tokens[TWIN] = self._tokens[GUIDED]

    def _rows(self, slot: int, call: int) -> npt.NDArray[np.intp]:
        own = call - _STARTS[slot]
        within = 0 <= own < self.plan.steps
        bounds = self.plan.bounds[own : own + 2] if within else (0, 0)
        return np.arange(bounds[0], bounds[1])


def cross_columns(config: ModelConfig, visual: bool, text: int) -> npt.NDArray[np.int32]:
    """int32 [m]: columns of the bias table, for a call with or without v, then `text` columns."""
    count = visual_columns(config)
    return np.concatenate(
        [np.arange(count if visual else 0, dtype=np.int32), np.full(text, count, np.int32)]
    )


def _text_entries(config: ModelConfig, ids_BM: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """int32 [S, m]: entries of the text that each sequence attends to, -1 past its padding."""
    layout, used = ConditionLayout.of(config), text_columns(config.text, ids_BM)
    guided, plain = (used[prompt] for prompt in SLOT_PROMPTS)
    rows = ((guided, layout.text), (used[NONE_PROMPT], layout.none), (plain, layout.text))
    return np.stack([np.where(row == MASKED, MASKED, row + start) for row, start in rows])


def text_columns(text: TextConfig, ids_CM: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """int32 [C, m]: positions of each text that count, -1 past its padding."""
    lengths = (ids_CM != text.vocabulary_size - 1).sum(axis=1)
    used = lengths if text.mask_padding else np.full(len(ids_CM), ids_CM.shape[1])
    columns = np.arange(used.max(), dtype=np.int32)
    return np.where(columns < used[:, None], columns, MASKED).astype(np.int32)
