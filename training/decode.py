"""Position-by-position decoding with a cache: the modules that are exported, and a reference loop.

`DecoderStep` and `TextConditions` have tensors-only signatures, one ONNX graph each. `generate`
drives them in PyTorch by the same plans as the runtime does.

Legend: T positions of a call, S cache slots, R entries, C condition slots, M text length, L layers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from nuwa.spec.grid import Grid
from nuwa.spec.philox import uniforms
from nuwa.spec.plan import DecodePlan, decode_plan

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
            attended = torch.ops.nuwa.nearby_attention(
                block.cross_query(x_Td),
                cross_keys[layer],
                cross_values[layer],
                condition_slot,
                cross_neighbours,
                None,
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
) -> Tensor:
    """Tokens int64 [B, N] of B volumes decoded together, one slot each.

    text_BM: condition ids; seeds: one per volume; guidance other than 1 needs `unconditional_1M`,
    the ids of the prompt "none"; known_BN bool and known_tokens_BN: tokens that are given.
    """
    plan = decode_plan(nuwa.config.decoder, grid, kind)
    batch = text_BM.shape[0]
    guided = guidance != 1.0
    assert not guided or unconditional_1M is not None, "guidance needs an unconditional prompt"
    rows = text_BM
    if unconditional_1M is not None and guided:
        rows = torch.cat([text_BM, unconditional_1M.expand(batch, -1)])
    conditions = TextConditions(nuwa)(rows)
    used = (rows != nuwa.text.pad).sum(1)
    if not nuwa.config.text.mask_padding:
        used = torch.full_like(used, rows.shape[1])
    columns = torch.arange(int(used.max()))
    cross_BM = torch.where(columns < used[:, None], columns, -1).to(torch.int32)

    slots = rows.shape[0]
    width, layers = nuwa.config.decoder.width, nuwa.config.decoder.layers
    shape = (slots, plan.schedule.entries, width)
    caches = [[torch.zeros(shape) for _ in range(layers)] for _ in range(2)]
    grid_tokens = np.full((batch, grid.size + 1), nuwa.config.bos, np.int64)
    given = np.zeros((batch, grid.size), bool) if known_BN is None else known_BN.numpy()
    if known_tokens_BN is not None:
        grid_tokens[:, :-1][given] = known_tokens_BN.numpy()[given]
    draws = np.stack([uniforms(seed, 0, np.arange(grid.size)) for seed in seeds])
    step = DecoderStep(nuwa)
    ranks = torch.arange(sort_width([top_k], [top_p], nuwa.config.image.codebook_size))
    for call in range(plan.steps):
        part = plan.rows(call)
        tokens, *caches = _call(
            step, plan, part, slots, batch, grid_tokens, draws, caches, conditions, cross_BM,
            (temperature, top_k, top_p, guidance), ranks,
        )  # fmt: skip
        position = plan.position[part]
        drawn = tokens.numpy().reshape(slots, -1)[:batch]
        free = ~given[:, position]
        grid_tokens[:, position] = np.where(free, drawn, grid_tokens[:, position])
    return torch.from_numpy(grid_tokens[:, :-1])


def _call(
    step: DecoderStep,
    plan: DecodePlan,
    part: slice,
    slots: int,
    batch: int,
    grid_tokens: np.ndarray,
    draws: np.ndarray,
    caches: list[list[Tensor]],
    conditions: tuple[list[Tensor], list[Tensor]],
    cross_BM: Tensor,
    options: tuple[float, int, float, float],
    ranks: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One wave of every slot: rows are slot-major; guided slots follow the `batch` plain ones."""
    temperature, top_k, top_p, guidance = options
    width = part.stop - part.start
    slot = torch.arange(slots, dtype=torch.int32).repeat_interleave(width)
    owner = np.arange(slots) % batch

    def tile(table: np.ndarray) -> Tensor:
        return torch.from_numpy(np.tile(table[part], (slots,) + (1,) * (table.ndim - 1)))

    rows = torch.arange(slots * width)
    # In a guided call row r of slot s < batch is guided by the same row of slot s + batch.
    partner = torch.where(rows < batch * width, rows + (slots - batch) * width, rows)
    fed = grid_tokens[owner[:, None], plan.fed[part][None, :]].reshape(-1)
    tokens, _, keys, values = step(
        torch.from_numpy(fed),
        tile(plan.coordinates),
        slot,
        tile(plan.write_index),
        tile(plan.neighbours),
        slot,
        cross_BM[slot.long()],
        torch.full((len(rows),), temperature),
        torch.full((len(rows),), top_k, dtype=torch.int32),
        torch.full((len(rows),), top_p),
        torch.from_numpy(draws[owner][:, plan.position[part]].reshape(-1)),
        torch.full((len(rows),), guidance),
        partner,
        ranks,
        caches[0],
        caches[1],
        *conditions,
    )
    return tokens, keys, values
