"""Two tiny models with random weights, as checkpoints and as bundles, made once a session.

`tiny_*` does all eight tasks and has a ranker; `plain_*` has neither sketches nor a visual encoder
nor a ranker.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# A shell that starts tests in the background has them ignore Ctrl-C, which some of them send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Beside other processes of tests (pytest-xdist): PyTorch's threads would wait for each other, and
# keep the cores busy with that, while those of the other processes have them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def ctrl_c_is_heard() -> Iterator[None]:
    """For tests that send SIGINT to their own process.

    Hypothesis has Python call it whenever garbage is collected, and an exception raised in there,
    as by a signal that arrives just then, is lost.
    """
    gc.disable()
    yield
    gc.enable()


CAPTIONS = (
    "a red digit 3 moves left to right on black",
    "a green digit 7 moves up then down",
    "a blue cat stands still",
    "none",
)


def make_tiny_checkpoint(
    folder: Path, *, visual: bool = True, codes: int = 64, **decoder: Any
) -> Path:
    """Writes a checkpoint: 2 layers of width 32 on a grid 3x4x4, 16x16 pixels, 64 codes.

    decoder: what is different in its DecoderConfig. With `visual`, also sketches of 5 classes in 48
    codes, a visual encoder of 1 layer and a ranker.
    Random weights, large enough that sampled tokens vary and every part shows in the logits.
    """
    torch = pytest.importorskip("torch")
    from nuwa.spec.config import DecoderConfig, ModelConfig, TextConfig, VisualConfig, VQGANConfig
    from nuwa.spec.grid import Extent, Grid
    from nuwa.spec.tasks import Task
    from nuwa.training.checkpoint import save_checkpoint
    from nuwa.training.nuwa import NUWA
    from nuwa.training.ranker import Ranker, RankerConfig, save_ranker, tokenizer_digest
    from nuwa.training.text import train_text_tokenizer
    from nuwa.training.vqgan import VQGAN

    tokenizer = train_text_tokenizer(CAPTIONS, 270)
    image = VQGANConfig(
        resolution=16,
        base_channels=32,
        channel_multipliers=(1, 1, 1),
        res_blocks=1,
        attention_resolutions=(),
        z_channels=16,
        embedding_dim=16,
        codebook_size=codes,
    )
    config = ModelConfig(
        name="tiny",
        image=image,
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
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **decoder))
    if visual:
        config = dataclasses.replace(
            config,
            tasks=tuple(Task),
            sketch=dataclasses.replace(image, channels=5, embedding_dim=8, codebook_size=48),
            visual=VisualConfig(
                layers=1,
                heads=4,
                ff_multiplier=2,
                extent=Extent(3, 3, 3),
                relative_bias=True,
                edge_levels=2,
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
            for name, parameter in nuwa.named_parameters():
                if name.endswith(
                    ("cross_bias", "blocks.0.bias", "blocks.1.bias", "hidden", "edges")
                ):
                    parameter.normal_()
            nuwa.embedding.codes.weight.normal_()
            nuwa.embedding.bos.normal_()
            nuwa.text.embedding.weight.normal_()
            nuwa.head.weight.mul_(2.0)
            vqgan.quantize.embedding.weight.normal_(std=0.5)
            if nuwa.visual is not None:
                nuwa.visual.embedding.codes.weight.normal_()
                nuwa.visual.embedding.sketches.weight.normal_()
                nuwa.visual.project.weight.mul_(2.0)
        sketch = None if config.sketch is None else VQGAN(config.sketch)
        ranker = Ranker(
            RankerConfig(
                text=dataclasses.replace(config.text, layers=1),
                resolution=16,
                widths=(8, 16),
                blocks=1,
                width=16,
                embedding=16,
                tokenizer=tokenizer_digest(tokenizer),
            )
        )
        if sketch is not None:
            torch.nn.init.normal_(sketch.quantize.embedding.weight, std=0.5)
    provenance = {"data": "random weights, untrained", "licence": "CC0-1.0"}
    save_checkpoint(folder, config, vqgan, nuwa, tokenizer, provenance, sketch_vqgan=sketch)
    if visual:
        save_ranker(ranker, folder)
    return folder


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """A test that runs a command also sets up the package's log, on a stderr that ends with it."""
    log = logging.getLogger("nuwa")
    handlers, propagate, level = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate = handlers, propagate
    log.setLevel(level)


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


@pytest.fixture(scope="session")
def plain_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the plain tiny checkpoint; do not write into it."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "plain", visual=False)


@pytest.fixture(scope="session")
def plain_bundle(plain_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the plain checkpoint's fp32 bundle; do not write into it."""
    pytest.importorskip("onnx")
    from nuwa.export.bundle import export_bundle

    folder = tmp_path_factory.mktemp("bundle") / "plain"
    export_bundle(plain_checkpoint, folder)
    return folder
