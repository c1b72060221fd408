"""`nuwa train tokenizer`, `sketch-tokenizer` and `prune`: VQ-GANs of pictures and class maps."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from nuwa.spec.config import VQGANConfig

from ..sprites.world import LEVELS
from . import arguments, record


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    from ..train_vqgan import VQGANOptions

    arguments.add_run(parser, steps=1100, run="runs/tokenizer")
    _add_vqgan(parser)
    parser.add_argument(
        "--square", type=float, default=0.0, help="weight of the squared error (%(default)s)"
    )
    arguments.add_options(parser, VQGANOptions)


def train_tokenizer(args: argparse.Namespace) -> int:
    from .. import vqgan_content

    content = {"emphasis": args.emphasis, "square": args.square}
    config = arguments.config(args).image
    source = arguments.source(args, config.resolution)
    kind = vqgan_content.Pictures(**content)
    return _train(args, config, kind, source.pictures, content)


def add_sketch_tokenizer(parser: argparse.ArgumentParser) -> None:
    from ..train_vqgan import VQGANOptions

    arguments.add_run(parser, steps=800, run="runs/sketch-tokenizer")
    _add_vqgan(parser)
    arguments.add_options(parser, VQGANOptions)


def train_sketch_tokenizer(args: argparse.Namespace) -> int:
    from .. import vqgan_content

    model = arguments.config(args)
    if model.sketch is None:
        raise ValueError(f"model {model.name!r} has no sketch tokenizer; its config says null")
    content = {"emphasis": args.emphasis}
    source = arguments.source(args, model.sketch.resolution)
    config = dataclasses.replace(model.sketch, channels=source.classes)
    kind = vqgan_content.ClassMaps(config.channels, **content)
    return _train(args, config, kind, source.maps, content)


def add_prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a trained VQ-GAN")
    arguments.add_out(parser)
    parser.add_argument("--level", choices=LEVELS, default="digits", help="(%(default)s)")
    parser.add_argument(
        "--dataset-clips", type=arguments.positive, default=400, help="(%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --data's order (%(default)s)")
    arguments.add_data(parser)
    parser.add_argument("--threshold", type=float, default=0.9, help="(%(default)s)")
    parser.add_argument("--sketches", action="store_true", help="it is a VQ-GAN of class maps")
    arguments.add_threads(parser)


def prune(args: argparse.Namespace) -> int:
    from rich.progress import track

    from ..checkpoint import (
        PICTURE_CHANNELS,
        check_channels,
        load_tokenizer,
        save_tokenizer,
        tokenizer_name,
    )
    from ..prune import prune_codebook

    arguments.check_out(args)
    record.check_kind(args.tokenizer, sketches=args.sketches)
    name = tokenizer_name(args.tokenizer, sketches=args.sketches)
    before = load_tokenizer(args.tokenizer, name)
    source = arguments.source(args, before.config.resolution)
    channels = source.classes if args.sketches else PICTURE_CHANNELS
    check_channels(before, channels, args.tokenizer)
    clips = (source.clip(i, range(source.frames)) for i in range(args.dataset_clips))
    counted = track(clips, "counting codes", total=args.dataset_clips)
    after = prune_codebook(before, counted, threshold=args.threshold, sketches=args.sketches)
    save_tokenizer(after, args.out)
    record.write_provenance(
        args.out,
        {
            **source.provenance,
            "kind": args.kind,
            "dataset_clips": args.dataset_clips,
            "threshold": args.threshold,
            "sketches": args.sketches,
            "seed": args.seed,
            "tokenizer_run": record.run_of(args.tokenizer),
            "command": record.command_line(),
        },
    )
    print(f"VQ-GAN: {args.out}, {after.config.codebook_size} codes of", end=" ")
    print(before.config.codebook_size)
    return 0


def _add_vqgan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--start", type=Path, help="begin at this VQ-GAN's weights")
    parser.add_argument(
        "--codebook-size", type=int, help="instead of that of --start, or without it of the config"
    )
    parser.add_argument(
        "--emphasis",
        type=float,
        default=0.0,
        help="extra weight of what is not background (%(default)s)",
    )
    arguments.add_data(parser)


def _train(
    args: argparse.Namespace, config: VQGANConfig, kind: Any, samples: Any, content: dict
) -> int:
    from ..checkpoint import load_tokenizer_of
    from ..train_vqgan import VQGANOptions, VQGANRecipe
    from ..trainer import train

    options = arguments.options(args, VQGANOptions)
    start = None
    if args.start is not None:
        sketches = args.kind == "sketch-tokenizer"
        record.check_kind(args.start, sketches=sketches)
        start = load_tokenizer_of(args.start, config.channels, sketches=sketches)
    size = args.codebook_size or (config if start is None else start.config).codebook_size
    config = dataclasses.replace(config, codebook_size=size)
    settings = {
        "content": content,
        "start": record.path(args.start),
        "weights": record.weights(start=args.start),
        "config": record.plain(config),
        "data": record.data(args),
    }
    record.remember(args, options, settings)
    recipe = VQGANRecipe(
        config,
        options,
        kind,
        samples,
        start=start,
        device=args.device,
        seed=args.seed,
    )
    train(recipe, args.run, arguments.trainer_options(args), alone=True)
    print(f"VQ-GAN: {args.run / 'checkpoint'}")
    return 0
