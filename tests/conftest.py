"""A tiny model with random weights, as a checkpoint and as a bundle, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

CAPTIONS = (
    "a red digit 3 moves left to right on black",
    "a green digit 7 moves up then down",
    "a blue cat stands still",
    "none",
)


def make_tiny_checkpoint(folder: Path) -> Path:
    """Writes a checkpoint: 2 layers of width 32 on a grid 3x4x4, 16x16 pixels, 64 codes.

    Random weights, large enough that sampled tokens vary and every part shows in the logits.
    """
    torch = pytest.importorskip("torch")
    from nuwa.spec.config import DecoderConfig, ModelConfig, TextConfig, VQGANConfig
    from nuwa.spec.grid import Extent, Grid
    from nuwa.training.checkpoint import save_checkpoint
    from nuwa.training.nuwa import NUWA
    from nuwa.training.text import train_text_tokenizer
    from nuwa.training.vqgan import VQGAN

    tokenizer = train_text_tokenizer(CAPTIONS, 270)
    config = ModelConfig(
        name="tiny",
        image=VQGANConfig(
            resolution=16,
            base_channels=32,
            channel_multipliers=(1, 1, 1),
            res_blocks=1,
            attention_resolutions=(),
            z_channels=16,
            embedding_dim=16,
            codebook_size=64,
        ),
        text=TextConfig(
            vocabulary_size=tokenizer.vocabulary_size,
            width=32,
            layers=1,
            heads=2,
            mask_padding=True,
        ),
        decoder=DecoderConfig(
            grid=Grid(3, 4, 4),
            width=32,
            layers=2,
            heads=2,
            ff_multiplier=2,
            extents=(Extent(3, 3, 3),),
            relative_bias=True,
        ),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nuwa, vqgan = NUWA(config), VQGAN(config.image)
        with torch.no_grad():
            for name, parameter in nuwa.named_parameters():
                if name.endswith("_scale"):
                    parameter.fill_(1.0)
                elif parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
            for block in nuwa.blocks:
                block.bias.normal_()
            nuwa.embedding.codes.weight.normal_()
            nuwa.embedding.bos.normal_()
            nuwa.text.embedding.weight.normal_()
            nuwa.head.weight.mul_(2.0)
            vqgan.quantize.embedding.weight.normal_(std=0.5)
    provenance = {"data": "random weights, untrained", "licence": "CC0-1.0"}
    save_checkpoint(folder, config, vqgan, nuwa, tokenizer, provenance)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny checkpoint; do not write into it."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny checkpoint's fp32 bundle; do not write into it."""
    pytest.importorskip("onnx")
    from nuwa.export.bundle import export_bundle

    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    export_bundle(tiny_checkpoint, folder)
    return folder
