"""`nuwa train judge`: the classifiers that score pictures of the sprites."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..sprites.world import LEVELS
from . import arguments


def add_judge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--level", choices=LEVELS, default="digits", help="(%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=800, help="optimiser steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    arguments.add_threads(parser)


def train_judge(args: argparse.Namespace) -> int:
    from ..train_judge import make_judge

    judge = make_judge(args.level, args.out, steps=args.steps, seed=args.seed)
    print(json.dumps(judge.metadata["accuracy"], indent=2))
    print(f"judge: {args.out}")
    return 0
