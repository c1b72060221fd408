"""Recipe that trains the ranker by contrast (CLIP) on captioned images and clips of the sprites.

Every picture has to find its caption among those of the batch and among captions that differ from
it in one factor; every caption has to find its pictures. Equal captions are one caption. Some
pictures went through the VQ-GAN or are damaged, as generated ones are.

Legend: B pictures, F frames, S canvas side, T texts, M text length, E embedding width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from nuwa.spec.text import TextTokenizer

from .averaging import WeightAverage
from .pictures import contact_sheet, save_png
from .ranker import Ranker, RankerConfig, save_ranker
from .sprites import world as sprites
from .sprites.world import FRAMES, MOTIONS, Factors, SpriteWorld
from .vqgan import VQGAN, to_bytes, to_signed

Pixels = npt.NDArray[np.uint8]
IMAGE_FACTORS = ("class", "colour", "background")
CLIP_FACTORS = (*IMAGE_FACTORS, "motion")
PIECE = 8  # side of a misplaced square
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
        self.world, self.seen = SpriteWorld(level, "train"), train_seen
        self.validation = SpriteWorld(level, "val")
        self.val_seen = val_seen
        self.device = torch.device(device)
        self.captions = Captions(text_tokenizer, self.device)
        self.model = Ranker(config).to(self.device)
        self.average = WeightAverage(self.model, options.average)
        self.optimizer = _optimizer(self.model, options)

    def step(self, step: int, lr_factor: float) -> dict[str, float]:
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * lr_factor
        draw = np.random.default_rng((self.seed, step))
        images, of_images = self._batch(step * options.images, options.images, draw, video=False)
        clips, of_clips = self._batch(step * options.clips, options.clips, draw, video=True)
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

    def _batch(
        self, first: int, count: int, draw: np.random.Generator, *, video: bool
    ) -> tuple[Tensor, list[Factors]]:
        """Pictures uint8 [B, F, S, S, 3], damaged, and their factors: half of them as seen."""
        pictures, factors = [], []
        for index in range(first, first + count):
            frame = int(draw.integers(FRAMES))
            if self.seen is not None and draw.random() < 0.5:
                index = int(draw.integers(len(self.seen)))
                frames = np.array(self.seen[index] if video else self.seen[index, frame][None])
            elif video:
                frames = self.world.sample(index).frames
            else:
                frames = self.world.frame(index, frame)[0][None]
            pictures.append(damage(frames, draw, self.options.damage))
            factors.append(self.world.factors(index))
        return torch.from_numpy(np.stack(pictures)).to(self.device), factors

    def _loss(
        self,
        features_BFd: Tensor,
        factors: list[Factors],
        draw: np.random.Generator,
        *,
        video: bool,
    ) -> Tensor:
        names = CLIP_FACTORS if video else IMAGE_FACTORS
        changed: list[Factors] = []
        for one in factors:
            for name in names:
                others = one_changed(one, name, self.world, trained=video)
                picked = draw.permutation(len(others))[: self.options.negatives]
                changed += [others[i] for i in picked]
        captions = [caption(one, video=video) for one in [*factors, *changed]]
        columns = {text: column for column, text in enumerate(dict.fromkeys(captions))}
        text_TE = self.model.embed_texts(self.captions.ids(columns))
        own_B = torch.tensor([columns[text] for text in captions[: len(factors)]])
        return contrast(
            self.model.scale() * (self.model.embed_clips(features_BFd) @ text_TE.t()).float(),
            own_B.to(self.device),
        )

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
            images, _ = self._batch(first, self.options.images, draw, video=False)
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
        novel = SpriteWorld(self.world.level, "novel")
        accuracy = {"val": self.accuracy(self.validation), "novel": self.accuracy(novel)}
        if self.val_seen is not None:
            accuracy["val, through the VQ-GAN"] = self.accuracy(self.validation, self.val_seen)
        ranker = self.shipped()
        ranker.training_record = {
            **self.record,
            "level": self.world.level,
            "world_version": sprites.VERSION,
            "accuracy": accuracy,
        }
        save_ranker(ranker, folder)


class Captions:
    """Texts as rows of ids, each tokenized once."""

    def __init__(self, tokenizer: TextTokenizer, device: torch.device) -> None:
        self.tokenizer, self.device = tokenizer, device
        self._rows: dict[str, npt.NDArray[np.int32]] = {}

    def ids(self, texts: Iterable[str]) -> Tensor:
        """int64 [T, M], M the longest of these texts."""
        rows = np.stack([self._row(text) for text in texts])
        used = (rows != self.tokenizer.pad).sum(1).max()
        return torch.from_numpy(rows[:, :used].astype(np.int64)).to(self.device)

    def _row(self, text: str) -> npt.NDArray[np.int32]:
        if text not in self._rows:
            self._rows[text] = self.tokenizer.encode(text)
        return self._rows[text]


def caption(factors: Factors, *, video: bool) -> str:
    """The caption of a clip, or of one of its frames."""
    return factors.video_caption if video else factors.image_caption


def one_changed(
    factors: Factors, name: str, world: SpriteWorld, *, trained: bool = False
) -> list[Factors]:
    """All factors of a level that differ from `factors` in the one named (see CLIP_FACTORS).

    trained: without class-motion pairs that the split never shows. Held against every clip of
    training, captions of novel pairs would be learned as wrong.
    """
    if name not in CLIP_FACTORS:
        raise ValueError(f"factor {name!r} is not one of {', '.join(CLIP_FACTORS)}")
    attribute = "class_index" if name == "class" else name
    choices: dict[str, Iterable] = {
        "class": range(world.class_count),
        "colour": world.colours,
        "background": world.backgrounds,
        "motion": MOTIONS,
    }
    own = getattr(factors, attribute)
    changed = [
        dataclasses.replace(factors, **{attribute: value})
        for value in choices[name]
        if value != own
    ]
    shown = set(world.pairs)
    return [c for c in changed if not trained or (c.class_index, c.motion) in shown]


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


def damage(frames_FSS3: Pixels, draw: np.random.Generator, share: float) -> Pixels:
    """A copy: half of the clips noisy, and in a share of frames a square where it does not belong.

    The square is of the same frame, so ink is erased as often as it appears.
    """
    frames = frames_FSS3.copy()
    side = frames.shape[1]
    for f in np.flatnonzero(draw.random(len(frames)) < share):
        y, x, v, u = draw.integers(side - PIECE + 1, size=4)
        frames[f, y : y + PIECE, x : x + PIECE] = frames_FSS3[f, v : v + PIECE, u : u + PIECE]
    if draw.random() < 0.5:
        strength = draw.uniform(1.0, 10.0)
        noise = strength * draw.standard_normal(frames.shape, dtype=np.float32)
        frames = (frames + noise).round().clip(0, 255).astype(np.uint8)
    return frames


@torch.no_grad()
def embed(ranker: Ranker, pictures: Pixels, device: torch.device, batch: int = 32) -> Tensor:
    """uint8 [B, F, S, S, 3] -> [B, E], a batch at a time."""
    parts = [
        ranker.embed_pictures(torch.from_numpy(np.array(pictures[i : i + batch])).to(device))
        for i in range(0, len(pictures), batch)
    ]
    return torch.cat(parts)


@torch.no_grad()
def retrieval(
    ranker: Ranker,
    captions: Captions,
    pictures: Pixels,
    factors: list[Factors],
    world: SpriteWorld,
    *,
    video: bool,
) -> dict[str, float]:
    """Share of pictures [B, F, S, S, 3] whose own caption scores above every one-factor change.

    By factor, and "joint": above all of them. A factor with a single value is left out.
    """
    picture_BE = embed(ranker, pictures, captions.device)
    names = CLIP_FACTORS if video else IMAGE_FACTORS
    rivals = [{name: one_changed(own, name, world) for name in names} for own in factors]
    texts = dict.fromkeys(
        caption(one, video=video)
        for own, groups in zip(factors, rivals, strict=True)
        for one in [own, *(rival for group in groups.values() for rival in group)]
    )
    embedded = dict(zip(texts, ranker.embed_texts(captions.ids(texts)), strict=True))
    right: dict[str, list[bool]] = {name: [] for name in names}
    for picture_E, own, groups in zip(picture_BE, factors, rivals, strict=True):
        score = picture_E @ embedded[caption(own, video=video)]
        for name, group in groups.items():
            if group:
                others_TE = torch.stack([embedded[caption(r, video=video)] for r in group])
                right[name].append(bool((others_TE @ picture_E).max() < score))
    told = {name: values for name, values in right.items() if values}
    rates = {name: float(np.mean(values)) for name, values in told.items()}
    return {**rates, "joint": float(np.mean(np.all(list(told.values()), axis=0)))}


@torch.no_grad()
def reconstructions(vqgan: VQGAN, world: SpriteWorld, count: int, cache: Path) -> Pixels:
    """uint8 [count, F, S, S, 3]: the first clips of `world` as the VQ-GAN gives them back.

    cache: a .npy file, read if it holds just those; a .json beside it says what it holds.
    """
    identity = {
        "vqgan": _digest(vqgan),
        "world_version": sprites.VERSION,
        "level": world.level,
        "split": world.split,
        "count": count,
    }
    label = cache.with_suffix(".json")
    if cache.exists() and label.exists() and json.loads(label.read_text()) == identity:
        return np.load(cache, mmap_mode="r")
    clips = []
    for index in track(range(count), f"reconstructing {count} clips of {world.split}"):
        frames = torch.from_numpy(world.sample(index).frames)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pixels = vqgan.decode(vqgan.encode(to_signed(frames)).codes)
        clips.append(to_bytes(pixels).numpy())
    cache.parent.mkdir(parents=True, exist_ok=True)
    label.unlink(missing_ok=True)
    partial = cache.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.save(file, np.stack(clips))
    partial.replace(cache)  # whoever maps the old file keeps it
    label.write_text(json.dumps(identity) + "\n")
    return np.load(cache, mmap_mode="r")


def _digest(vqgan: VQGAN) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(vqgan.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.float().numpy().tobytes())
    return digest.hexdigest()


def _optimizer(model: Ranker, options: RankerOptions) -> torch.optim.Optimizer:
    """AdamW that decays matrices and kernels alone, with a learning rate for each tower."""
    groups: list[dict[str, Any]] = []
    for text, peak in ((True, options.text_lr), (False, options.lr)):
        tower = [p for name, p in model.named_parameters() if name.startswith("text") == text]
        for matrices, decay in ((True, options.weight_decay), (False, 0.0)):
            chosen = [p for p in tower if (p.dim() >= 2) == matrices]
            groups.append({"params": chosen, "weight_decay": decay, "peak": peak})
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))
