"""Checkpoints with random weights: hardware and code paths can be timed without training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from nuwa.spec.config import DecoderConfig, ModelConfig, TextConfig, VQGANConfig
from nuwa.spec.grid import Extent, Grid

from .checkpoint import save_checkpoint
from .nuwa import NUWA
from .text import train_text_tokenizer
from .vqgan import VQGAN


def config(grid: Grid, *, width: int, layers: int, heads: int, codebook: int) -> ModelConfig:
    """A small model of this grid (square, f8), window 3x3x3, feed-forward as the paper's."""
    return ModelConfig(
        name=f"random-{grid}",
        image=VQGANConfig(
            resolution=8 * grid.width,
            base_channels=32,
            channel_multipliers=(1, 1, 2, 4),
            res_blocks=1,
            attention_resolutions=(),
            z_channels=64,
            embedding_dim=64,
            codebook_size=codebook,
        ),
        text=TextConfig(vocabulary_size=512, width=128, layers=2, heads=2, mask_padding=True),
        decoder=DecoderConfig(
            grid=grid, width=width, layers=layers, heads=heads, extents=(Extent(3, 3, 3),)
        ),
    )


def write_random_checkpoint(folder: Path, model: ModelConfig, seed: int = 0) -> None:
    """A whole checkpoint whose every layer matters and whose tokens vary."""
    torch.manual_seed(seed)
    text = train_text_tokenizer(["a red 3 on a black background moving left ."], 300)
    model = dataclasses.replace(
        model, text=dataclasses.replace(model.text, vocabulary_size=text.vocabulary_size)
    )
    nuwa = NUWA(model)
    for module in nuwa.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    for block in nuwa.blocks:
        for scale in (block.self_scale, block.cross_scale, block.ff_scale):
            torch.nn.init.constant_(scale, 0.5)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        folder,
        model,
        VQGAN(model.image),
        nuwa,
        text,
        {"data": "none: random weights", "licence": "Apache-2.0"},
        dtype=torch.float32,
    )
