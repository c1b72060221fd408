"""Recipe that trains the ranker by contrast (CLIP) on captioned images and clips of the sprites.

Every picture has to find its caption among those of the batch and among captions that differ from
it in one factor; every caption has to find its pictures. Equal captions are one caption.
ranker_batches.py draws both, ranker_retrieval.py measures.

Legend: B pictures, F frames, d features of a frame, T texts, M text length, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nuwa.spec.text import TextTokenizer

from .averaging import WeightAverage
from .pictures import contact_sheet, save_png
from .ranker import Ranker, RankerConfig, save_ranker
from .ranker_batches import Captions, Pixels, RankerBatches, caption
from .ranker_retrieval import embed, retrieval
from .sprites import world as sprites
from .sprites.world import FRAMES, Factors, SpriteWorld

VALIDATED = 128  # clips a validation
CALIBRATED = 6  # batches of images that batch normalisation is measured on


@dataclass(frozen=True)
class RankerOptions:
    """images, clips: batch per step; negatives: changed captions per picture and factor.

    reconstructed: clips of the training split that are also seen as the VQ-GAN gives them back
    (half of the batch is drawn from them), 0 for none; damage: share of frames with a misplaced
    square; text_lr: of the text tower, which is slower so that pictures learn to meet the captions
    and captions do not lose what pictures cannot tell yet; average: decay of the weight average
    that is shipped; validate_every: steps.
    """

    images: int = 96
    clips: int = 24
    negatives: int = 2
    lr: float = 2e-3
    text_lr: float = 2e-4
    weight_decay: float = 0.05
    reconstructed: int = 600
    damage: float = 0.15
    average: float = 0.99
    validate_every: int = 100
    bf16: bool = True

    def __post_init__(self) -> None:
        for name in ("images", "clips"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} {getattr(self, name)} is not at least 2, to tell apart")
        for name in ("negatives", "reconstructed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} is negative")
        if not 0.0 <= self.damage <= 1.0:
            raise ValueError(f"damage {self.damage} is not in [0, 1]")
        if self.validate_every < 1:
            raise ValueError(f"validate_every {self.validate_every} is not at least 1")


class RankerRecipe:
    """See trainer.Recipe."""

    def __init__(
        self,
        config: RankerConfig,
        options: RankerOptions,
        text_tokenizer: TextTokenizer,
        level: str,
        *,
        train_seen: Pixels | None = None,
        val_seen: Pixels | None = None,
        record: dict | None = None,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        """train_seen, val_seen: `reconstructions` of the first clips of those splits, if any.

        record: what the shipped ranker.json says of the training, beside its accuracy.
        """
        torch.manual_seed(seed)
        self.options, self.seed, self.record = options, seed, record or {}
        self.level, self.validation = level, SpriteWorld(level, "val")
        self.val_seen = val_seen
        self.device = torch.device(device)
        self.captions = Captions(text_tokenizer, self.device)
        self.batches = RankerBatches(
            SpriteWorld(level, "train"),
            self.captions,
            seen=train_seen,
            damaged=options.damage,
            negatives=options.negatives,
        )
        self.model = Ranker(config).to(self.device)
        self.average = WeightAverage(self.model, options.average)
        self.optimizer = _optimizer(self.model, options)

    def step(self, step: int, lr_factor: float) -> dict[str, float]:
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * lr_factor
        draw = np.random.default_rng((self.seed, step))
        batch = self.batches.pictures
        images, of_images = batch(step * options.images, options.images, draw, video=False)
        clips, of_clips = batch(step * options.clips, options.clips, draw, video=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=options.bf16):
            # One call, so that batch normalisation sees one mixture of pictures.
            features = self.model.embed_frames(
                torch.cat([images.flatten(0, 1), clips.flatten(0, 1)])
            )
            image_Bd, clip_Bd = features.split([len(of_images), len(of_clips) * FRAMES])
            image_loss = self._loss(image_Bd[:, None], of_images, draw, video=False)
            clip_loss = self._loss(clip_Bd.unflatten(0, (-1, FRAMES)), of_clips, draw, video=True)
        loss = image_loss + clip_loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(step)
        metrics = {
            "loss": float(loss.detach()),
            "image": float(image_loss.detach()),
            "clip": float(clip_loss.detach()),
            "scale": float(self.model.scale().detach()),
        }
        if (step + 1) % options.validate_every == 0:
            metrics |= {f"val_{k}": v for k, v in self.accuracy(self.validation).items()}
        return metrics

    def _loss(
        self,
        features_BFd: Tensor,
        factors: list[Factors],
        draw: np.random.Generator,
        *,
        video: bool,
    ) -> Tensor:
        ids_TM, own_B = self.batches.texts(factors, draw, video=video)
        text_TE = self.model.embed_texts(ids_TM)
        score_BT = self.model.embed_clips(features_BFd) @ text_TE.t()
        return contrast(self.model.scale() * score_BT.float(), own_B)

    @torch.no_grad()
    def shipped(self) -> Ranker:
        """The averaged weights, batch normalisation measured anew on training pictures.

        What the layers measured during training belongs to other weights, and misleads them.
        """
        ranker, draw = self.average.model, np.random.default_rng(self.seed)
        for module in ranker.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        ranker.train()
        for first in range(0, CALIBRATED * self.options.images, self.options.images):
            images, _ = self.batches.pictures(first, self.options.images, draw, video=False)
            ranker.embed_frames(images.flatten(0, 1))
        return ranker.eval()

    def accuracy(self, world: SpriteWorld, seen: Pixels | None = None) -> dict[str, float]:
        """`retrieval` of the first clips of a split and of one frame of each.

        seen: look at these pictures of the clips instead. Keys are image_<factor>, clip_<factor>.
        """
        count = VALIDATED if seen is None else len(seen)
        factors = [world.factors(i) for i in range(count)]
        clips = (
            seen if seen is not None else np.stack([world.sample(i).frames for i in range(count)])
        )
        images = clips[np.arange(count), np.arange(count) % FRAMES][:, None]
        ranker = self.shipped()
        found: dict[str, float] = {}
        for kind, pictures in (("image", images), ("clip", clips)):
            rates = retrieval(ranker, self.captions, pictures, factors, world, video=kind == "clip")
            found |= {f"{kind}_{name}": rate for name, rate in rates.items()}
        return found

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """A row for each of eight captions: the ten val images it fits best, best first."""
        images = np.stack([self.validation.frame(i, i % FRAMES)[0] for i in range(64)])
        captions = [caption(self.validation.factors(i), video=False) for i in range(8)]
        ranker = self.shipped()
        text_TE = ranker.embed_texts(self.captions.ids(captions))
        picture_BE = embed(ranker, images[:, None], self.device)
        best = (text_TE @ picture_BE.t()).topk(10, dim=1).indices.cpu().numpy()
        save_png(path, contact_sheet(images[best.ravel()], 10, scale=2))

    def export(self, folder: Path) -> None:
        """Writes the ranker with its accuracy on val, on novel pairs and through the VQ-GAN."""
        novel = SpriteWorld(self.level, "novel")
        accuracy = {"val": self.accuracy(self.validation), "novel": self.accuracy(novel)}
        if self.val_seen is not None:
            accuracy["val, through the VQ-GAN"] = self.accuracy(self.validation, self.val_seen)
        ranker = self.shipped()
        ranker.training_record = {
            **self.record,
            "level": self.level,
            "world_version": sprites.VERSION,
            "accuracy": accuracy,
        }
        save_ranker(ranker, folder)


def contrast(logits_BT: Tensor, own_B: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy, a scalar; own_B: the one column of texts that fits a row.

    Rows choose among all columns. Columns choose among rows, all that fit being right alike;
    columns that fit no row only stand against the rows.
    """
    to_text = F.cross_entropy(logits_BT, own_B)
    columns_U = own_B.unique()
    fits_BU = (own_B[:, None] == columns_U[None, :]).float()
    log_share_BU = logits_BT[:, columns_U].log_softmax(0)
    to_picture = -((log_share_BU * fits_BU).sum(0) / fits_BU.sum(0)).mean()
    return (to_text + to_picture) / 2


def _optimizer(model: Ranker, options: RankerOptions) -> torch.optim.Optimizer:
    """AdamW that decays matrices and kernels alone, with a learning rate for each tower."""
    groups: list[dict[str, Any]] = []
    for text, peak in ((True, options.text_lr), (False, options.lr)):
        tower = [p for name, p in model.named_parameters() if name.startswith("text") == text]
        for matrices, decay in ((True, options.weight_decay), (False, 0.0)):
            chosen = [p for p in tower if (p.dim() >= 2) == matrices]
            groups.append({"params": chosen, "weight_decay": decay, "peak": peak})
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))
