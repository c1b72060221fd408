"""Recipe that trains NÜWA on T2I + T2V + V2V together (paper, equation 16).

A step sees images with their captions (T2I), clips with theirs (T2V) and clips conditioned on the
word "none" (V2V); some captions of images become "none" too, which classifier-free guidance needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nuwa.spec.config import ModelConfig
from nuwa.spec.grid import Grid
from nuwa.spec.tasks import UNCONDITIONAL_PROMPT
from nuwa.spec.text import TextTokenizer

from .averaging import WeightAverage
from .clips import TokenClips
from .decode import generate
from .nuwa import NUWA
from .pictures import contact_sheet, save_png
from .vqgan import VQGAN, to_bytes


@dataclass(frozen=True)
class NUWAOptions:
    """images and clips: batch per step of T2I and of T2V + V2V; only images before `clips_from`.

    optimizer: "adam" as in the paper, or "muon" (orthogonalised momentum for the blocks' matrices,
    Adam for the rest), which learns more from few steps; none_images and none_clips: share of
    captions replaced by "none"; average: decay of the weight average that is shipped.
    """

    images: int = 96
    clips: int = 8
    clips_from: int = 0
    optimizer: str = "muon"
    lr: float = 2e-3
    adam_lr: float = 1e-3
    none_images: float = 0.1
    none_clips: float = 0.25
    average: float = 0.998
    layer_scale: float | None = 0.5
    bf16: bool = True

    def __post_init__(self) -> None:
        if self.optimizer not in ("adam", "muon"):
            raise ValueError(f"optimizer {self.optimizer!r} is not one of 'adam', 'muon'")
        for name in ("none_images", "none_clips"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} {getattr(self, name)} is not in [0, 1]")


class NUWARecipe:
    """See trainer.Recipe."""

    def __init__(
        self,
        config: ModelConfig,
        options: NUWAOptions,
        vqgan: VQGAN,
        text_tokenizer: TextTokenizer,
        clips: TokenClips,
        *,
        provenance: dict | None = None,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.config, self.options, self.seed = config, options, seed
        self.vqgan, self.text_tokenizer, self.clips = vqgan, text_tokenizer, clips
        self.provenance = provenance
        self.device = torch.device(device)
        self.model = NUWA(config).to(self.device)
        _initialise(self.model, vqgan, options.layer_scale)
        self.average = WeightAverage(self.model, options.average)
        self.optimizers = _optimizers(self.model, options)
        self._length = max(len(self._ids(c)) for c in _some_captions(clips)) + 2

    def step(self, step: int, lr_factor: float) -> dict[str, float]:
        options = self.options
        for optimizer, lr in zip(self.optimizers, self._rates(), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_factor
            optimizer.zero_grad(set_to_none=True)
        draw = np.random.default_rng((self.seed, step))
        metrics = {"t2i": self._backward(*self._images(draw))}
        if step >= options.clips_from and options.clips:
            metrics["t2v+v2v"] = self._backward(*self._clips(draw))
        metrics["grad"] = float(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.update(step)
        return {"loss": metrics["t2i"] + metrics.get("t2v+v2v", 0.0), **metrics}

    def _rates(self) -> list[float]:
        options = self.options
        return [options.adam_lr, options.lr][: len(self.optimizers)]

    def _backward(self, tokens: Tensor, text: Tensor, grid: Grid) -> float:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.options.bf16):
            volume = self.model.volume(grid, self.device)
            logits = self.model.volume_logits(tokens, text, volume)
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
        loss.backward()
        return float(loss.detach())

    def _images(self, draw: np.random.Generator) -> tuple[Tensor, Tensor, Grid]:
        count, frames, _ = self.clips.tokens.shape
        index = draw.integers(count, size=self.options.images)
        frame = draw.integers(frames, size=self.options.images)
        none = draw.random(self.options.images) < self.options.none_images
        return self._batch(self.clips.tokens[index, frame], index, none, video=False)

    def _clips(self, draw: np.random.Generator) -> tuple[Tensor, Tensor, Grid]:
        index = draw.integers(len(self.clips.tokens), size=self.options.clips)
        none = draw.random(self.options.clips) < self.options.none_clips
        return self._batch(self.clips.tokens[index], index, none, video=True)

    def _batch(
        self, tokens: np.ndarray, index: np.ndarray, none: np.ndarray, *, video: bool
    ) -> tuple[Tensor, Tensor, Grid]:
        captions = [
            UNCONDITIONAL_PROMPT if n else self.clips.caption(int(i), video=video)
            for i, n in zip(index, none, strict=True)
        ]
        text = self.encode(captions)[:, : self._length]
        grid = self.config.decoder.grid
        grid = Grid(self.clips.tokens.shape[1] if video else 1, grid.height, grid.width)
        rows = torch.from_numpy(tokens.reshape(len(index), -1).astype(np.int64))
        return rows.to(self.device), text.to(self.device), grid

    def encode(self, captions: list[str]) -> Tensor:
        """int64 [B, M]."""
        rows = np.stack([self.text_tokenizer.encode(caption) for caption in captions])
        return torch.from_numpy(rows.astype(np.int64))

    def _ids(self, caption: str) -> np.ndarray:
        row = self.text_tokenizer.encode(caption)
        return row[: self.text_tokenizer.used(row)]

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def sample(self, path: Path) -> None:
        """Sixteen captioned images above four clips, guided."""
        grid = self.config.decoder.grid
        sheets = []
        for count, frames in ((2 * self.clips.tokens.shape[1], 1), (4, self.clips.tokens.shape[1])):
            volume = Grid(frames, grid.height, grid.width)
            captions = [self.clips.caption(i, video=frames > 1) for i in range(count)]
            tokens = generate(
                self.average.model,
                self.encode(captions),
                volume,
                seeds=list(range(count)),
                guidance=2.0,
                unconditional_1M=self.encode([UNCONDITIONAL_PROMPT]),
            )
            codes = tokens.reshape(count * frames, grid.height, grid.width)
            with torch.no_grad():
                sheets.append(to_bytes(self.vqgan.decode(codes)).numpy())
        pictures = np.concatenate(sheets)
        save_png(path, contact_sheet(pictures, self.clips.tokens.shape[1], scale=2))

    def export(self, folder: Path) -> None:
        from .checkpoint import save_checkpoint

        save_checkpoint(
            folder,
            self.config,
            self.vqgan,
            self.average.model,
            self.text_tokenizer,
            self.provenance,
        )


def _initialise(model: NUWA, vqgan: VQGAN, layer_scale: float | None) -> None:
    """Linear layers with std 1/sqrt(fan in), code vectors from the codebook."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.head.weight, std=0.02)
    with torch.no_grad():
        codes = vqgan.quantize.embedding.weight.detach()
        model.embedding.codes.weight.copy_(codes / codes.std())
        if layer_scale is not None:
            for block in model.blocks:
                for scale in (block.self_scale, block.cross_scale, block.ff_scale):
                    scale.fill_(layer_scale)


def _optimizers(model: NUWA, options: NUWAOptions) -> list[torch.optim.Optimizer]:
    """Adam for everything, or Adam for what is not a matrix of a block and Muon for those."""
    matrices = [
        p for p in [*model.blocks.parameters(), *model.text.blocks.parameters()] if p.dim() == 2
    ]
    biases = {id(block.bias) for block in model.blocks}
    matrices = [p for p in matrices if id(p) not in biases]
    if options.optimizer == "adam":
        return [torch.optim.AdamW(model.parameters(), options.adam_lr, (0.9, 0.98))]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.AdamW(rest, options.adam_lr, (0.9, 0.98), weight_decay=0.0),
        torch.optim.Muon(matrices, options.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]


def _some_captions(clips: TokenClips) -> list[str]:
    """Enough captions to meet the longest of a templated world."""
    count = min(len(clips.tokens), 2000)
    return [clips.caption(i, video=True) for i in range(count)] + [UNCONDITIONAL_PROMPT]
