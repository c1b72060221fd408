"""The model: parameter count, causality, and one set of tokens whatever the way of decoding."""

import dataclasses

import numpy as np
import pytest
import torch

from nuwa.spec.config import (
    PRESETS,
    DecoderConfig,
    ModelConfig,
    TextConfig,
    VisualConfig,
    VQGANConfig,
)
from nuwa.spec.grid import FULL, Extent, Grid, neighbours, predecessors
from nuwa.spec.philox import uniforms
from nuwa.spec.plan import decode_plan
from nuwa.training.decode import generate
from nuwa.training.nuwa import NUWA
from nuwa.training.sampling import sample

SMALL = ModelConfig(
    name="small",
    image=VQGANConfig(
        resolution=16,
        base_channels=32,
        channel_multipliers=(1, 1, 1),
        attention_resolutions=(),
        codebook_size=48,
        embedding_dim=16,
        z_channels=16,
    ),
    text=TextConfig(vocabulary_size=40, length=12, width=16, layers=1, heads=2, mask_padding=True),
    decoder=DecoderConfig(
        grid=Grid(4, 4, 4),
        width=32,
        layers=3,
        heads=2,
        ff_multiplier=2,
        extents=(Extent(5, 3, 3),),
        relative_bias=True,
    ),
)


SEEING = dataclasses.replace(
    SMALL,
    sketch=dataclasses.replace(SMALL.image, channels=5, codebook_size=20, embedding_dim=8),
    visual=VisualConfig(layers=2, heads=2, ff_multiplier=2, relative_bias=True),
)


def model(config: ModelConfig, seed: int = 0) -> NUWA:
    """Random weights large enough for every layer to matter and tokens to vary."""
    torch.manual_seed(seed)
    nuwa = NUWA(config).eval()
    for parameter in nuwa.parameters():
        torch.nn.init.normal_(parameter, std=0.5 if parameter.dim() == 1 else 0.25)
    return nuwa


def text(config: ModelConfig, count: int) -> torch.Tensor:
    rows = torch.full((count, config.text.length), config.text.vocabulary_size - 1)
    rows[:, :5] = torch.randint(0, 30, (count, 5))
    return rows


def with_decoder(**changes) -> ModelConfig:
    return dataclasses.replace(SMALL, decoder=dataclasses.replace(SMALL.decoder, **changes))


def test_base_has_the_papers_parameter_count():
    with torch.device("meta"):
        nuwa = NUWA(PRESETS["base"])
    assert round(sum(p.numel() for p in nuwa.parameters()) / 1e6, 2) == 870.16


def test_logits_depend_on_earlier_tokens_only():
    """Changing a token moves the logits of exactly those positions that its value can reach."""
    nuwa, grid = model(SMALL), SMALL.decoder.grid
    ids = text(SMALL, 1)
    tokens = torch.randint(0, 48, (1, grid.size))
    table, before = neighbours(grid, Extent(5, 3, 3), causal=True), predecessors(grid)
    with torch.no_grad():
        base = nuwa(tokens, ids, grid)
        for changed in (0, 21, 63):
            other = tokens.clone()
            other[0, changed] = (tokens[0, changed] + 1) % 48
            moved = (nuwa(other, ids, grid) - base).abs().amax(-1)[0].numpy() > 1e-6
            reach = before == changed  # fed the token
            for _ in range(SMALL.decoder.layers):
                reach = reach | (reach[table] & (table >= 0)).any(1)
            assert (moved == reach).all()


OPTIONS = [
    {},
    {"top_k": 7},
    {"top_p": 0.6},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 0.0},
    {"guidance": 2.5},
]


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_waves_give_the_tokens_of_raster_order(frames, options):
    nuwa, grid, ids = model(SMALL), Grid(frames, 4, 4), text(SMALL, 5)
    if "guidance" in options:
        options = {**options, "unconditional_1M": text(SMALL, 1)}
    seeds = [11, 12, 13, 14, 15]
    wave = generate(nuwa, ids, grid, seeds=seeds, **options)
    raster = generate(nuwa, ids, grid, seeds=seeds, kind="raster", **options)
    assert torch.equal(wave, raster)
    assert wave.unique().numel() > 4


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        with_decoder(extents=(FULL, Extent(3, 3, 3), Extent(3, 1, 3))),
        with_decoder(shift="raster"),
        with_decoder(extents=(Extent(3, 5, 3),), relative_bias=False),
    ],
    ids=["nearby", "full and nearby", "raster shift", "tall window"],
)
def test_cached_decoding_equals_the_full_forward(config):
    """Each token is what the uncached model, fed all tokens, draws with the same uniform number."""
    nuwa, ids = model(config), text(config, 5)
    for frames in (1, 4):
        grid = Grid(frames, 4, 4)
        seeds = [1, 2, 3, 4, 5]
        tokens = generate(nuwa, ids, grid, seeds=seeds)
        with torch.no_grad():
            logits = nuwa(tokens, ids, grid).flatten(0, 1)
        rows = len(logits)
        draws = np.concatenate([uniforms(seed, 0, np.arange(grid.size)) for seed in seeds])
        again = sample(
            logits,
            torch.ones(rows),
            torch.zeros(rows, dtype=torch.int32),
            torch.ones(rows),
            torch.from_numpy(draws),
            torch.arange(1),
        )
        assert torch.equal(again.view_as(tokens).long(), tokens)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("frames", [1, 4])
def test_cached_decoding_with_a_visual_condition_equals_the_full_forward(frames, guidance):
    """Text and visual entries in one softmax, by window and by dense bands alike."""
    nuwa, ids, none = model(SEEING), text(SEEING, 3), text(SEEING, 1)
    grid, seeds = Grid(frames, 4, 4), [1, 2, 3]
    visual = torch.randint(0, SEEING.visual_ids, (3, grid.size))
    tokens = generate(
        nuwa,
        ids,
        grid,
        seeds=seeds,
        temperature=0.0,
        guidance=guidance,
        unconditional_1M=none,
        visual_BN=visual,
    )
    with torch.no_grad():
        logits = nuwa(tokens, ids, grid, visual)
        if guidance != 1.0:
            free = nuwa(tokens, none.expand(3, -1), grid, visual)
            logits = free + guidance * (logits - free)
    assert torch.equal(logits.argmax(-1), tokens)
    blind = generate(nuwa, ids, grid, seeds=seeds, temperature=0.0)
    assert (blind != tokens).float().mean() > 0.3


def test_rows_without_a_visual_condition_do_not_notice_those_with_one():
    nuwa, ids, grid = model(SEEING), text(SEEING, 3), SEEING.decoder.grid
    tokens = torch.randint(0, 48, (3, grid.size))
    visual = torch.randint(0, SEEING.visual_ids, (1, grid.size))
    with torch.no_grad():
        mixed = nuwa(tokens, ids, grid, visual)
        torch.testing.assert_close(mixed[1:], nuwa(tokens[1:], ids[1:], grid), atol=1e-4, rtol=1e-4)
        alone = nuwa(tokens[:1], ids[:1], grid, visual)
        torch.testing.assert_close(mixed[:1], alone, atol=1e-4, rtol=1e-4)
        assert (mixed[:1] - nuwa(tokens[:1], ids[:1], grid)).abs().max() > 0.1


def test_time_positions_go_round():
    nuwa, ids, grid = model(SMALL), text(SMALL, 2), Grid(3, 4, 4)
    tokens = torch.randint(0, 48, (2, grid.size))
    with torch.no_grad():
        plain = nuwa(tokens, ids, grid)
        frames = SMALL.decoder.grid.frames
        shifted = nuwa(tokens, ids, grid, time_B=torch.tensor([frames, 2]))
    torch.testing.assert_close(shifted[0], plain[0])
    assert (shifted[1] - plain[1]).abs().max() > 0.1


def test_uncached_raster_decoding_one_forward_a_token():
    nuwa, ids, grid = model(SMALL), text(SMALL, 1), Grid(1, 4, 4)
    tokens = torch.zeros(1, grid.size, dtype=torch.long)
    draws = torch.from_numpy(uniforms(3, 0, np.arange(grid.size)))
    with torch.no_grad():
        for p in range(grid.size):
            logits = nuwa(tokens, ids, grid)[:, p]
            one = torch.ones(1)
            none = torch.zeros(1, dtype=torch.int32)
            tokens[0, p] = sample(logits, one, none, one, draws[p : p + 1], torch.arange(1))[0]
    assert torch.equal(tokens, generate(nuwa, ids, grid, seeds=[3]))


def test_given_tokens_are_kept_and_the_rest_follows_them():
    nuwa, ids, grid = model(SMALL), text(SMALL, 1), SMALL.decoder.grid
    free = generate(nuwa, ids, grid, seeds=[3])
    known = torch.zeros(1, grid.size, dtype=torch.bool)
    known[:, :32] = True
    same = generate(nuwa, ids, grid, seeds=[3], known_BN=known, known_tokens_BN=free)
    assert torch.equal(same, free)
    given = (free + 1) % 48
    other = generate(nuwa, ids, grid, seeds=[3], known_BN=known, known_tokens_BN=given)
    assert torch.equal(other[:, :32], given[:, :32])
    assert not torch.equal(other[:, 32:], free[:, 32:])


def test_padding_does_not_matter():
    nuwa, ids, grid = model(SMALL), text(SMALL, 2), Grid(1, 4, 4)
    tokens = torch.randint(0, 48, (2, grid.size))
    with torch.no_grad():
        whole, cut = nuwa(tokens, ids, grid), nuwa(tokens, ids[:, :6], grid)
    torch.testing.assert_close(whole, cut, atol=1e-5, rtol=1e-5)


def test_steps_of_the_demo_model():
    decoder = PRESETS["sprites"].decoder
    assert decode_plan(decoder, Grid(10, 8, 8)).steps == 33
    assert decode_plan(decoder, Grid(1, 8, 8)).steps == 15
    assert decode_plan(decoder, Grid(10, 8, 8), "raster").steps == 640
    with pytest.raises(ValueError, match="1 to 10 frames of 8x8"):
        decode_plan(decoder, Grid(11, 8, 8))


def test_hidden_tokens_have_a_vector_for_each_visible_edge():
    levels = 3
    config = dataclasses.replace(
        SEEING, visual=dataclasses.replace(SEEING.visual, edge_levels=levels)
    )
    embedding = NUWA(config).visual.embedding
    with torch.no_grad():
        embedding.edges.normal_()
    table = embedding.table()
    assert len(table) == config.visual_ids == config.hidden + levels**4
    torch.testing.assert_close(table[config.hidden], embedding.hidden)
    digits = (2, 0, 1, 2)  # top, bottom, left, right
    number = sum(d * levels**p for d, p in zip(digits, (3, 2, 1, 0), strict=True))
    edges = sum(embedding.edges[side, d - 1] for side, d in enumerate(digits) if d)
    torch.testing.assert_close(table[config.hidden + number], embedding.hidden + edges)
