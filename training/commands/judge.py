"""`nuwa train judge`: the classifiers that score pictures of the sprites."""

from __future__ import annotations

import argparse
import json

from ..sprites.world import LEVELS
from . import arguments


def add_judge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--level", choices=LEVELS, default="digits", help="(%(default)s)")
    arguments.add_out(parser)
    arguments.add_steps(parser, 800)
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    arguments.add_threads(parser)


def train_judge(args: argparse.Namespace) -> int:
    from ..train_judge import make_judge

    arguments.check_out(args)
    judge = make_judge(args.level, args.out, steps=args.steps, seed=args.seed)
    print(json.dumps(judge.metadata["accuracy"], indent=2))
    print(f"judge: {args.out}")
    return 0
