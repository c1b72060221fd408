"""`nuwa train ranker`: the scorer that picks the best of N, for the text tokenizer of a model."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from nuwa.spec.config import TextConfig
from nuwa.spec.text import TextTokenizer

from ..sprites.world import SpriteWorld
from . import arguments, record


def add_ranker(parser: argparse.ArgumentParser) -> None:
    from ..train_ranker import RankerOptions

    arguments.add_run(parser, steps=800, run="runs/ranker", model=False)
    parser.add_argument("--text", type=Path, required=True, help="tokenizer.json of the model")
    parser.add_argument("--tokenizer", type=Path, help="folder of the model's VQ-GAN")
    arguments.add_options(parser, RankerOptions)


def train_ranker(args: argparse.Namespace) -> int:
    from ..checkpoint import load_tokenizer
    from ..ranker import RankerConfig, tokenizer_digest
    from ..ranker_batches import reconstructions
    from ..train_ranker import VALIDATED, RankerOptions, RankerRecipe
    from ..trainer import train

    text = TextTokenizer.from_file(args.text)
    config = RankerConfig(
        text=TextConfig(
            vocabulary_size=text.vocabulary_size,
            length=text.length,
            width=128,
            layers=2,
            heads=2,
            mask_padding=True,
        ),
        tokenizer=tokenizer_digest(text),
    )
    options = arguments.options(args, RankerOptions)
    settings = {"config": record.plain(config), "tokenizer": str(args.tokenizer or "")}
    record.remember(args, options, settings)
    seen: dict[str, np.ndarray] = {}
    if args.tokenizer is not None and options.reconstructed:
        vqgan = load_tokenizer(args.tokenizer)
        for split, count in (("train", options.reconstructed), ("val", VALIDATED)):
            cache = args.run / f"{split}.npy"
            world = SpriteWorld(args.level, split)
            seen[f"{split}_seen"] = reconstructions(vqgan, world, count, cache, bf16=options.bf16)
    shipped = {
        "steps": args.steps,
        "seed": args.seed,
        "options": dataclasses.asdict(options),
        "command": record.command_line(),
    }
    recipe = RankerRecipe(
        config,
        options,
        text,
        args.level,
        record=shipped,
        device=args.device,
        seed=args.seed,
        **seen,
    )
    train(recipe, args.run, arguments.trainer_options(args), alone=True)
    print(f"ranker: {args.run / 'checkpoint'}")
    return 0
