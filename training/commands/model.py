"""`nuwa train model`: NÜWA on the tokens of trained VQ-GANs."""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nuwa.spec.config import ModelConfig
from nuwa.spec.tasks import Task
from nuwa.spec.text import TextTokenizer

from ..sources import Source
from . import arguments, record

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..train_nuwa import NUWAOptions
    from ..vqgan import VQGAN


def add_model(parser: argparse.ArgumentParser) -> None:
    from ..train_nuwa import NUWAOptions

    arguments.add_run(parser, steps=3000, run="runs/model")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of a trained VQ-GAN; without, those of --start"
    )
    parser.add_argument(
        "--sketch-tokenizer",
        type=Path,
        help="folder of a VQ-GAN of class maps; with --tokenizer and without it, no S2I, S2V",
    )
    parser.add_argument("--start", type=Path, help="begin at this checkpoint's weights")
    parser.add_argument(
        "--dataset-clips",
        type=arguments.positive,
        help="tokenize just so many beforehand (sprites: new ones at every step; --data: all)",
    )
    parser.add_argument(
        "--rollouts",
        type=Path,
        help="rollouts.npz of `nuwa evaluate --evaluator rollouts`, for --rolled-clips",
    )
    arguments.add_data(parser)
    arguments.add_options(parser, NUWAOptions)


def train_model(args: argparse.Namespace) -> int:
    from ..checkpoint import load_checkpoint
    from ..clips import Clips, FreshClips, encode_frames, store_clips
    from ..parallel import join
    from ..rollouts import load_rollouts
    from ..train_nuwa import NUWAOptions, NUWARecipe
    from ..trainer import train

    team = join(args.device)
    start = None if args.start is None else load_checkpoint(args.start)
    vqgan = _tokenizer(args, start)
    config, source = arguments.config(args), arguments.source(args, vqgan.config.resolution)
    sketch_vqgan = _sketch_tokenizer(args, start, source.classes)
    with team.leader_first():
        text = start.text_tokenizer if start else _text_tokenizer(args.run, config, source)
    config = dataclasses.replace(
        config,
        image=vqgan.config,
        sketch=None if sketch_vqgan is None else sketch_vqgan.config,
        text=dataclasses.replace(config.text, vocabulary_size=text.vocabulary_size),
        tasks=tuple(t for t in config.tasks if sketch_vqgan is not None or not t.needs_sketch),
    )
    options = arguments.options(args, NUWAOptions)
    config, left_out = _trained(config, options, start)
    if left_out and team.leads:
        print(f"no row of a step is of {', '.join(left_out)}: the model will not do these")
    rollouts = None
    if args.rollouts is not None:
        rollouts = load_rollouts(args.rollouts, source, partial(encode_frames, vqgan))
    settings = {
        "start": record.path(args.start),
        "rollouts": record.path(args.rollouts),
        "weights": record.weights(
            tokenizer=args.tokenizer,
            sketch_tokenizer=args.sketch_tokenizer,
            start=args.start,
            rollouts=args.rollouts,
        ),
        "config": record.plain(config),
        "data": record.data(args),
        "dataset_clips": args.dataset_clips,
        "processes": team.size,
    }
    clips: Clips
    with team.leader_first():
        record.remember(args, options, settings)
        if args.dataset_clips is None and source.count is None:
            clips = FreshClips(vqgan, source, sketch_vqgan, device=team.device)
        else:
            clips = store_clips(
                vqgan,
                source,
                args.dataset_clips or source.count or 0,
                args.run / "clips.npy",
                sketch_vqgan=sketch_vqgan,
            )
    recipe = NUWARecipe(
        config,
        options,
        vqgan,
        text,
        clips,
        sketch_vqgan=sketch_vqgan,
        start=start,
        rollouts=rollouts,
        provenance=record.provenance(
            args,
            options,
            source,
            rollouts=None if rollouts is None else rollouts.settings,
            processes=team.size,
        ),
        team=team,
        seed=args.seed,
    )
    trainer_options, alone = arguments.trainer_options(args), team.size == 1
    train(recipe, args.run, trainer_options, leads=team.leads, alone=alone)
    if team.leads:
        print(f"checkpoint: {args.run / 'checkpoint'}")
    return 0


def _tokenizer(args: argparse.Namespace, start: Checkpoint | None) -> VQGAN:
    """Of pictures. ValueError if no option names it."""
    from ..checkpoint import PICTURE_CHANNELS, load_tokenizer_of

    if args.tokenizer is not None:
        record.check_kind(args.tokenizer, sketches=False)
        return load_tokenizer_of(args.tokenizer, PICTURE_CHANNELS, sketches=False)
    if start is None:
        raise ValueError("give --tokenizer, or --start with a checkpoint whose tokenizers to take")
    return start.vqgan


def _sketch_tokenizer(
    args: argparse.Namespace, start: Checkpoint | None, classes: int
) -> VQGAN | None:
    """Of class maps of so many classes; with --tokenizer that of --start is not taken."""
    from ..checkpoint import check_channels, load_tokenizer_of

    if args.sketch_tokenizer is not None:
        record.check_kind(args.sketch_tokenizer, sketches=True)
        return load_tokenizer_of(args.sketch_tokenizer, classes, sketches=True)
    if start is None or start.sketch_vqgan is None or args.tokenizer is not None:
        return None
    check_channels(start.sketch_vqgan, classes, args.start)
    return start.sketch_vqgan


def _trained(
    config: ModelConfig, options: NUWAOptions, start: Checkpoint | None
) -> tuple[ModelConfig, list[Task]]:
    """The config with those of its tasks that are trained or were before, and the others."""
    before = () if start is None else start.config.tasks
    tasks = tuple(task for task in config.tasks if options.trains(task) or task in before)
    left_out = [task for task in config.tasks if task not in tasks]
    return dataclasses.replace(config, tasks=tasks), left_out


def _text_tokenizer(run: Path, config: ModelConfig, source: Source) -> TextTokenizer:
    """Trained once a run: the library may number merges differently the next time."""
    from ..text import train_text_tokenizer

    path = run / "tokenizer.json"
    if not path.exists():
        run.mkdir(parents=True, exist_ok=True)
        words, text = source.captions(), config.text
        train_text_tokenizer(words, text.vocabulary_size, text.length).save(path)
    return TextTokenizer.from_file(path)
