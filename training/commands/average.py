"""`nuwa train average`: one model of several that were trained on from one another.

Model soups (Wortsman et al., 2022), for runs that begin at the same weights. The mean has to be
scored as any other model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from . import arguments, record

if TYPE_CHECKING:
    from torch import nn

    from ..checkpoint import Checkpoint


def add_average(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoints",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="folders, two at least; ranker and sampling are taken from the first",
    )
    parser.add_argument(
        "--shares", type=float, nargs="+", metavar="S", help="of each (default: equal ones)"
    )
    arguments.add_out(parser)


def average(args: argparse.Namespace) -> int:
    """Writes the mean of the models' weights, with the ranker and the sampling of the first one.

    Those of the others are not looked at. ValueError if their configs or tokenizers differ.
    """
    from ..averaging import weighted_mean
    from ..checkpoint import load_checkpoint, save_checkpoint

    arguments.check_out(args)
    paths, shares = args.checkpoints, args.shares or [1.0] * len(args.checkpoints)
    if len(paths) < 2 or len(shares) != len(paths):
        raise ValueError(
            f"{len(paths)} checkpoints and {len(shares)} shares: give two checkpoints or more, and "
            "one share each, or none"
        )
    if min(shares) <= 0:
        raise ValueError(f"share {min(shares)} is not above 0")
    parts = [load_checkpoint(path) for path in paths]
    for path, part in zip(paths[1:], parts[1:], strict=True):
        if what := _other(parts[0], part):
            raise ValueError(f"{path} has another {what} than {paths[0]}")
    first = parts[0]
    first.nuwa.load_state_dict(weighted_mean([part.nuwa.state_dict() for part in parts], shares))
    save_checkpoint(
        args.out,
        first.config,
        first.vqgan,
        first.nuwa,
        first.text_tokenizer,
        {
            "data": first.provenance.get("data", "unknown"),
            "licence": first.provenance.get("licence", "unknown"),
            "kind": args.kind,
            "of": [
                {"checkpoint": record.path(path), "share": share, "run": part.provenance}
                for path, share, part in zip(paths, shares, parts, strict=True)
            ],
            "command": record.command_line(),
        },
        sketch_vqgan=first.sketch_vqgan,
        ranker=first.ranker,
        sampling=first.sampling,
    )
    print(f"model: {args.out}")
    return 0


def _other(first: Checkpoint, second: Checkpoint) -> str:
    """What differs besides the model's weights; "" if nothing."""
    from ..ranker import tokenizer_digest

    if first.config != second.config:
        return "config"
    if tokenizer_digest(first.text_tokenizer) != tokenizer_digest(second.text_tokenizer):
        return "text tokenizer"
    if not _same(first.vqgan, second.vqgan):
        return "VQ-GAN of pictures"
    if not _same(first.sketch_vqgan, second.sketch_vqgan):
        return "VQ-GAN of class maps"
    return ""


def _same(first: nn.Module | None, second: nn.Module | None) -> bool:
    if first is None or second is None:
        return first is second
    theirs = second.state_dict()
    return all(value.equal(theirs[name]) for name, value in first.state_dict().items())
