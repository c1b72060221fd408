"""Frozen, validated model configurations with a JSON round trip, and the presets.

A config says everything that decides what the numbers of a checkpoint mean; it knows no framework
and no training settings.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from .grid import Extent, Grid, window_offsets
from .tasks import Task

SHIFTS = ("nearest", "raster")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class VQGANConfig:
    """A VQ-GAN with taming-transformers' architecture (its `ddconfig`, in plain words).

    resolution: square input size in pixels; channels: 3 for pictures, the number of classes for
    sketches; attention_resolutions: feature-map sizes that carry an attention block.
    """

    resolution: int = 336
    channels: int = 3
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (21,)
    z_channels: int = 256
    embedding_dim: int = 256
    codebook_size: int = 12288

    def __post_init__(self) -> None:
        _require(len(self.channel_multipliers) >= 1, "channel_multipliers is empty")
        _require(
            self.resolution % self.downsampling == 0,
            f"resolution {self.resolution} is not a multiple of {self.downsampling}, the "
            f"down-sampling of {len(self.channel_multipliers)} levels",
        )
        _require(
            self.base_channels % 32 == 0,
            f"base_channels {self.base_channels} is not a multiple of 32 (GroupNorm's groups)",
        )
        _require(
            2 <= self.codebook_size <= 1 << 14,
            f"codebook_size {self.codebook_size} is not in [2, 16384]",
        )
        sizes = [self.resolution >> level for level in range(len(self.channel_multipliers))]
        for size in self.attention_resolutions:
            _require(
                size in sizes, f"attention_resolutions has {size}; this model's sizes are {sizes}"
            )

    @property
    def downsampling(self) -> int:
        """Pixels per token and axis, f."""
        return 1 << (len(self.channel_multipliers) - 1)

    @property
    def grid_size(self) -> int:
        """Tokens per axis of one frame."""
        return self.resolution // self.downsampling


@dataclass(frozen=True)
class TextConfig:
    """The text encoder: a pre-LN transformer over `length` BPE tokens (CLIP's at paper size)."""

    vocabulary_size: int = 49408
    length: int = 77
    width: int = 512
    layers: int = 12
    heads: int = 8
    mask_padding: bool = False

    def __post_init__(self) -> None:
        _require(
            self.heads >= 1 and self.width % self.heads == 0,
            f"text width {self.width} is not a multiple of heads {self.heads}",
        )
        _require(self.length >= 2, f"text length {self.length} leaves no room for bos and eos")


@dataclass(frozen=True)
class DecoderConfig:
    """The 3DNA decoder.

    grid: the largest volume (frames, height, width in tokens) with learned positions; extents:
    window sizes, cycled over the layers; shift: which token a position is fed, the nearest decoded
    neighbour ("nearest") or the previous one in raster order ("raster").
    """

    grid: Grid = Grid(10, 21, 21)
    width: int = 1280
    layers: int = 24
    heads: int = 20
    ff_multiplier: int = 4
    extents: tuple[Extent, ...] = (Extent(3, 3, 3),)
    shift: str = "nearest"
    relative_bias: bool = False

    def __post_init__(self) -> None:
        _require(
            self.heads >= 1 and self.width % self.heads == 0,
            f"decoder width {self.width} is not a multiple of heads {self.heads}",
        )
        _require(self.shift in SHIFTS, f"shift {self.shift!r} is not one of {SHIFTS}")
        _require(len(self.extents) >= 1, "extents is empty")
        _require(self.layers >= 1, f"layers {self.layers} is not at least 1")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def window_extents(self) -> tuple[Extent, ...]:
        """The distinct extents in order of first use; the columns of `neighbours` follow them."""
        return tuple(dict.fromkeys(self.layer_extent(layer) for layer in range(self.layers)))

    def layer_extent(self, layer: int) -> Extent:
        """The extent of one layer, `full` axes resolved against the grid."""
        return self.extents[layer % len(self.extents)].resolve(self.grid)

    def neighbour_columns(self, layer: int) -> tuple[int, int]:
        """The half-open range of the `neighbours` input's columns that a layer reads."""
        start = 0
        for extent in self.window_extents:
            stop = start + len(window_offsets(extent, causal=True))
            if extent == self.layer_extent(layer):
                return start, stop
            start = stop
        raise AssertionError("every layer's extent is among window_extents")

    @property
    def neighbour_count(self) -> int:
        """Columns of the `neighbours` input: all windows of `window_extents` side by side."""
        return sum(len(window_offsets(extent, causal=True)) for extent in self.window_extents)


@dataclass(frozen=True)
class VisualConfig:
    """The visual encoder: 3DNA over the tokens of a sketch, or of the known part of a picture.

    It has the decoder's width and grid. extent: window of its self-attention; cross: the window in
    which a decoder position attends to the result; relative_bias: of both. edge_levels: how finely
    the id of a hidden token tells what a mask leaves visible at each edge of its patch (see
    known.hidden_edges); 1: not at all, all hidden tokens have one id.
    """

    layers: int = 12
    heads: int = 20
    ff_multiplier: int = 4
    extent: Extent = Extent(3, 3, 3)
    cross: Extent = Extent(3, 3, 3)
    relative_bias: bool = False
    edge_levels: int = 1

    def __post_init__(self) -> None:
        _require(self.layers >= 1, f"visual layers {self.layers} is not at least 1")
        _require(1 <= self.edge_levels <= 8, f"edge_levels {self.edge_levels} is not in [1, 8]")


@dataclass(frozen=True)
class ModelConfig:
    """A whole NÜWA model: tokenizers, encoders, decoder and the tasks it was trained for.

    sketch: the VQ-GAN of class maps, channels = classes; visual: the encoder of sketches and of
    known picture tokens. Without them (None) a model does no task that needs them.
    """

    name: str
    image: VQGANConfig = field(default_factory=VQGANConfig)
    text: TextConfig = field(default_factory=TextConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    tasks: tuple[Task, ...] = (Task.T2I, Task.T2V, Task.V2V)
    sketch: VQGANConfig | None = None
    visual: VisualConfig | None = None

    def __post_init__(self) -> None:
        size = self.image.grid_size
        grid = self.decoder.grid
        _require(
            (grid.height, grid.width) == (size, size),
            f"the decoder's grid is {grid.height}x{grid.width} tokens a frame, the tokenizer's "
            f"{size}x{size}",
        )
        if self.sketch is not None:
            _require(self.visual is not None, "a sketch tokenizer needs a visual encoder")
            _require(
                self.sketch.resolution == self.image.resolution and self.sketch.grid_size == size,
                f"sketches of {self.sketch.resolution} pixels in {self.sketch.grid_size}x"
                f"{self.sketch.grid_size} tokens do not fit pictures of "
                f"{self.image.resolution} in {size}x{size}",
            )
        if self.visual is not None:
            _require(
                self.visual.heads >= 1 and self.decoder.width % self.visual.heads == 0,
                f"decoder width {self.decoder.width} is not a multiple of visual heads "
                f"{self.visual.heads}",
            )

    @property
    def hidden(self) -> int:
        """The visual encoder's id of a token whose whole patch is hidden: past both codebooks.

        Its ids are the picture's codes, then the sketch's, then this one and those of tokens that
        are hidden in part.
        """
        sketch = 0 if self.sketch is None else self.sketch.codebook_size
        return self.image.codebook_size + sketch

    @property
    def visual_ids(self) -> int:
        """How many ids the visual encoder has."""
        assert self.visual is not None, "this model has no visual encoder"
        return self.hidden + self.visual.edge_levels**4

    @property
    def bos(self) -> int:
        """The input token of the very first position: one past the codebook."""
        return self.image.codebook_size

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal config."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Config from `to_json`'s text; ValueError for anything unknown, missing or invalid."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"model config is not JSON: {error}") from None
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Any) -> ModelConfig:
        """Config from parsed JSON; ValueError as `from_json`."""
        fields = _fields(cls, data)
        decoder = _fields(DecoderConfig, fields.get("decoder", {}))
        if "grid" in decoder:
            decoder["grid"] = Grid(**_fields(Grid, decoder["grid"]))
        if "extents" in decoder:
            decoder["extents"] = tuple(Extent(**_fields(Extent, e)) for e in decoder["extents"])
        sketch, visual = fields.get("sketch"), fields.get("visual")
        if visual is not None:
            visual = _fields(VisualConfig, visual)
            for name in ("extent", "cross"):
                if name in visual:
                    visual[name] = Extent(**_fields(Extent, visual[name]))
        return cls(
            name=fields["name"],
            image=VQGANConfig(**_tuples(_fields(VQGANConfig, fields.get("image", {})))),
            sketch=None if sketch is None else VQGANConfig(**_tuples(_fields(VQGANConfig, sketch))),
            visual=None if visual is None else VisualConfig(**visual),
            text=TextConfig(**_fields(TextConfig, fields.get("text", {}))),
            decoder=DecoderConfig(**decoder),
            tasks=tuple(Task(task) for task in fields.get("tasks", ())),
        )


def _fields(kind: type, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{kind.__name__} is {data!r}, not a JSON object")
    known = [f.name for f in dataclasses.fields(kind)]
    unknown = sorted(set(data) - set(known))
    _require(not unknown, f"{kind.__name__} has unknown fields {unknown}; it knows {known}")
    required = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in data]
    _require(not missing, f"{kind.__name__} lacks {missing}")
    return dict(data)


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


_SPRITES_VQGAN = VQGANConfig(
    resolution=64,
    base_channels=32,
    channel_multipliers=(1, 1, 2, 4),
    res_blocks=1,
    attention_resolutions=(),
    z_channels=64,
    embedding_dim=64,
    codebook_size=1024,
)

PRESETS: dict[str, ModelConfig] = {
    # The demo model: 64x64 clips of 10 frames, f8, trained on two CPU cores.
    "sprites": ModelConfig(
        name="sprites",
        image=_SPRITES_VQGAN,
        text=TextConfig(
            vocabulary_size=512, length=77, width=128, layers=2, heads=2, mask_padding=True
        ),
        decoder=DecoderConfig(
            grid=Grid(10, 8, 8),
            width=256,
            layers=6,
            heads=4,
            ff_multiplier=2,
            extents=(Extent(5, 3, 3),),
            relative_bias=True,
        ),
        tasks=tuple(Task),
        sketch=dataclasses.replace(_SPRITES_VQGAN, channels=21),
        visual=VisualConfig(layers=3, heads=4, ff_multiplier=2, relative_bias=True, edge_levels=4),
    ),
    # The paper's NÜWA-336: 870.16 M parameters without the VQ-GANs and the visual encoder.
    "base": ModelConfig(name="base"),
}


def preset(name: str) -> ModelConfig:
    """Preset by name; ValueError naming the choices otherwise."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
