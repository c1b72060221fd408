"""Losses of VQ-GAN training: reconstruction, commitment, and a PatchGAN with adaptive weight.

Sources: taming-transformers' VQLPIPSWithDiscriminator (weights and adaptive lambda), pix2pix
(discriminator). The perceptual term is any callable (x, y) -> [B], in [-1, 1] pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Perceptual = Callable[[Tensor, Tensor], Tensor]


class PatchDiscriminator(nn.Module):
    """PatchGAN: [B, 3, H, W] -> one realness logit per patch [B, 1, h', w']."""

    def __init__(self, channels: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        stack: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            before, after = width * min(2 ** (layer - 1), 8), width * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            stack += [
                nn.Conv2d(before, after, 4, stride, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.2),
            ]
        stack.append(nn.Conv2d(after, 1, 4, 1, 1))
        self.main = nn.Sequential(*stack)
        self.apply(_initialise_discriminator)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.main(pixels)


def _initialise_discriminator(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def reconstruction_error(
    pixels: Tensor, output: Tensor, *, emphasis: float = 0.0, square: float = 0.0
) -> Tensor:
    """Absolute error of each pixel, mean of the channels: [B, C, H, W] twice -> [B, H, W].

    Where almost everything is background, the L1 optimum is at first to draw nothing else. Two
    helps against it: `emphasis` weighs pixels by 1 + emphasis * their distance from the picture's
    median colour; `square` adds that many times the squared error, which pulls on large errors.
    """
    error = (pixels - output).abs()
    if square > 0.0:
        error = error + square * error**2
    if emphasis > 0.0:
        median = pixels.flatten(2).median(dim=2).values[:, :, None, None]
        error = error * (1.0 + emphasis * (pixels - median).abs().amax(dim=1, keepdim=True))
    return error.mean(dim=1)


def class_map_error(one_hot: Tensor, logits: Tensor, *, emphasis: float = 0.0) -> Tensor:
    """Binary cross-entropy of each class, summed over classes (paper, 3.1): [B, H, W].

    emphasis: pixels of a class other than 0, the background, weigh 1 + emphasis.
    """
    error = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").sum(1)
    return error * (1.0 + emphasis * (1.0 - one_hot[:, 0]))


def quantization_loss(features: Tensor, quantized: Tensor, beta: float) -> Tensor:
    """Codebook term + beta * commitment term (taming's `legacy=False`)."""
    codebook = F.mse_loss(quantized, features.detach())
    return codebook + beta * F.mse_loss(features, quantized.detach())


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss."""
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def adaptive_weight(reconstruction: Tensor, generator: Tensor, last_layer: Tensor) -> Tensor:
    """Ratio of both losses' gradient norms at the decoder's last weight, clamped to [0, 1e4]."""
    (of_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (of_generator,) = torch.autograd.grad(generator, last_layer, retain_graph=True)
    return (of_reconstruction.norm() / (of_generator.norm() + 1e-4)).clamp(0.0, 1e4).detach()
