"""The ranker: how well a caption fits an image or a clip, as the cosine of two embeddings (CLIP).

It chooses the best of N samples. A frame goes through a small CNN that keeps what it sees at a few
places and where things are; convolutions over time compare the frames. Knows nothing of the
sprites, nor how it is trained.

Legend: B batch, F frames, M text length, S canvas side, h, w cells of the feature map (P in all), C
channels, A places attended to, d width over time, E embedding width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nuwa.spec.config import TextConfig
from nuwa.spec.files import replacing
from nuwa.spec.text import TextTokenizer

from .nuwa import TextEncoder
from .stored import write_object
from .vqgan import to_signed

CONFIG = "ranker.json"
WEIGHTS = "ranker.safetensors"
TEXT_TOKENIZER = "tokenizer.json"  # as checkpoint.py names it
FORMAT = "nuwa-ranker/1"
FIRST_SCALE, LARGEST_SCALE = 14.0, 100.0  # CLIP's learned inverse temperature: start and bound


@dataclass(frozen=True)
class RankerConfig:
    """Sizes of a ranker.

    resolution: side of a frame in pixels; widths: channels after each of the CNN's halvings;
    blocks: residual blocks behind them; places: how many it attends to; located: channels that tell
    where things are; width, dilations: of the convolutions over time; tokenizer:
    `tokenizer_digest` of the text tokenizer, "" if unknown.
    """

    text: TextConfig = field(
        default_factory=lambda: TextConfig(
            vocabulary_size=512, width=128, layers=2, heads=2, mask_padding=True
        )
    )
    resolution: int = 64
    widths: tuple[int, ...] = (24, 48, 96)
    blocks: int = 2
    places: int = 4
    located: int = 8
    width: int = 128
    dilations: tuple[int, ...] = (1, 2, 4)
    embedding: int = 128
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("widths is empty; the ranker's CNN needs at least one")
        if self.resolution % (1 << len(self.widths)) or self.resolution < 1:
            raise ValueError(
                f"resolution {self.resolution} is not a multiple of {1 << len(self.widths)}, the "
                f"down-sampling of {len(self.widths)} widths"
            )
        for name in ("places", "located", "width", "embedding"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not at least 1")
        if not self.text.mask_padding:
            # The text is embedded at any length, cut to the longest of a batch.
            raise ValueError("text.mask_padding is False; the ranker's text needs it True")


class _Block(nn.Module):
    """Two 3x3 convolutions with a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _convolution(channels, channels, 1)
        self.second = _convolution(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


def _convolution(channels: int, out_channels: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
    # No momentum: statistics are plain means, for training measures them when it is done.
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels, momentum=None))


class FrameEncoder(nn.Module):
    """Pixels [N, 3, S, S] in [-1, 1] -> [N, d].

    What is seen is pooled at A places that the network attends to, so that it counts alike
    everywhere; where it is comes from a few channels of the map, cell by cell.
    """

    def __init__(self, config: RankerConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in config.widths:
            layers += [_convolution(before, width, 2), nn.ReLU()]
            before = width
        layers += [_Block(before) for _ in range(config.blocks)]
        self.trunk = nn.Sequential(*layers)
        self.attend = nn.Conv2d(before, config.places, 1)
        self.what = nn.Linear(config.places * before, config.width)
        self.locate = nn.Conv2d(before, config.located, 1)
        cells = config.resolution >> len(config.widths)
        self.where = nn.Linear(config.located * cells * cells, config.width)

    def forward(self, pixels_N3SS: Tensor) -> Tensor:
        map_NChw = self.trunk(pixels_N3SS)
        weights_NAP = self.attend(map_NChw).flatten(2).float().softmax(-1)
        seen_NAC = weights_NAP @ map_NChw.flatten(2).transpose(1, 2).float()
        located = F.relu(self.locate(map_NChw)).flatten(1)
        return self.what(seen_NAC.flatten(1)) + self.where(located)


class ClipEncoder(nn.Module):
    """Frames over time [B, d, F] -> [B, E], for any F.

    Residual convolutions compare frames at most 7 apart; beyond both ends are zeros. The mean over
    time tells what is in a clip, the largest value that something happened once in it, the trend
    (late minus early) in which order: "left then right" from "right then left".
    """

    def __init__(self, config: RankerConfig) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(
            nn.Conv1d(config.width, config.width, 3, padding=n, dilation=n)
            for n in config.dilations
        )
        self.project = nn.Linear(3 * config.width, config.embedding)

    def forward(self, x_BdF: Tensor) -> Tensor:
        for layer in self.layers:
            x_BdF = x_BdF + F.relu(layer(x_BdF))
        frames = x_BdF.shape[-1]
        time_F = (2 * torch.arange(frames, device=x_BdF.device) + 1 - frames) / frames  # in (-1, 1)
        pooled = [x_BdF.mean(-1), (x_BdF * time_F).mean(-1), x_BdF.amax(-1)]
        return self.project(torch.cat(pooled, dim=-1))


class Ranker(nn.Module):
    """Scores a caption against an image (F = 1) or a clip of any length.

    training_record: what ranker.json says of the training (steps, accuracy), kept with the model.
    """

    def __init__(self, config: RankerConfig, training_record: dict | None = None) -> None:
        super().__init__()
        self.config = config
        self.training_record = training_record or {}
        self.text = TextEncoder(config.text, config.embedding)
        self.frames = FrameEncoder(config)
        self.clip = ClipEncoder(config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))
        # Captions that differ in a word, or in the order of words, have to begin apart, or training
        # first learns to ignore what pictures do not tell yet. So words start large, and a text is
        # the sum of all of them, each weighted by where it stands.
        nn.init.normal_(self.text.embedding.weight)
        nn.init.normal_(self.text.position, std=0.1)
        self.text_order = nn.Parameter(1 + torch.randn(config.text.length, config.embedding) / 2)

    def forward(self, tokens_M: Tensor, frames_FSS3: Tensor) -> Tensor:
        """Token ids int [M], pixels uint8 [F, S, S, 3] -> fp32 scalar in [-1, 1], higher better."""
        text_BE = self.embed_texts(tokens_M[None])
        picture_BE = self.embed_pictures(frames_FSS3[None])
        return (text_BE * picture_BE).sum()

    def embed_texts(self, tokens_BM: Tensor) -> Tensor:
        """Token ids int [B, M], M at least the longest text -> unit vectors fp32 [B, E]."""
        said_BM1 = (tokens_BM != self.text.pad)[..., None]
        words_BME = self.text(tokens_BM) * self.text_order[: tokens_BM.shape[1]]
        return F.normalize((words_BME * said_BM1).sum(1).float(), dim=-1)

    def embed_pictures(self, frames_BFSS3: Tensor) -> Tensor:
        """Pixels uint8 [B, F, S, S, 3] -> unit vectors fp32 [B, E]."""
        features_Nd = self.embed_frames(frames_BFSS3.flatten(0, 1))
        return self.embed_clips(features_Nd.unflatten(0, frames_BFSS3.shape[:2]))

    def embed_frames(self, frames_NSS3: Tensor) -> Tensor:
        """Pixels uint8 [N, S, S, 3] -> [N, d], each frame for itself."""
        side = self.config.resolution
        if tuple(frames_NSS3.shape[1:]) != (side, side, 3):
            raise ValueError(
                f"frames of shape {tuple(frames_NSS3.shape[1:])} do not fit this ranker; it sees "
                f"({side}, {side}, 3)"
            )
        return self.frames(to_signed(frames_NSS3))

    def embed_clips(self, features_BFd: Tensor) -> Tensor:
        """`embed_frames`' vectors [B, F, d] of clips -> unit vectors fp32 [B, E]."""
        return F.normalize(self.clip(features_BFd.transpose(1, 2)).float(), dim=-1)

    def reads(self, tokenizer: TextTokenizer) -> bool:
        """Whether it was trained on this text tokenizer, as far as it knows."""
        return self.config.tokenizer in ("", tokenizer_digest(tokenizer))

    def scale(self) -> Tensor:
        """The learned inverse temperature of training; scores do not have it."""
        return self.log_scale.exp().clamp(max=LARGEST_SCALE)


def tokenizer_digest(tokenizer: TextTokenizer) -> str:
    """Names a text tokenizer: equal digests number all texts alike."""
    text = f"{tokenizer.length} {tokenizer.bpe.to_str()}"
    return hashlib.sha256(text.encode()).hexdigest()


def save_ranker(ranker: Ranker, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes ranker.safetensors, then ranker.json: a folder with the latter is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    tensors = {
        name: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in ranker.state_dict().items()
    }
    with replacing(folder / WEIGHTS) as partial:
        save_file(tensors, partial)
    data = {
        "format": FORMAT,
        "config": dataclasses.asdict(ranker.config),
        "training": ranker.training_record,
    }
    write_object(folder / CONFIG, data)


def load_ranker(folder: Path) -> Ranker | None:
    """The ranker of a folder in eval mode, fp32, on the CPU; None where there is no ranker.json.

    ValueError or FileNotFoundError naming the file that is broken or missing, or if tokenizer.json
    lies beside it and is not the one that the ranker was trained on.
    """
    path = folder / CONFIG
    if not path.exists():
        return None
    config, record = _read(path)
    ranker = Ranker(config, record)
    weights = folder / WEIGHTS
    if not weights.exists():
        raise FileNotFoundError(f"{weights} is missing; {path} needs it")
    try:
        ranker.load_state_dict(load_file(weights))
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a readable safetensors file: {error}") from None
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit {path}: {error}") from None
    text = folder / TEXT_TOKENIZER
    if text.exists() and not ranker.reads(TextTokenizer.from_file(text)):
        raise ValueError(
            f"the ranker in {folder} was trained on another text tokenizer than {text}; "
            f"train it again with --text {text}"
        )
    return ranker.eval()


def _read(path: Path) -> tuple[RankerConfig, dict]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data["config"].items()
        }
        fields["text"] = TextConfig(**fields["text"])
        return RankerConfig(**fields), data["training"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no ranker: {error!r}") from None
