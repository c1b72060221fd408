"""VQ-GAN tokenizer with taming-transformers' layers and state-dict names (Esser et al. 2021).

A checkpoint of taming's `VQModel` loads into `VQGAN` as it is (after dropping its `loss.` keys).
Pixels are in [-1, 1]; class maps go in one-hot and come out as logits. Knows nothing of training:
losses are in vqgan_losses.py, the codebook's moving averages in codebook.py.

Legend: B batch, C channels, H, W pixels or features, h, w tokens, K codebook size, E code width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nuwa.spec.config import VQGANConfig


class _FastGroupNorm(torch.autograd.Function):
    """GroupNorm whose backward is a few dense passes: many times PyTorch's own speed on a CPU.

    With g the gradient of the output, w the weight, m and r the mean and 1/std of a group of n:
    dx = r w g - x (r^3 / n) (sum(w g x) - m sum(w g)) - rest, `rest` making dx sum to zero.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        x = x.contiguous()
        batch, channels, height, width = x.shape
        y, mean, rstd = torch.native_group_norm(
            x, weight.to(x), bias.to(x), batch, channels, height * width, groups, eps
        )
        ctx.save_for_backward(x, mean.float(), rstd.float(), weight)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, mean_BG, rstd_BG, weight_C = ctx.saved_tensors
        grad = grad.contiguous()
        batch, channels, height, width = x.shape
        each = channels // ctx.groups
        count = each * height * width

        def per_channel(value_BG: Tensor) -> Tensor:
            return value_BG.repeat_interleave(each, dim=1)

        def per_group(value_BC: Tensor) -> Tensor:
            return (value_BC * weight_C).view(batch, ctx.groups, each).sum(2)

        grad_BC = grad.flatten(2).sum(2, dtype=torch.float32)
        grad_x_BC = (grad * x).flatten(2).sum(2, dtype=torch.float32)
        mean_BC, rstd_BC = per_channel(mean_BG), per_channel(rstd_BG)
        weight_grad_C = ((grad_x_BC - grad_BC * mean_BC) * rstd_BC).sum(0)
        sum_x_BG, sum_BG = per_group(grad_x_BC), per_group(grad_BC)
        slope_BG = (sum_BG * mean_BG - sum_x_BG) * rstd_BG**3 / count
        shift_BG = -slope_BG * mean_BG - sum_BG * rstd_BG / count

        def spread(value_BC: Tensor) -> Tensor:
            return value_BC[:, :, None, None].to(x.dtype)

        dx = torch.addcmul(spread(per_channel(shift_BG)), x, spread(per_channel(slope_BG)))
        dx.addcmul_(grad, spread(rstd_BC * weight_C))
        return dx, weight_grad_C, grad_BC.sum(0), None, None


class GroupNorm(nn.GroupNorm):
    """The plain layer, with the fast backward while training on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and input.device.type == "cpu"):
            return super().forward(input)
        return _FastGroupNorm.apply(input, self.weight, self.bias, self.num_groups, self.eps)


def _norm(channels: int) -> nn.GroupNorm:
    return GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with a skip; a 1x1 convolution on the skip where channels change."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all cells of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (
            layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )  # [B, HW, C]
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(attended.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halves both axes; pads right and bottom only, as taming does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles both axes: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, attention where configured, then a change of resolution."""

    def __init__(self, channels: list[int], attention: bool, resample: nn.Module | None) -> None:
        super().__init__()
        pairs = zip(channels[:-1], channels[1:], strict=True)
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in pairs)
        self.attn = nn.ModuleList(AttnBlock(c) for c in channels[1:] if attention)
        if isinstance(resample, Downsample):
            self.downsample = resample
        elif isinstance(resample, Upsample):
            self.upsample = resample

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """[B, channels, H, W] -> [B, z_channels, h, w]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.channels, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        before, size = config.base_channels, config.resolution
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            self.down.append(
                Level(
                    [before] + [width] * config.res_blocks,
                    size in config.attention_resolutions,
                    None if last else Downsample(width),
                )
            )
            before, size = width, size if last else size // 2
        self.mid = Middle(before)
        self.norm_out = _norm(before)
        self.conv_out = nn.Conv2d(before, config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> [B, channels, H, W]. `up[0]` is the full resolution."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        before, size = widths[-1], config.grid_size
        self.conv_in = nn.Conv2d(config.z_channels, before, 3, padding=1)
        self.mid = Middle(before)
        levels: list[Level] = []
        for level in reversed(range(len(widths))):
            width = widths[level]
            levels.insert(
                0,
                Level(
                    [before] + [width] * (config.res_blocks + 1),
                    size in config.attention_resolutions,
                    Upsample(width) if level > 0 else None,
                ),
            )
            before, size = width, size * 2
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(before)
        self.conv_out = nn.Conv2d(before, config.channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """Nearest code by Euclidean distance."""

    def __init__(self, codebook_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, width)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    def codes(self, z_NE: Tensor) -> Tensor:
        """int64 [N]: index of the nearest code to each row of [N, E]."""
        weight_KE = self.embedding.weight
        # |z|^2 is the same for all codes, so it cannot change the argmin.
        distance_NK = (weight_KE**2).sum(1) - 2.0 * z_NE @ weight_KE.t()
        return distance_NK.argmin(dim=1)


class Encoded(NamedTuple):
    """Features before quantization [B, E, h, w] and the code of each cell int64 [B, h, w]."""

    features: Tensor
    codes: Tensor


class VQGAN(nn.Module):
    """Pixels [-1, 1] <-> codes on a grid."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config.codebook_size, config.embedding_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embedding_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embedding_dim, config.z_channels, 1)

    def features(self, pixels: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, E, h, w], not quantized."""
        return self.quant_conv(self.encoder(pixels))

    def encode(self, pixels: Tensor) -> Encoded:
        """[B, C, H, W] in [-1, 1] -> features and codes. Distances are computed in fp32."""
        features = self.features(pixels)
        batch, width, h, w = features.shape
        rows = features.float().permute(0, 2, 3, 1).reshape(-1, width)
        with torch.autocast(features.device.type, enabled=False):
            codes = self.quantize.codes(rows)
        return Encoded(features, codes.view(batch, h, w))

    def embed(self, codes: Tensor) -> Tensor:
        """int [B, h, w] -> [B, E, h, w]."""
        return self.quantize.embedding(codes).permute(0, 3, 1, 2)

    def decode_features(self, features: Tensor) -> Tensor:
        """[B, E, h, w] -> [B, C, H, W], about [-1, 1] (logits for class maps)."""
        return self.decoder(self.post_quant_conv(features))

    def decode(self, codes: Tensor) -> Tensor:
        """int [B, h, w] -> [B, C, H, W]."""
        return self.decode_features(self.embed(codes))


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 [..., H, W, 3] -> float [..., 3, H, W] in [-1, 1]."""
    return pixels.movedim(-1, -3).float() / 127.5 - 1.0


def to_bytes(signed: Tensor) -> Tensor:
    """float [..., 3, H, W] in [-1, 1] -> uint8 [..., H, W, 3], rounded and clipped."""
    scaled = ((signed.float() + 1.0) * 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).movedim(-3, -1)


def one_hot(maps: Tensor, classes: int) -> Tensor:
    """Class ids uint8 [..., H, W], all below `classes` -> float [..., classes, H, W], 0 or 1."""
    return F.one_hot(maps.long(), classes).movedim(-1, -3).float()


def class_maps(logits: Tensor) -> Tensor:
    """float [..., C, H, W] -> uint8 [..., H, W]: the class of the largest logit."""
    return logits.argmax(dim=-3).to(torch.uint8)
