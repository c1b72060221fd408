"""`nuwa train`: tokenizers (VQ-GAN), model (NÜWA), ranker and judge; commands/ runs each kind.

On the captioned moving sprites, or on the picture folder (openmoji/folder.py) that --data names.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import NamedTuple

from .commands import average, judge, model, ranker, tokenizers

EPILOG = """\
examples:
  nuwa train tokenizer --steps 1100 --quantize-from 180 --discriminator-from 900 \\
      --emphasis 4 --square 4 --run runs/tokenizer
  nuwa train sketch-tokenizer --steps 800 --emphasis 2 --run runs/sketch-tokenizer
  nuwa train prune --tokenizer runs/tokenizer/checkpoint --out runs/pruned
  nuwa train model --tokenizer runs/pruned --sketch-tokenizer runs/sketch-tokenizer/checkpoint \\
      --images 56 --sketch-images 16 --hidden-images 24 --clips 4 --sketch-clips 2 \\
      --hidden-clips 2 --run runs/model
  nuwa evaluate my-bundle --evaluator rollouts --split train --samples 256 --out runs/rollouts
  nuwa train model --start runs/model/checkpoint --rollouts runs/rollouts/rollouts.npz \\
      --rolled-clips 0.5 --none-clips 0.8 --images 24 --sketch-images 16 --hidden-images 32 \\
      --clips 8 --sketch-clips 2 --hidden-clips 2 --run runs/model-2
  nuwa train average runs/model/checkpoint runs/model-2/checkpoint --out runs/mean/checkpoint
  nuwa train ranker --tokenizer runs/pruned --text runs/model/tokenizer.json --run runs/ranker
  nuwa train judge --out runs/judge-digits

A run can be stopped at any moment, even killed; the same command goes on where it was. At Ctrl-C or
SIGTERM it ends its step and saves it first, where one process trains; a second one ends it at once.
Each run folder holds metrics.jsonl, tensorboard/, samples/ and, at the end, checkpoint/.
"""


class Kind(NamedTuple):
    """What is trained: its line of help, what adds its arguments, what runs it."""

    help: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


KINDS = {
    "tokenizer": Kind(
        "train a VQ-GAN on pictures", tokenizers.add_tokenizer, tokenizers.train_tokenizer
    ),
    "sketch-tokenizer": Kind(
        "train a VQ-GAN on class maps",
        tokenizers.add_sketch_tokenizer,
        tokenizers.train_sketch_tokenizer,
    ),
    "prune": Kind("drop a VQ-GAN's background synonyms", tokenizers.add_prune, tokenizers.prune),
    "model": Kind("train NÜWA on a VQ-GAN's tokens", model.add_model, model.train_model),
    "average": Kind(
        "average models that go back to the same one", average.add_average, average.average
    ),
    "ranker": Kind("train the scorer that picks best of N", ranker.add_ranker, ranker.train_ranker),
    "judge": Kind("train the judge that scores pictures", judge.add_judge, judge.train_judge),
}


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Train a tokenizer, a model or a judge."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="{" + ",".join(KINDS) + "}")
    for name, kind in KINDS.items():
        kind.add(kinds.add_parser(name, help=kind.help))
    return run


def run(arguments: argparse.Namespace) -> int:
    """Runs the chosen kind; 0 when done."""
    import torch

    from .parallel import check_device

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and arguments.kind != "model":
        raise ValueError(f"{arguments.kind} is trained by one process, not by {processes}")
    if getattr(arguments, "threads", None):
        torch.set_num_threads(arguments.threads)
    if hasattr(arguments, "device"):
        check_device(arguments.device)
    return KINDS[arguments.kind].run(arguments)
