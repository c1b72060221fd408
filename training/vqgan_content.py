"""What a VQ-GAN tokenizes, pictures or class maps: how that enters, and what a loss on it is.

Train recipes know neither colours nor classes; they ask one of these.

Legend: B batch, C channels (3, or the number of classes), H, W pixels.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .metrics import mean_iou
from .pictures import paint_classes
from .vqgan import class_maps, one_hot, to_bytes, to_signed
from .vqgan_losses import Perceptual, class_map_error, reconstruction_error


class Content(Protocol):
    """One kind of samples."""

    def inputs(self, samples: Tensor) -> Tensor:
        """uint8 samples -> what the encoder reads, f32 [B, C, H, W]."""

    def error(self, inputs: Tensor, output: Tensor) -> Tensor:
        """[B, H, W]: how far the decoder's output [B, C, H, W] is from its input."""

    def perceived(self, inputs: Tensor, output: Tensor) -> Tensor | float:
        """A scalar that is added to the mean error: what no pixel by itself tells."""

    def quality(self, inputs: Tensor, output: Tensor) -> dict[str, float]:
        """The same as figures for people."""

    def pictures(self, samples: Tensor, output: Tensor) -> np.ndarray:
        """uint8 [2B, H, W, 3]: the samples, then what was made of them."""


class Pictures:
    """uint8 [B, H, W, 3]; see vqgan_losses.reconstruction_error for the options."""

    def __init__(
        self, *, emphasis: float = 0.0, square: float = 0.0, perceptual: Perceptual | None = None
    ) -> None:
        self.emphasis, self.square, self.perceptual = emphasis, square, perceptual

    def inputs(self, samples: Tensor) -> Tensor:
        return to_signed(samples)

    def error(self, inputs: Tensor, output: Tensor) -> Tensor:
        return reconstruction_error(inputs, output, emphasis=self.emphasis, square=self.square)

    def perceived(self, inputs: Tensor, output: Tensor) -> Tensor | float:
        return 0.0 if self.perceptual is None else self.perceptual(inputs, output).mean()

    def quality(self, inputs: Tensor, output: Tensor) -> dict[str, float]:
        error = F.mse_loss(output.clamp(-1, 1), inputs)
        return {"psnr": float(10.0 * torch.log10(4.0 / error))}

    def pictures(self, samples: Tensor, output: Tensor) -> np.ndarray:
        return torch.cat([samples, to_bytes(output)]).cpu().numpy()


class ClassMaps:
    """uint8 [B, H, W] of classes below `classes`, 0 the background: sketches."""

    def __init__(self, classes: int, *, emphasis: float = 0.0) -> None:
        self.classes, self.emphasis = classes, emphasis

    def inputs(self, samples: Tensor) -> Tensor:
        return one_hot(samples, self.classes)

    def error(self, inputs: Tensor, output: Tensor) -> Tensor:
        return class_map_error(inputs, output, emphasis=self.emphasis)

    def perceived(self, inputs: Tensor, output: Tensor) -> Tensor | float:
        return 0.0

    def quality(self, inputs: Tensor, output: Tensor) -> dict[str, float]:
        made, real = class_maps(output).cpu().numpy(), class_maps(inputs).cpu().numpy()
        each = [mean_iou(m, r, self.classes) for m, r in zip(made, real, strict=True)]
        return {"miou": float(np.mean(each))}

    def pictures(self, samples: Tensor, output: Tensor) -> np.ndarray:
        return paint_classes(torch.cat([samples, class_maps(output)]).cpu().numpy())
