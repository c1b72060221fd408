"""Command-line arguments that several kinds of training share, and how their values are read.

Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuwa.spec.config import PRESETS, ModelConfig, preset

from ..sources import Pictures, Source, Sprites
from ..sprites.world import LEVELS

if TYPE_CHECKING:
    from ..trainer import TrainerOptions


class Paragraphs(argparse.HelpFormatter):
    """Wraps descriptions paragraph by paragraph, where argparse makes one of all."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(super(Paragraphs, self)._fill_text(p, width, indent) for p in paragraphs)


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


positive.__name__ = "whole number"  # argparse says "invalid whole number value: 'x'"


def add_run(parser: argparse.ArgumentParser, *, steps: int, run: str, model: bool = True) -> None:
    """What every training run has; `model`: with the config of a model."""
    parser.add_argument("--run", type=Path, default=Path(run), help="run folder (%(default)s)")
    if model:
        parser.add_argument("--config", type=Path, help="model config as JSON, instead of --preset")
        parser.add_argument("--preset", choices=PRESETS, default="sprites", help="(%(default)s)")
    parser.add_argument("--level", choices=LEVELS, default="digits", help="sprites (%(default)s)")
    add_steps(parser, steps)
    parser.add_argument("--stop-after", type=positive, help="pause at this step, to go on later")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    add_threads(parser)
    for name, default in (("--checkpoint-every", 100), ("--sample-every", 200)):
        parser.add_argument(name, type=positive, default=default, help="steps (%(default)s)")
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


def add_steps(parser: argparse.ArgumentParser, steps: int) -> None:
    parser.add_argument(
        "--steps", type=positive, default=steps, help="optimiser steps (%(default)s)"
    )


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive, help="CPU threads (all cores)")


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder to write, a new one")


def check_out(args: argparse.Namespace) -> None:
    """ValueError if --out is there and not empty: what is in it may be in use."""
    out: Path = args.out
    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise ValueError(f"{out} is there and not empty; name another folder")


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
    """One flag for each field of an options dataclass, whose docstring tells what they do; bf16 is
    that of add_run.
    """
    parser.formatter_class = Paragraphs
    group = parser.add_argument_group("options of the recipe", inspect.getdoc(kind))
    defaults = kind()
    for field in dataclasses.fields(kind):
        if field.name == "bf16":
            continue
        value = getattr(defaults, field.name)
        flag = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            group.add_argument(flag, action="store_true", help="see above")
            continue
        number = float if field.name == "layer_scale" else int if value is None else type(value)
        group.add_argument(flag, type=number, default=value, help="(%(default)s)")


def options(args: argparse.Namespace, kind: type) -> Any:
    """The options dataclass that add_options and add_run describe."""
    from ..precision import fast_bf16

    names = [field.name for field in dataclasses.fields(kind) if field.name != "bf16"]
    bf16 = args.bf16 or (not args.fp32 and fast_bf16(args.device.partition(":")[0]))
    return kind(bf16=bf16, **{name: getattr(args, name) for name in names})
