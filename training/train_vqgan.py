"""Recipe that trains a VQ-GAN: autoencoder warm-up, then codes, then the discriminator.

One recipe for pictures and for class maps; vqgan_content.py is where they differ.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nuwa.spec.config import VQGANConfig

from .averaging import WeightAverage
from .codebook import CodebookAverage
from .pictures import contact_sheet, save_png
from .vqgan import VQGAN
from .vqgan_content import Content
from .vqgan_losses import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    quantization_loss,
)


class Source(Protocol):
    """Samples by number: the same number is the same picture or class map in every run."""

    def __call__(self, first: int, count: int) -> np.ndarray:
        """uint8 [count, H, W, 3], or [count, H, W] for class maps."""


@dataclass(frozen=True)
class VQGANOptions:
    """batch in pictures; learning rates are peaks; steps are optimiser steps.

    The codebook joins at `quantize_from`, the discriminator at `discriminator_from` (None: never).
    `codebook` "ema" sets codes by moving averages, "gradient" by the codebook loss (the paper's);
    codebook_decay, revive_below: see codebook.CodebookAverage, a larger codebook wants a slower
    decay and a lower revive_below.
    """

    batch: int = 32
    lr: float = 1e-3
    discriminator_lr: float = 2e-4
    quantize_from: int = 100
    discriminator_from: int | None = None
    discriminator_weight: float = 0.8
    discriminator_width: int = 32
    beta: float = 0.25
    codebook: str = "ema"
    codebook_decay: float = 0.99
    revive_below: float = 0.1
    average: float = 0.995
    bf16: bool = True

    def __post_init__(self) -> None:
        if self.codebook not in ("ema", "gradient"):
            raise ValueError(f"codebook {self.codebook!r} is not one of 'ema', 'gradient'")
        if not (0.0 < self.codebook_decay < 1.0 and self.revive_below > 0.0):
            raise ValueError(
                f"codebook_decay {self.codebook_decay} is not in (0, 1), or revive_below "
                f"{self.revive_below} not above 0"
            )
        if self.batch < 1:
            raise ValueError(f"batch {self.batch} is not at least 1")


def _initialise(module: nn.Module) -> None:
    """Unit gain: PyTorch's default shrinks the signal at every convolution off the skip path."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class VQGANRecipe:
    """See trainer.Recipe."""

    def __init__(
        self,
        config: VQGANConfig,
        options: VQGANOptions,
        content: Content,
        source: Source,
        *,
        start: VQGAN | None = None,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.options, self.content, self.source = options, content, source
        self.device = torch.device(device)
        self.model = VQGAN(config).to(self.device)
        self.model.apply(_initialise)
        self._kept = 0 if start is None else _load_start(self.model, start)
        self.model.quantize.embedding.weight.requires_grad_(options.codebook == "gradient")
        self.codebook = CodebookAverage(
            self.model.quantize, options.codebook_decay, options.revive_below
        ).to(self.device)
        self.average = WeightAverage(self.model, options.average)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=options.lr,
            betas=(0.9, 0.99),
            weight_decay=1e-4,
        )
        self.discriminator = PatchDiscriminator(config.channels, options.discriminator_width).to(
            self.device
        )
        self.discriminator_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=options.discriminator_lr, betas=(0.5, 0.9)
        )

    def step(self, step: int, lr_factor: float) -> dict[str, float]:
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * lr_factor
        samples = torch.from_numpy(self.source(step * options.batch, options.batch))
        inputs = self.content.inputs(samples.to(self.device))
        adversarial = options.discriminator_from is not None and step >= options.discriminator_from
        with self._autocast():
            features = self.model.features(inputs).float()
            quantized, codes = self._quantize(features, step)
            output = self.model.decode_features(quantized).float()
        error_BHW = self.content.error(inputs, output)
        loss = reconstruction = error_BHW.mean() + self.content.perceived(inputs, output)
        metrics: dict[str, float] = {}
        if codes is not None:
            metrics["codes_used"] = float(codes.unique().numel())
            embedded = self.model.embed(codes)
            if options.codebook == "ema":
                loss = loss + options.beta * F.mse_loss(features, embedded.detach())
            else:
                loss = loss + quantization_loss(features, embedded, options.beta)
        if adversarial:
            with self._autocast():
                generator = -self.discriminator(output).float().mean()
            last = self.model.decoder.conv_out.weight
            weight = adaptive_weight(reconstruction, generator, last)
            loss = loss + options.discriminator_weight * weight * generator
            metrics |= {"generator": float(generator.detach()), "adaptive_weight": float(weight)}
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if codes is not None and options.codebook == "ema":
            _, h, w = codes.shape
            cost_Bhw = F.adaptive_avg_pool2d(error_BHW.detach()[:, None], (h, w))
            rows = _rows(features), codes.flatten(), cost_Bhw.flatten()
            metrics["revived"] = float(self.codebook.update(*rows))
        if adversarial:
            metrics["discriminator"] = self._train_discriminator(inputs, output.detach())
        self.average.update(step)
        quality = self.content.quality(inputs, output.detach())
        return {"loss": float(reconstruction.detach()), **quality, **metrics}

    def _quantize(self, features: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Straight-through quantized features [B, E, h, w] and codes [B, h, w].

        Features themselves, and no codes, before the codebook joins.
        """
        if step < self.options.quantize_from:
            return features, None
        rows = _rows(features)
        if step == self.options.quantize_from:
            self.codebook.initialise(rows, self._kept)
            self.average.copy()
        batch, _, h, w = features.shape
        with torch.autocast(self.device.type, enabled=False):
            codes = self.model.quantize.codes(rows).view(batch, h, w)
        return features + (self.model.embed(codes) - features).detach(), codes

    def _train_discriminator(self, real: Tensor, fake: Tensor) -> float:
        with self._autocast():
            loss = discriminator_loss(
                self.discriminator(real).float(), self.discriminator(fake).float()
            )
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.discriminator_optimizer.step()
        return float(loss.detach())

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.options.bf16)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict(),
            "codebook": self.codebook.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(state["average"])
        self.codebook.load_state_dict(state["codebook"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        model = copy.deepcopy(self.average.model).eval()
        samples = torch.from_numpy(self.source(0, 16)).to(self.device)
        output = model.decode(model.encode(self.content.inputs(samples)).codes)
        save_png(path, contact_sheet(self.content.pictures(samples, output), 16, scale=2))

    def export(self, folder: Path) -> None:
        from .checkpoint import save_tokenizer

        save_tokenizer(self.average.model, folder)


def _rows(features: Tensor) -> Tensor:
    """[B, E, h, w] -> [B h w, E], apart from the graph."""
    return features.detach().permute(0, 2, 3, 1).reshape(-1, features.shape[1])


@torch.no_grad()
def _load_start(model: VQGAN, start: VQGAN) -> int:
    """Begins at another VQ-GAN's weights; returns how many codes it has, which come first.

    ValueError unless only the codebook is larger.
    """
    ours, theirs = model.config, start.config
    same = dataclasses.replace(theirs, codebook_size=ours.codebook_size) == ours
    if not same or theirs.codebook_size > ours.codebook_size:
        raise ValueError(
            f"the VQ-GAN to start from has another shape ({theirs}); it may only have fewer codes "
            f"than {ours}"
        )
    state = start.state_dict()
    codes = state.pop("quantize.embedding.weight")
    model.load_state_dict(state, strict=False)
    model.quantize.embedding.weight[: len(codes)] = codes
    return len(codes)
