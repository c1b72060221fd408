"""`nuwa train rollouts`: clips as a model goes on with them, for `nuwa train model --rollouts`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..sprites.world import LEVELS
from . import arguments


def add_rollouts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help="of the model")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .npz")
    parser.add_argument("--clips", type=int, default=320, help="(%(default)s)")
    parser.add_argument("--frames", type=int, default=60, help="of each (%(default)s)")
    parser.add_argument(
        "--captioned",
        type=float,
        default=0.5,
        help="share prompted by the caption of an image (%(default)s)",
    )
    parser.add_argument("--temperature", type=float, default=0.1, help="(%(default)s)")
    parser.add_argument("--level", choices=LEVELS, default="digits", help="sprites (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    arguments.add_threads(parser)


def make_rollouts(args: argparse.Namespace) -> int:
    from rich.progress import track

    from ..checkpoint import load_checkpoint
    from ..rollouts import BATCH, joined, roll_out
    from ..sources import Sprites

    if args.clips < 1:
        raise ValueError(f"--clips {args.clips} is not at least 1")
    parts = roll_out(
        load_checkpoint(args.checkpoint),
        Sprites(args.level),
        clips=args.clips,
        frames=args.frames,
        captioned=args.captioned,
        temperature=args.temperature,
        seed=args.seed,
    )
    made = joined(list(track(parts, "rolling out", total=-(-args.clips // BATCH))))
    made.save(args.out)
    print(f"rollouts: {args.out}, {len(made.windows_W2)} windows to train on")
    return 0
