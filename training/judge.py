"""The judge: tells class, colour, background and motion of a sprite clip.

The class comes from a small CNN trained on real clips; the rest from `readers`. The CNN sees the
ink around the sprite in gray, so colour, place and background cannot leak into the class. Knows
nothing of the models it judges, nor how it was trained itself.

Shapes: F frames, S canvas side, C = CROP side, B frames in a batch, D = FEATURE_COUNT.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nuwa.spec.files import replacing
from nuwa.spec.manifest import file_hash

from .readers import Layout, locate, read_background, read_colour, read_motion
from .sprites import world
from .sprites.world import SpriteWorld
from .stored import write_object

CROP = 36  # holds the 24-pixel tile wherever in it the centroid lies
FEATURE_COUNT = 64
NO_CLASS = -1
WEIGHTS = "judge.safetensors"


@dataclass(frozen=True)
class Verdict:
    """What a clip (or image) shows. NO_CLASS and "none" stand for: nothing that can be named.

    class_index and colour are those of the frames in which there is a sprite, however few:
    `seen` says how many.
    """

    class_index: int
    classes_F: np.ndarray  # i64, the class of each frame by itself
    colour: str
    background: str
    motion: str
    features_FD: np.ndarray  # f64, the CNN's last hidden layer; zero in frames without a sprite
    layout: Layout

    @property
    def seen(self) -> float:
        """Share of the frames that show a sprite."""
        return float(self.layout.seen_F.mean())

    @property
    def features(self) -> np.ndarray:
        """f64[D]: what the frames show on average."""
        return self.features_FD.mean(0)

    @property
    def clip_features(self) -> np.ndarray:
        """f64[2D + 2(F-1)]: shape, how much it changes, and the way it goes.

        The frames' mean features; the mean absolute change of each from frame to frame; the steps
        of the sprite's centroid in pixels (0 where a frame has none).
        """
        changes_D = np.abs(np.diff(self.features_FD, axis=0)).mean(0)
        steps = np.nan_to_num(np.diff(self.layout.track_F2, axis=0))
        return np.concatenate([self.features, changes_D, steps.ravel()])


class ShapeNet(nn.Module):
    """f32[B,1,C,C] ink -> (features f32[B,D], class logits f32[B,classes])."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths, strides = (1, 16, 32, 64, 64, 96), (1, 2, 2, 1, 2)
        layers: list[nn.Module] = []
        for before, after, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.hidden = nn.Linear(widths[-1] * 4, FEATURE_COUNT)
        self.head = nn.Linear(FEATURE_COUNT, classes)

    def forward(self, ink_B1CC: Tensor) -> tuple[Tensor, Tensor]:
        pooled = F.adaptive_avg_pool2d(self.trunk(ink_B1CC), 2).flatten(1)
        features_BD = F.relu(self.hidden(F.dropout(pooled, 0.2, self.training)))
        return features_BD, self.head(features_BD)


class Judge:
    """A trained judge of one level ("digits": 10 classes, "full": 20)."""

    def __init__(
        self, level: str, network: ShapeNet, metadata: dict, source: dict | None = None
    ) -> None:
        self.level, self.network, self.metadata = level, network.eval(), metadata
        self.source = source or {}  # folder and weights, of a judge that was loaded

    def read(self, frames: np.ndarray) -> Verdict:
        """Verdict on u8[F,S,S,3]; F = 1 is an image, whose motion is "none"."""
        return self.read_many([frames])[0]

    @torch.inference_mode()
    def read_many(self, clips: Sequence[np.ndarray]) -> list[Verdict]:
        """A verdict on each clip u8[F,S,S,3]: one pass of the network over all their frames."""
        layouts = [locate(frames) for frames in clips]
        seen = [np.flatnonzero(layout.seen_F) for layout in layouts]
        crops = [
            crop_ink(layout.ink_FSS[f], layout.track_F2[f])
            for layout, at in zip(layouts, seen, strict=True)
            for f in at
        ]
        features_BD, scores_BC = np.zeros((0, FEATURE_COUNT)), torch.zeros(0, 1)
        if crops:
            hidden_BD, logits_BC = self.network(torch.from_numpy(np.stack(crops))[:, None])
            features_BD, scores_BC = hidden_BD.double().numpy(), logits_BC.log_softmax(-1)
        verdicts, first = [], 0
        for frames, layout, at in zip(clips, layouts, seen, strict=True):
            rows = slice(first, first + len(at))
            first += len(at)
            features_FD = np.zeros((len(frames), FEATURE_COUNT))
            features_FD[at] = features_BD[rows]
            classes_F = np.full(len(frames), NO_CLASS)
            classes_F[at] = scores_BC[rows].argmax(1).numpy()
            verdicts.append(
                Verdict(
                    int(scores_BC[rows].mean(0).argmax()) if len(at) else NO_CLASS,
                    classes_F,
                    read_colour(frames, layout),
                    read_background(layout),
                    read_motion(layout.track_F2),
                    features_FD,
                    layout,
                )
            )
        return verdicts

    def read_motion(self, frames: np.ndarray) -> str:
        """The motion alone of u8[F,S,S,3]."""
        return read_motion(locate(frames).track_F2)

    def save(self, folder: Path) -> None:
        """Writes judge.safetensors, then judge.json."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.contiguous() for name, t in self.network.state_dict().items()}
        with replacing(folder / WEIGHTS) as partial:
            save_file(tensors, partial)
        write_object(folder / "judge.json", {"level": self.level, **self.metadata})

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """Reads what `save` wrote; OSError without the files, ValueError for another world."""
        metadata = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
        level = metadata.pop("level")
        if metadata["world_version"] != world.VERSION:
            raise ValueError(
                f"the judge in {folder} was trained on version {metadata['world_version']} of the "
                f"sprite world, this is version {world.VERSION}; train it again"
            )
        network = ShapeNet(SpriteWorld(level, "train").class_count)
        weights = folder / WEIGHTS
        network.load_state_dict(load_file(weights), strict=True)
        source = {"folder": folder.name, "weights_sha256": file_hash(weights)}
        return cls(level, network, metadata, source)


def crop_ink(ink_SS: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """f32[C,C] of the ink around `centre` (row, column); zero outside the canvas."""
    padded = np.pad(ink_SS, CROP // 2)
    row, column = (round(float(c)) for c in centre)
    return padded[row : row + CROP, column : column + CROP].astype(np.float32)
