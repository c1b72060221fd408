"""Recipe that trains a VQ-GAN: autoencoder warm-up, then codes, then the discriminator."""

from __future__ import annotations

import copy
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
from .vqgan import VQGAN, to_bytes, to_signed
from .vqgan_losses import (
    PatchDiscriminator,
    Perceptual,
    adaptive_weight,
    discriminator_loss,
    quantization_loss,
    reconstruction_loss,
)


class PictureSource(Protocol):
    """Pictures by number: the same number is the same picture in every run."""

    def __call__(self, first: int, count: int) -> np.ndarray:
        """uint8 [count, H, W, 3]."""


@dataclass(frozen=True)
class VQGANOptions:
    """batch in pictures; learning rates are peaks; steps are optimiser steps.

    The codebook joins at `quantize_from`, the discriminator at `discriminator_from` (None: never).
    `codebook` "ema" sets codes by moving averages, "gradient" by the codebook loss (the paper's).
    """

    batch: int = 32
    lr: float = 1e-3
    discriminator_lr: float = 2e-4
    quantize_from: int = 100
    discriminator_from: int | None = None
    discriminator_weight: float = 0.8
    discriminator_width: int = 32
    beta: float = 0.25
    emphasis: float = 0.0
    square: float = 0.0
    codebook: str = "ema"
    average: float = 0.995
    bf16: bool = True

    def __post_init__(self) -> None:
        if self.codebook not in ("ema", "gradient"):
            raise ValueError(f"codebook {self.codebook!r} is not one of 'ema', 'gradient'")
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
        pictures: PictureSource,
        *,
        perceptual: Perceptual | None = None,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.options, self.pictures, self.perceptual = options, pictures, perceptual
        self.device = torch.device(device)
        self.model = VQGAN(config).to(self.device)
        self.model.apply(_initialise)
        self.model.quantize.embedding.weight.requires_grad_(options.codebook == "gradient")
        self.codebook = CodebookAverage(self.model.quantize).to(self.device)
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
        raw = torch.from_numpy(self.pictures(step * options.batch, options.batch))
        pixels = to_signed(raw.to(self.device))
        adversarial = options.discriminator_from is not None and step >= options.discriminator_from
        with self._autocast():
            features = self.model.features(pixels).float()
            quantized, metrics = self._quantize(features, step)
            output = self.model.decode_features(quantized).float()
        loss = reconstruction = reconstruction_loss(
            pixels, output, self.perceptual, emphasis=options.emphasis, square=options.square
        )
        if step >= options.quantize_from:
            codebook_beta = options.beta
            embedded = self.model.embed(self._codes(features))
            if options.codebook == "ema":
                loss = loss + codebook_beta * F.mse_loss(features, embedded.detach())
            else:
                loss = loss + quantization_loss(features, embedded, codebook_beta)
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
        if adversarial:
            metrics["discriminator"] = self._train_discriminator(pixels, output.detach())
        self.average.update(step)
        error = F.mse_loss(output.detach().clamp(-1, 1), pixels)
        return {
            "loss": float(reconstruction.detach()),
            "psnr": float(10.0 * torch.log10(4.0 / error)),
            **metrics,
        }

    def _quantize(self, features: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        """Straight-through quantized features; features themselves before the codebook joins."""
        options = self.options
        if step < options.quantize_from:
            return features, {}
        rows = features.detach().permute(0, 2, 3, 1).reshape(-1, features.shape[1])
        if step == options.quantize_from:
            self.codebook.initialise(rows)
            self.average.copy()
        codes = self._codes(features)
        embedded = self.model.embed(codes)
        metrics = {"codes_used": float(codes.unique().numel())}
        if options.codebook == "ema":
            metrics["revived"] = float(self.codebook.update(rows, codes.flatten()))
        return features + (embedded - features).detach(), metrics

    def _codes(self, features: Tensor) -> Tensor:
        batch, width, h, w = features.shape
        rows = features.detach().permute(0, 2, 3, 1).reshape(-1, width)
        with torch.autocast(self.device.type, enabled=False):
            return self.model.quantize.codes(rows).view(batch, h, w)

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
        raw = torch.from_numpy(self.pictures(0, 16))
        codes = model.encode(to_signed(raw.to(self.device))).codes
        output = to_bytes(model.decode(codes)).cpu()
        save_png(path, contact_sheet(torch.cat([raw, output]).numpy(), 16, scale=2))

    def export(self, folder: Path) -> None:
        from .checkpoint import save_tokenizer

        save_tokenizer(self.average.model, folder)
