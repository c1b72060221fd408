"""Inputs that a graph is verified on: random ones, and those of real decoding.

Everything is made from a config and a seed; nothing here runs a model or compares anything.

Legend: T positions of a call, S slots, R entries, C condition slots, M text length, n neighbour
columns, m cross columns, W candidates to sort, K codebook size, F pictures.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from nuwa.spec.config import ModelConfig, TextConfig
from nuwa.spec.grid import MASKED
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


def random_steps(config: ModelConfig, seed: int = 0) -> Iterator[Feeds]:
    """Feeds of `decoder_step`, fp32 caches: mixed slots, masked and empty rows, all samplings."""
    rng = np.random.default_rng(seed)
    for rows, slots, conditions in _SHAPES:
        for sampling in range(3):
            yield _random_step(config, rng, rows, slots, conditions, sampling)


def _random_step(
    config: ModelConfig, rng: np.random.Generator, rows: int, slots: int, conditions: int, kind: int
) -> Feeds:
    decoder, entries = config.decoder, cache_entries(config.decoder)
    # Distinct places, so that the order of writes cannot matter; some rows write nothing.
    places = rng.permutation(slots * entries)[:rows]
    places = np.pad(places, (0, rows - len(places)), constant_values=MASKED)
    slot = np.where(places >= 0, places // entries, 0)
    skips = (rng.random(rows) < 0.2) | (places < 0) if kind < 2 else np.ones(rows, bool)
    columns = int(rng.integers(1, config.text.length + 1))
    cross = _masked(rng, (rows, columns), config.text.length)
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
    stored, remembered = (slots, entries), (conditions, config.text.length)
    shapes = {"key_cache": stored, "value_cache": stored}
    shapes |= {"cross_key": remembered, "cross_value": remembered}
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


# Sequences of `RealSteps`, one a slot: a guided clip, its unconditional twin (PROMPTS[0], "none"),
# and a plain clip that starts three calls later.
GUIDED, TWIN, PLAIN = 0, 1, 2
_CONDITIONS = np.array([1, 0, 2])
_STARTS = (0, 0, 3)
SLOTS = len(_STARTS)


class RealSteps:
    """Wave-by-wave decoding of three sequences: what each call is fed, but for the caches.

    The caller runs the model and reports the tokens, which later calls are fed.
    """

    def __init__(self, config: ModelConfig, ids_CM: npt.NDArray[np.int32], seed: int = 0) -> None:
        self.config = config
        self.plan: DecodePlan = decode_plan(config.decoder, config.decoder.grid, "wave")
        self.calls = self.plan.steps + max(_STARTS)
        self._cross = cross_columns(config.text, ids_CM)
        self._tokens = np.full((SLOTS, config.decoder.grid.size + 1), config.bos)
        self._rng = np.random.default_rng(seed)

    def feeds(self, call: int) -> Feeds:
        """All row inputs of one call; rows are slot-major."""
        parts = [self._rows(slot, call) for slot in range(SLOTS)]
        slot = np.repeat(np.arange(SLOTS), [len(part) for part in parts])
        row, own = np.concatenate(parts), np.arange(len(slot))
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
                "cross_neighbours": self._cross[_CONDITIONS[slot]],
                "temperature": np.where(plain, 0.8, 1.0),
                "top_k": top_k,
                "top_p": top_p,
                "uniform": self._rng.random(len(row)),
                "guidance": np.where(guided, 3.0, 1.0),
                "unconditional_row": np.where(guided, own + len(parts[GUIDED]), own),
                "ranks": np.arange(sort_width(top_k, top_p, codebook)),
            }
        )

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


def cross_columns(text: TextConfig, ids_CM: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """int32 [C, m]: text positions that each condition's rows attend to, -1 past its padding."""
    lengths = (ids_CM != text.vocabulary_size - 1).sum(axis=1)
    used = lengths if text.mask_padding else np.full(len(ids_CM), ids_CM.shape[1])
    columns = np.arange(used.max(), dtype=np.int32)
    return np.where(columns < used[:, None], columns, MASKED).astype(np.int32)
