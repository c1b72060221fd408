"""Position-by-position decoding with a cache: the modules that are exported, and a reference loop.

`DecoderStep`, `TextConditions` and `VisualConditions` have tensors-only signatures, one ONNX graph
each. `generate` drives them in PyTorch by the same plans as the runtime does.

Legend: T positions of a call, S cache slots, R entries, C condition slots, M text length, L layers,
N positions of a volume, m columns of cross attention.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from nuwa.spec.conditions import ConditionLayout, visual_columns, visual_neighbours, visual_window
from nuwa.spec.config import ModelConfig
from nuwa.spec.grid import MASKED, Grid
from nuwa.spec.philox import uniforms
from nuwa.spec.plan import Call, Plan, RollingPlan, decode_plan

from .nuwa import NUWA
from .sampling import guide, sample, sort_width


class TextConditions(nn.Module):
    """ids int [B, M] -> cross-attention keys and values, L tensors [B, M, d] each."""

    def __init__(self, nuwa: NUWA) -> None:
        super().__init__()
        self.nuwa = nuwa

    def forward(self, ids_BM: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        memory = self.nuwa.text(ids_BM)
        pairs = [block.cross_memory(memory) for block in self.nuwa.blocks]
        return [key for key, _ in pairs], [value for _, value in pairs]


class VisualConditions(nn.Module):
    """Visual ids int [N] of volumes one after the other -> keys and values, L tensors [N, d] each.

    coordinates int [N, 3]; neighbours int [N, n]: rows of the nearby set, -1 masked.
    """

    def __init__(self, nuwa: NUWA) -> None:
        super().__init__()
        self.nuwa = nuwa

    def forward(
        self, tokens_N: Tensor, coordinates_N3: Tensor, neighbours_Nn: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        encoder = self.nuwa.visual
        assert encoder is not None, "this model has no visual encoder"
        x_Nd = encoder.embedding(tokens_N, coordinates_N3)
        slot_N = torch.zeros_like(tokens_N, dtype=torch.int32)
        for block in encoder.blocks:
            query, key, value = block.self_project(x_Nd)
            attended = torch.ops.nuwa.nearby_attention(
                query, key[None], value[None], slot_N, neighbours_Nn, block.bias, encoder.heads
            )
            x_Nd = block.after_self(x_Nd, attended)
        memory = encoder.memory(x_Nd)
        pairs = [block.cross_memory(memory) for block in self.nuwa.blocks]
        return [key for key, _ in pairs], [value for _, value in pairs]


class DecoderStep(nn.Module):
    """One call of the decoder: T positions of any mix of sequences in, T tokens out.

    Inputs as in the bundle's `decoder_step`. Returns tokens int32 [T], guided logits [T, K] and
    the updated caches.
    """

    def __init__(self, nuwa: NUWA) -> None:
        super().__init__()
        self.nuwa = nuwa

    def forward(
        self,
        tokens: Tensor,
        coordinates: Tensor,
        slot: Tensor,
        write_index: Tensor,
        neighbours: Tensor,
        condition_slot: Tensor,
        cross_neighbours: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        uniform: Tensor,
        guidance: Tensor,
        unconditional_row: Tensor,
        ranks: Tensor,
        cross_columns: Tensor | None,
        key_caches: list[Tensor],
        value_caches: list[Tensor],
        cross_keys: list[Tensor],
        cross_values: list[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        config = self.nuwa.config.decoder
        x_Td = self.nuwa.embedding(tokens, coordinates)
        keys_out, values_out = [], []
        for layer, block in enumerate(self.nuwa.blocks):
            start, stop = config.neighbour_columns(layer)
            nearby = neighbours if len(config.window_extents) == 1 else neighbours[:, start:stop]
            query, key, value = block.self_project(x_Td)
            attended, key_cache, value_cache = torch.ops.nuwa.cached_nearby_attention(
                query,
                key,
                value,
                key_caches[layer],
                value_caches[layer],
                slot,
                write_index,
                nearby,
                block.bias,
                config.heads,
            )
            keys_out.append(key_cache)
            values_out.append(value_cache)
            x_Td = block.after_self(x_Td, attended)
            bias = block.cross_bias_table()
            if bias is not None:
                assert cross_columns is not None, "a model with a visual encoder needs columns"
                bias = bias.index_select(1, cross_columns)  # exported as one Gather
            attended = torch.ops.nuwa.nearby_attention(
                block.cross_query(x_Td),
                cross_keys[layer],
                cross_values[layer],
                condition_slot,
                cross_neighbours,
                bias,
                config.heads,
            )
            x_Td = block.after_cross(x_Td, attended)
        logits_TK = guide(self.nuwa.logits(x_Td).float(), guidance, unconditional_row)
        token_T = sample(logits_TK, temperature, top_k, top_p, uniform, ranks)
        return token_T, logits_TK, keys_out, values_out


@torch.no_grad()
def generate(
    nuwa: NUWA,
    text_BM: Tensor,
    grid: Grid,
    *,
    seeds: list[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
    unconditional_1M: Tensor | None = None,
    kind: str = "wave",
    known_BN: Tensor | None = None,
    known_tokens_BN: Tensor | None = None,
    visual_BN: Tensor | None = None,
) -> Tensor:
    """Tokens int64 [B, N] of B volumes decoded together, one slot each.

    text_BM: condition ids; seeds: one per volume; guidance other than 1 needs `unconditional_1M`,
    the ids of the prompt "none"; known_BN bool and known_tokens_BN: tokens that are given;
    visual_BN: the visual encoder's ids. A grid of more frames than the config has goes on as the
    runtime does it.
    """
    decoder = nuwa.config.decoder
    plan: Plan = (
        RollingPlan(decoder, grid.frames, kind=kind)
        if grid.frames > decoder.grid.frames
        else decode_plan(decoder, grid, kind)
    )
    batch, guided = text_BM.shape[0], guidance != 1.0
    assert not guided or unconditional_1M is not None, "guidance needs an unconditional prompt"
    none_1M = unconditional_1M if guided else None
    conditions = _Conditions(nuwa, grid, text_BM, none_1M, visual_BN)
    slots = 2 * batch if guided else batch
    shape = (slots, plan.entries, decoder.width)
    caches = [[torch.zeros(shape) for _ in range(decoder.layers)] for _ in range(2)]
    grid_tokens = np.full((batch, grid.size + 1), nuwa.config.bos, np.int64)
    given = np.zeros((batch, grid.size), bool) if known_BN is None else known_BN.numpy()
    if known_tokens_BN is not None:
        grid_tokens[:, :-1][given] = known_tokens_BN.numpy()[given]
    draws = np.stack([uniforms(seed, 0, np.arange(grid.size)) for seed in seeds])
    step = DecoderStep(nuwa)
    ranks = torch.arange(sort_width([top_k], [top_p], nuwa.config.image.codebook_size))
    for number in range(plan.steps):
        call = plan.call(number)
        tokens, *caches = _call(
            step, call, slots, batch, grid_tokens, draws, caches, conditions,
            (temperature, top_k, top_p, guidance), ranks,
        )  # fmt: skip
        drawn = tokens.numpy().reshape(slots, -1)[:batch]
        free = ~given[:, call.position]
        grid_tokens[:, call.position] = np.where(free, drawn, grid_tokens[:, call.position])
    return torch.from_numpy(grid_tokens[:, :-1])


class _Conditions:
    """Condition slots of B volumes, one each: keys, values, and what every position attends to.

    Rows of guided partners follow those of the volumes: same slot, `none` instead of the text.
    """

    def __init__(
        self,
        nuwa: NUWA,
        grid: Grid,
        text_BM: Tensor,
        none_1M: Tensor | None,
        visual_BN: Tensor | None,
    ) -> None:
        config = nuwa.config
        layout = ConditionLayout.of(config)
        batch, width = text_BM.shape[0], config.decoder.width
        shape = (batch, layout.entries, width)
        self.keys = [torch.zeros(shape) for _ in range(config.decoder.layers)]
        self.values = [torch.zeros(shape) for _ in range(config.decoder.layers)]
        rows = [_used(config, nuwa.text.pad, text_BM, layout.text)]
        self._put(TextConditions(nuwa)(text_BM), layout.text)
        if none_1M is not None:
            none_BM = none_1M.expand(batch, -1)
            self._put(TextConditions(nuwa)(none_BM), layout.none)
            rows.append(_used(config, nuwa.text.pad, none_BM, layout.none))
        self._text_Sm = torch.cat(rows)
        self._window_Nv: Tensor | None = None
        columns = torch.full((self._text_Sm.shape[1],), visual_columns(config))
        if visual_BN is not None:
            near = torch.from_numpy(visual_neighbours(config, grid))
            coordinates = torch.from_numpy(grid.coordinates())
            see = VisualConditions(nuwa)
            for b in range(batch):
                pairs = see(visual_BN[b], coordinates, near)
                for stored, made in zip((self.keys, self.values), pairs, strict=True):
                    for layer, part in zip(stored, made, strict=True):
                        layer[b, layout.visual : layout.visual + grid.size] = part
            self._window_Nv = torch.from_numpy(visual_window(config, grid))
            columns = torch.cat([torch.arange(visual_columns(config)), columns])
        self.columns = None if config.visual is None else columns

    def _put(self, pairs: tuple[list[Tensor], list[Tensor]], start: int) -> None:
        for stored, made in zip((self.keys, self.values), pairs, strict=True):
            for layer, part in zip(stored, made, strict=True):
                layer[:, start : start + part.shape[1]] = part

    def neighbours(self, lane: np.ndarray, position: np.ndarray) -> Tensor:
        """int32 [T, m] for rows of these lanes (guided partners after the volumes)."""
        text_Tm = self._text_Sm[torch.from_numpy(lane)]
        if self._window_Nv is None:
            return text_Tm
        return torch.cat([self._window_Nv[torch.from_numpy(position).long()], text_Tm], dim=1)


def _used(config: ModelConfig, pad: int, ids_BM: Tensor, start: int) -> Tensor:
    """int32 [B, m]: entries, from `start`, of the text positions that count; -1 beyond them."""
    used_B = (ids_BM != pad).sum(1)
    if not config.text.mask_padding:
        used_B = torch.full_like(used_B, ids_BM.shape[1])
    columns = torch.arange(ids_BM.shape[1])
    return torch.where(columns < used_B[:, None], columns + start, MASKED).to(torch.int32)


def _call(
    step: DecoderStep,
    call: Call,
    slots: int,
    batch: int,
    grid_tokens: np.ndarray,
    draws: np.ndarray,
    caches: list[list[Tensor]],
    conditions: _Conditions,
    options: tuple[float, int, float, float],
    ranks: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One wave of every slot: rows are slot-major; guided slots follow the `batch` plain ones."""
    temperature, top_k, top_p, guidance = options
    width = len(call.position)
    lane = np.arange(slots).repeat(width)
    owner = np.arange(slots) % batch

    def tile(table: np.ndarray) -> Tensor:
        return torch.from_numpy(np.tile(table, (slots,) + (1,) * (table.ndim - 1)))

    rows = torch.arange(slots * width)
    # In a guided call row r of slot s < batch is guided by the same row of slot s + batch.
    partner = torch.where(rows < batch * width, rows + (slots - batch) * width, rows)
    fed = grid_tokens[owner[:, None], call.fed[None, :]].reshape(-1)
    tokens, _, keys, values = step(
        torch.from_numpy(fed),
        tile(call.coordinates),
        torch.from_numpy(lane.astype(np.int32)),
        tile(call.write_index),
        tile(call.neighbours),
        torch.from_numpy((lane % batch).astype(np.int32)),
        conditions.neighbours(lane, np.tile(call.position, slots)),
        torch.full((len(rows),), temperature),
        torch.full((len(rows),), top_k, dtype=torch.int32),
        torch.full((len(rows),), top_p),
        torch.from_numpy(draws[owner][:, call.position].reshape(-1)),
        torch.full((len(rows),), guidance),
        partner,
        ranks,
        conditions.columns,
        caches[0],
        caches[1],
        conditions.keys,
        conditions.values,
    )
    return tokens, keys, values
