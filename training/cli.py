"""`nuwa train`: tokenizer (VQ-GAN), model (NÜWA) and judge, on the captioned moving sprites."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nuwa.spec.config import PRESETS, ModelConfig, preset
from nuwa.spec.tasks import UNCONDITIONAL_PROMPT

from .sprites.world import COLOURS, FRAMES, LEVELS, MOTIONS, SpriteWorld

EPILOG = """\
examples:
  nuwa train tokenizer --steps 1100 --quantize-from 180 --discriminator-from 900 \\
      --emphasis 4 --square 4 --run runs/tokenizer
  nuwa train prune --tokenizer runs/tokenizer/checkpoint --out runs/pruned
  nuwa train model --tokenizer runs/pruned --run runs/model
  nuwa train judge --out checkpoints/judge-digits

A run can be stopped at any moment, even killed; the same command goes on where it was.
Each run folder holds metrics.jsonl, tensorboard/, samples/ and, at the end, checkpoint/.
"""


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Train a tokenizer, a model or a judge."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = parser.add_subparsers(
        dest="kind", required=True, metavar="{tokenizer,prune,model,judge}"
    )
    _tokenizer_arguments(kinds.add_parser("tokenizer", help="train a VQ-GAN", epilog=EPILOG))
    _prune_arguments(kinds.add_parser("prune", help="drop a VQ-GAN's background synonyms"))
    _model_arguments(kinds.add_parser("model", help="train NÜWA on a VQ-GAN's tokens"))
    _judge_arguments(kinds.add_parser("judge", help="train the judge that scores pictures"))
    return run


def run(arguments: argparse.Namespace) -> int:
    """Runs the chosen kind; 0 when done."""
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    kinds = {"tokenizer": _tokenizer, "prune": _prune, "model": _model, "judge": _judge}
    return kinds[arguments.kind](arguments)


def _common_arguments(parser: argparse.ArgumentParser, *, steps: int, run: str) -> None:
    parser.add_argument("--run", type=Path, default=Path(run), help="run folder (%(default)s)")
    parser.add_argument("--config", type=Path, help="model config as JSON, instead of --preset")
    parser.add_argument("--preset", choices=PRESETS, default="sprites", help="(%(default)s)")
    parser.add_argument("--level", choices=LEVELS, default="digits", help="sprites (%(default)s)")
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps (%(default)s)")
    parser.add_argument("--stop-after", type=int, help="pause at this step, to go on later")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps (%(default)s)")
    parser.add_argument("--sample-every", type=int, default=200, help="steps (%(default)s)")
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")


def _option_arguments(parser: argparse.ArgumentParser, options: type, *skip: str) -> None:
    """One flag for each field of an options dataclass."""
    defaults = options()
    for field in dataclasses.fields(options):
        if field.name in ("bf16", *skip):
            continue
        value = getattr(defaults, field.name)
        flag = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(flag, action="store_true", help="see the options' docstring")
            continue
        kind = float if field.name == "layer_scale" else int if value is None else type(value)
        parser.add_argument(flag, type=kind, default=value, help="(%(default)s)")


def _chosen(arguments: argparse.Namespace, options: type) -> Any:
    names = [field.name for field in dataclasses.fields(options) if field.name != "bf16"]
    return options(bf16=not arguments.fp32, **{name: getattr(arguments, name) for name in names})


def _tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    from .train_vqgan import VQGANOptions

    _common_arguments(parser, steps=1100, run="runs/tokenizer")
    _option_arguments(parser, VQGANOptions)


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    from .train_nuwa import NUWAOptions

    _common_arguments(parser, steps=3000, run="runs/model")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a trained VQ-GAN")
    parser.add_argument("--dataset-clips", type=int, default=8000, help="(%(default)s)")
    _option_arguments(parser, NUWAOptions)


def _prune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a trained VQ-GAN")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--level", choices=LEVELS, default="digits", help="(%(default)s)")
    parser.add_argument("--dataset-clips", type=int, default=400, help="(%(default)s)")
    parser.add_argument("--threshold", type=float, default=0.9, help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")


def _judge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--level", choices=LEVELS, default="digits", help="(%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=800, help="optimiser steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")


def _tokenizer(arguments: argparse.Namespace) -> int:
    from .train_vqgan import VQGANOptions, VQGANRecipe
    from .trainer import train

    world = SpriteWorld(arguments.level, "train")

    def pictures(first: int, count: int) -> np.ndarray:
        return np.stack([world.frame(i, i % FRAMES)[0] for i in range(first, first + count)])

    options = _chosen(arguments, VQGANOptions)
    config = _config(arguments).image
    _remember(arguments, {"options": dataclasses.asdict(options), "config": _plain(config)})
    recipe = VQGANRecipe(config, options, pictures, device=arguments.device, seed=arguments.seed)
    train(recipe, arguments.run, _trainer_options(arguments))
    print(f"VQ-GAN: {arguments.run / 'checkpoint'}")
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    from rich.progress import track

    from .checkpoint import load_tokenizer, save_tokenizer
    from .prune import prune_codebook

    world = SpriteWorld(arguments.level, "train")
    samples = (world.sample(i) for i in range(arguments.dataset_clips))
    clips = ((sample.frames, sample.segmentation) for sample in samples)
    before = load_tokenizer(arguments.tokenizer)
    counted = track(clips, "counting codes", total=arguments.dataset_clips)
    after = prune_codebook(before, counted, threshold=arguments.threshold)
    save_tokenizer(after, arguments.out)
    print(f"VQ-GAN: {arguments.out}, {after.config.codebook_size} codes of", end=" ")
    print(before.config.codebook_size)
    return 0


def _model(arguments: argparse.Namespace) -> int:
    from .checkpoint import load_tokenizer
    from .clips import token_clips
    from .text import train_text_tokenizer
    from .train_nuwa import NUWAOptions, NUWARecipe
    from .trainer import train

    vqgan = load_tokenizer(arguments.tokenizer)
    config = dataclasses.replace(_config(arguments), image=vqgan.config)
    text = _text_tokenizer(arguments.run, config, train_text_tokenizer)
    config = dataclasses.replace(
        config, text=dataclasses.replace(config.text, vocabulary_size=text.vocabulary_size)
    )
    options = _chosen(arguments, NUWAOptions)
    _remember(arguments, {"options": dataclasses.asdict(options), "config": _plain(config)})
    world = SpriteWorld(arguments.level, "train")
    clips = token_clips(vqgan, world, arguments.dataset_clips, arguments.run / "clips.npy")
    recipe = NUWARecipe(
        config,
        options,
        vqgan,
        text,
        clips,
        provenance=_provenance(arguments, options),
        device=arguments.device,
        seed=arguments.seed,
    )
    train(recipe, arguments.run, _trainer_options(arguments))
    print(f"checkpoint: {arguments.run / 'checkpoint'}")
    return 0


def _judge(arguments: argparse.Namespace) -> int:
    from .train_judge import make_judge

    judge = make_judge(arguments.level, arguments.out, steps=arguments.steps, seed=arguments.seed)
    print(json.dumps(judge.metadata["accuracy"], indent=2))
    print(f"judge: {arguments.out}")
    return 0


def captions() -> list[str]:
    """Captions that hold every word of both levels, to train the text vocabulary on."""
    from .sprites.world import BACKGROUNDS, CLASSES, Factors

    rows = [
        Factors(c, colour, background, motion)
        for c in range(len(CLASSES))
        for colour in COLOURS
        for background in BACKGROUNDS
        for motion in MOTIONS
    ]
    texts = [text for row in rows for text in (row.image_caption, row.video_caption)]
    return [*texts, UNCONDITIONAL_PROMPT]


def _text_tokenizer(run: Path, config: ModelConfig, trainer: Callable) -> Any:
    """Trained once a run: the library may number merges differently the next time."""
    from nuwa.spec.text import TextTokenizer

    path = run / "tokenizer.json"
    if not path.exists():
        run.mkdir(parents=True, exist_ok=True)
        trainer(captions(), config.text.vocabulary_size, config.text.length).save(path)
    return TextTokenizer.from_file(path)


def _trainer_options(arguments: argparse.Namespace) -> Any:
    from .trainer import TrainerOptions

    return TrainerOptions(
        steps=arguments.steps,
        seed=arguments.seed,
        checkpoint_every=arguments.checkpoint_every,
        sample_every=arguments.sample_every,
        stop_after=arguments.stop_after,
    )


def _config(arguments: argparse.Namespace) -> ModelConfig:
    if arguments.config is None:
        return preset(arguments.preset)
    return ModelConfig.from_json(arguments.config.read_text())


def _plain(config: Any) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _remember(arguments: argparse.Namespace, settings: dict) -> None:
    """Writes run.json, or refuses to go on with other settings than the run was begun with."""
    settings = {
        "kind": arguments.kind,
        "level": arguments.level,
        "steps": arguments.steps,
        "seed": arguments.seed,
        **settings,
    }
    path = arguments.run / "run.json"
    if path.exists():
        before = json.loads(path.read_text())
        changed = sorted(key for key in settings if settings[key] != before.get(key))
        if changed:
            raise ValueError(
                f"{arguments.run} was begun with other settings ({', '.join(changed)} differ); "
                f"give the same ones, or another --run"
            )
    arguments.run.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _provenance(arguments: argparse.Namespace, options: Any) -> dict:
    import platform

    import torch

    return {
        "data": f"captioned moving sprites, level {arguments.level}, split train: MNIST digits "
        "(CC BY-SA 3.0) and, at level full, animal-mnist silhouettes (MIT)",
        "licence": "Apache-2.0",
        "steps": arguments.steps,
        "seed": arguments.seed,
        "dataset_clips": arguments.dataset_clips,
        "options": dataclasses.asdict(options),
        "tokenizer_run": _tokenizer_run(arguments.tokenizer),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "command": _command_line(arguments),
    }


def _tokenizer_run(folder: Path) -> dict:
    path = folder.parent / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _command_line(arguments: argparse.Namespace) -> str:
    import shlex
    import sys

    return shlex.join(["nuwa", *sys.argv[1:]])
