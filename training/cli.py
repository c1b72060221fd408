"""`nuwa train`: tokenizers (VQ-GAN), model (NÜWA), ranker and judge.

On the captioned moving sprites, or on the picture folder (openmoji/folder.py) that --data names.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nuwa.spec.config import PRESETS, ModelConfig, VQGANConfig, preset
from nuwa.spec.text import TextTokenizer

from .sources import Pictures, Source, Sprites
from .sprites.world import LEVELS, SpriteWorld

EPILOG = """\
examples:
  nuwa train tokenizer --steps 1100 --quantize-from 180 --discriminator-from 900 \\
      --emphasis 4 --square 4 --run runs/tokenizer
  nuwa train sketch-tokenizer --steps 800 --emphasis 2 --run runs/sketch-tokenizer
  nuwa train prune --tokenizer runs/tokenizer/checkpoint --out runs/pruned
  nuwa train model --tokenizer runs/pruned --run runs/model
  nuwa train ranker --tokenizer runs/pruned --text runs/model/tokenizer.json --run runs/ranker
  nuwa train judge --out checkpoints/judge-digits

A run can be stopped at any moment, even killed; the same command goes on where it was.
Each run folder holds metrics.jsonl, tensorboard/, samples/ and, at the end, checkpoint/.
"""


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Train a tokenizer, a model or a judge."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = parser.add_subparsers(
        dest="kind", required=True, metavar="{tokenizer,sketch-tokenizer,prune,model,ranker,judge}"
    )
    _tokenizer_arguments(kinds.add_parser("tokenizer", help="train a VQ-GAN on pictures"))
    _sketch_arguments(kinds.add_parser("sketch-tokenizer", help="train a VQ-GAN on class maps"))
    _prune_arguments(kinds.add_parser("prune", help="drop a VQ-GAN's background synonyms"))
    _model_arguments(kinds.add_parser("model", help="train NÜWA on a VQ-GAN's tokens"))
    _ranker_arguments(kinds.add_parser("ranker", help="train the scorer that picks best of N"))
    _judge_arguments(kinds.add_parser("judge", help="train the judge that scores pictures"))
    return run


def run(arguments: argparse.Namespace) -> int:
    """Runs the chosen kind; 0 when done."""
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    kinds = {
        "tokenizer": _tokenizer,
        "sketch-tokenizer": _sketch_tokenizer,
        "prune": _prune,
        "model": _model,
        "ranker": _ranker,
        "judge": _judge,
    }
    return kinds[arguments.kind](arguments)


def _common_arguments(
    parser: argparse.ArgumentParser, *, steps: int, run: str, model: bool = True
) -> None:
    parser.add_argument("--run", type=Path, default=Path(run), help="run folder (%(default)s)")
    if model:
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
    _vqgan_arguments(parser)
    parser.add_argument(
        "--square", type=float, default=0.0, help="weight of the squared error (%(default)s)"
    )
    _option_arguments(parser, VQGANOptions)


def _sketch_arguments(parser: argparse.ArgumentParser) -> None:
    from .train_vqgan import VQGANOptions

    _common_arguments(parser, steps=800, run="runs/sketch-tokenizer")
    _vqgan_arguments(parser)
    _option_arguments(parser, VQGANOptions)


def _data_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="picture folder, instead of the sprites")


def _vqgan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--start", type=Path, help="begin at this VQ-GAN's weights")
    parser.add_argument("--codebook-size", type=int, help="instead of the config's")
    parser.add_argument(
        "--emphasis",
        type=float,
        default=0.0,
        help="extra weight of what is not background (%(default)s)",
    )
    _data_argument(parser)


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    from .train_nuwa import NUWAOptions

    _common_arguments(parser, steps=3000, run="runs/model")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a trained VQ-GAN")
    parser.add_argument(
        "--sketch-tokenizer",
        type=Path,
        help="folder of a VQ-GAN of class maps; without, no S2I, S2V",
    )
    parser.add_argument("--start", type=Path, help="begin at this checkpoint's weights")
    parser.add_argument(
        "--dataset-clips", type=int, help="(8000 of the sprites, or the whole --data)"
    )
    _data_argument(parser)
    _option_arguments(parser, NUWAOptions)


def _prune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a trained VQ-GAN")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--level", choices=LEVELS, default="digits", help="(%(default)s)")
    parser.add_argument("--dataset-clips", type=int, default=400, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of --data's order (%(default)s)")
    _data_argument(parser)
    parser.add_argument("--threshold", type=float, default=0.9, help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")


def _ranker_arguments(parser: argparse.ArgumentParser) -> None:
    from .train_ranker import RankerOptions

    _common_arguments(parser, steps=800, run="runs/ranker", model=False)
    parser.add_argument("--text", type=Path, required=True, help="tokenizer.json of the model")
    parser.add_argument("--tokenizer", type=Path, help="folder of the model's VQ-GAN")
    _option_arguments(parser, RankerOptions)


def _judge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--level", choices=LEVELS, default="digits", help="(%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=800, help="optimiser steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")


def _source(arguments: argparse.Namespace, resolution: int | None = None) -> Source:
    """--data or --level. ValueError if its pictures are not of this resolution."""
    if arguments.data is None:
        return Sprites(arguments.level)
    source = Pictures(arguments.data, arguments.seed)
    if resolution not in (None, source.resolution):
        raise ValueError(
            f"{arguments.data} has pictures of {source.resolution} pixels, but the config's "
            f"tokenizer is for {resolution}; render them anew or give another --config"
        )
    return source


def _tokenizer(arguments: argparse.Namespace) -> int:
    from . import vqgan_content

    content = {"emphasis": arguments.emphasis, "square": arguments.square}
    config = _config(arguments).image
    source = _source(arguments, config.resolution)
    kind = vqgan_content.Pictures(**content)
    return _train_vqgan(arguments, config, kind, source.pictures, content)


def _sketch_tokenizer(arguments: argparse.Namespace) -> int:
    from . import vqgan_content

    model = _config(arguments)
    if model.sketch is None:
        raise ValueError(f"model {model.name!r} has no sketch tokenizer; its config says null")
    content = {"emphasis": arguments.emphasis}
    source = _source(arguments, model.sketch.resolution)
    config = dataclasses.replace(model.sketch, channels=source.classes)
    kind = vqgan_content.ClassMaps(config.channels, **content)
    return _train_vqgan(arguments, config, kind, source.maps, content)


def _train_vqgan(
    arguments: argparse.Namespace, config: VQGANConfig, kind: Any, samples: Any, content: dict
) -> int:
    from .checkpoint import load_tokenizer
    from .train_vqgan import VQGANOptions, VQGANRecipe
    from .trainer import train

    if arguments.codebook_size is not None:
        config = dataclasses.replace(config, codebook_size=arguments.codebook_size)
    options = _chosen(arguments, VQGANOptions)
    start = None if arguments.start is None else load_tokenizer(arguments.start)
    settings = {
        "options": dataclasses.asdict(options),
        "content": content,
        "start": None if arguments.start is None else str(arguments.start),
        "config": _plain(config),
        "data": None if arguments.data is None else Pictures(arguments.data).folder.data,
    }
    _remember(arguments, settings)
    recipe = VQGANRecipe(
        config,
        options,
        kind,
        samples,
        start=start,
        device=arguments.device,
        seed=arguments.seed,
    )
    train(recipe, arguments.run, _trainer_options(arguments))
    print(f"VQ-GAN: {arguments.run / 'checkpoint'}")
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    from rich.progress import track

    from .checkpoint import load_tokenizer, save_tokenizer
    from .prune import prune_codebook

    before = load_tokenizer(arguments.tokenizer)
    source = _source(arguments, before.config.resolution)
    clips = (source.clip(i, range(source.frames)) for i in range(arguments.dataset_clips))
    counted = track(clips, "counting codes", total=arguments.dataset_clips)
    after = prune_codebook(before, counted, threshold=arguments.threshold)
    save_tokenizer(after, arguments.out)
    print(f"VQ-GAN: {arguments.out}, {after.config.codebook_size} codes of", end=" ")
    print(before.config.codebook_size)
    return 0


def _model(arguments: argparse.Namespace) -> int:
    from .checkpoint import load_checkpoint, load_tokenizer
    from .clips import token_clips
    from .train_nuwa import NUWAOptions, NUWARecipe
    from .trainer import train

    vqgan = load_tokenizer(arguments.tokenizer)
    sketch_vqgan = None
    if arguments.sketch_tokenizer is not None:
        sketch_vqgan = load_tokenizer(arguments.sketch_tokenizer)
    start = None if arguments.start is None else load_checkpoint(arguments.start)
    config, source = _config(arguments), _source(arguments, vqgan.config.resolution)
    text = start.text_tokenizer if start else _text_tokenizer(arguments.run, config, source)
    config = dataclasses.replace(
        config,
        image=vqgan.config,
        sketch=None if sketch_vqgan is None else sketch_vqgan.config,
        text=dataclasses.replace(config.text, vocabulary_size=text.vocabulary_size),
        tasks=tuple(t for t in config.tasks if sketch_vqgan is not None or not t.needs_sketch),
    )
    options = _chosen(arguments, NUWAOptions)
    settings = {
        "options": dataclasses.asdict(options),
        "start": None if arguments.start is None else str(arguments.start),
        "config": _plain(config),
        "data": None if arguments.data is None else Pictures(arguments.data).folder.data,
    }
    _remember(arguments, settings)
    clips = token_clips(
        vqgan,
        source,
        arguments.dataset_clips or len(source),
        arguments.run / "clips.npy",
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
        provenance=_provenance(arguments, options, source),
        device=arguments.device,
        seed=arguments.seed,
    )
    train(recipe, arguments.run, _trainer_options(arguments))
    print(f"checkpoint: {arguments.run / 'checkpoint'}")
    return 0


def _ranker(arguments: argparse.Namespace) -> int:
    from nuwa.spec.config import TextConfig
    from nuwa.spec.text import TextTokenizer

    from .checkpoint import load_tokenizer
    from .ranker import RankerConfig, tokenizer_digest
    from .train_ranker import VALIDATED, RankerOptions, RankerRecipe, reconstructions
    from .trainer import train

    text = TextTokenizer.from_file(arguments.text)
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
    options = _chosen(arguments, RankerOptions)
    settings = {"options": dataclasses.asdict(options), "config": _plain(config)}
    _remember(arguments, {**settings, "tokenizer": str(arguments.tokenizer or "")})
    seen: dict[str, np.ndarray] = {}
    if arguments.tokenizer is not None and options.reconstructed:
        vqgan = load_tokenizer(arguments.tokenizer)
        for split, count in (("train", options.reconstructed), ("val", VALIDATED)):
            cache = arguments.run / f"{split}.npy"
            world = SpriteWorld(arguments.level, split)
            seen[f"{split}_seen"] = reconstructions(vqgan, world, count, cache)
    record = {
        "steps": arguments.steps,
        "seed": arguments.seed,
        "options": dataclasses.asdict(options),
        "command": _command_line(arguments),
    }
    recipe = RankerRecipe(
        config,
        options,
        text,
        arguments.level,
        record=record,
        device=arguments.device,
        seed=arguments.seed,
        **seen,
    )
    train(recipe, arguments.run, _trainer_options(arguments))
    print(f"ranker: {arguments.run / 'checkpoint'}")
    return 0


def _judge(arguments: argparse.Namespace) -> int:
    from .train_judge import make_judge

    judge = make_judge(arguments.level, arguments.out, steps=arguments.steps, seed=arguments.seed)
    print(json.dumps(judge.metadata["accuracy"], indent=2))
    print(f"judge: {arguments.out}")
    return 0


def _text_tokenizer(run: Path, config: ModelConfig, source: Source) -> TextTokenizer:
    """Trained once a run: the library may number merges differently the next time."""
    from .text import train_text_tokenizer

    path = run / "tokenizer.json"
    if not path.exists():
        run.mkdir(parents=True, exist_ok=True)
        words, text = source.captions(), config.text
        train_text_tokenizer(words, text.vocabulary_size, text.length).save(path)
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


def _provenance(arguments: argparse.Namespace, options: Any, source: Source) -> dict:
    import platform

    import torch

    return {
        **source.provenance,
        "steps": arguments.steps,
        "seed": arguments.seed,
        "dataset_clips": arguments.dataset_clips,
        "options": dataclasses.asdict(options),
        "tokenizer_run": _tokenizer_run(arguments.tokenizer),
        "sketch_tokenizer_run": _tokenizer_run(arguments.sketch_tokenizer),
        "start": None if arguments.start is None else _tokenizer_run(arguments.start),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "command": _command_line(arguments),
    }


def _tokenizer_run(folder: Path | None) -> dict:
    if folder is None:
        return {}
    path = folder.parent / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _command_line(arguments: argparse.Namespace) -> str:
    import shlex
    import sys

    return shlex.join(["nuwa", *sys.argv[1:]])
