"""Command-line arguments that several kinds of training share, and how their values are read.

Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuwa.spec.config import PRESETS, ModelConfig, preset

from ..sources import Pictures, Source, Sprites
from ..sprites.world import LEVELS

if TYPE_CHECKING:
    from ..trainer import TrainerOptions


def add_run(parser: argparse.ArgumentParser, *, steps: int, run: str, model: bool = True) -> None:
    """What every training run has; `model`: with the config of a model."""
    parser.add_argument("--run", type=Path, default=Path(run), help="run folder (%(default)s)")
    if model:
        parser.add_argument("--config", type=Path, help="model config as JSON, instead of --preset")
        parser.add_argument("--preset", choices=PRESETS, default="sprites", help="(%(default)s)")
    parser.add_argument("--level", choices=LEVELS, default="digits", help="sprites (%(default)s)")
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps (%(default)s)")
    parser.add_argument("--stop-after", type=int, help="pause at this step, to go on later")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    add_threads(parser)
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps (%(default)s)")
    parser.add_argument("--sample-every", type=int, default=200, help="steps (%(default)s)")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--bf16", action="store_true", help="autocast to bf16 (where the machine multiplies in it)"
    )
    precision.add_argument("--fp32", action="store_true", help="no bf16 autocast")


def trainer_options(args: argparse.Namespace) -> TrainerOptions:
    """Those of add_run that are the trainer's."""
    from ..trainer import TrainerOptions

    return TrainerOptions(
        steps=args.steps,
        seed=args.seed,
        checkpoint_every=args.checkpoint_every,
        sample_every=args.sample_every,
        stop_after=args.stop_after,
    )


def config(args: argparse.Namespace) -> ModelConfig:
    """--config or --preset."""
    if args.config is None:
        return preset(args.preset)
    return ModelConfig.from_json(args.config.read_text())


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="picture folder, instead of the sprites")


def source(args: argparse.Namespace, resolution: int | None = None) -> Source:
    """--data or --level. ValueError if its pictures are not of this resolution."""
    if args.data is None:
        return Sprites(args.level)
    pictures = Pictures(args.data, args.seed)
    if resolution not in (None, pictures.resolution):
        raise ValueError(
            f"{args.data} has pictures of {pictures.resolution} pixels, but the config's "
            f"tokenizer is for {resolution}; render them anew or give another --config"
        )
    return pictures


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """One flag for each field of an options dataclass; bf16 is that of add_run."""
    defaults = kind()
    for field in dataclasses.fields(kind):
        if field.name == "bf16":
            continue
        value = getattr(defaults, field.name)
        flag = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(flag, action="store_true", help="see the options' docstring")
            continue
        number = float if field.name == "layer_scale" else int if value is None else type(value)
        parser.add_argument(flag, type=number, default=value, help="(%(default)s)")


def options(args: argparse.Namespace, kind: type) -> Any:
    """The options dataclass that add_options and add_run describe."""
    from ..precision import fast_bf16

    names = [field.name for field in dataclasses.fields(kind) if field.name != "bf16"]
    bf16 = args.bf16 or (not args.fp32 and fast_bf16(args.device.partition(":")[0]))
    return kind(bf16=bf16, **{name: getattr(args, name) for name in names})
