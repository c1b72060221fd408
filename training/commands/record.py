"""What a training run writes down about itself: run.json, and the provenance of a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from ..sources import Pictures, Source


def remember(args: argparse.Namespace, settings: dict) -> None:
    """Writes run.json, or refuses to go on with other settings than the run was begun with."""
    settings = {
        "kind": args.kind,
        "level": args.level,
        "steps": args.steps,
        "seed": args.seed,
        **settings,
    }
    path = args.run / "run.json"
    if path.exists():
        before = json.loads(path.read_text())
        changed = sorted(key for key in settings if settings[key] != before.get(key))
        if changed:
            raise ValueError(
                f"{args.run} was begun with other settings ({', '.join(changed)} differ); "
                f"give the same ones, or another --run"
            )
    args.run.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def plain(config: Any) -> Any:
    """A dataclass as it reads back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def start(args: argparse.Namespace) -> str | None:
    return None if args.start is None else str(args.start)


def data(args: argparse.Namespace) -> dict | None:
    """What the picture folder says of itself; None for the sprites."""
    return None if args.data is None else Pictures(args.data).folder.data


def provenance(args: argparse.Namespace, options: Any, source: Source) -> dict:
    """Of a model: its data, settings and tokenizers, and where it was trained."""
    import torch

    return {
        **source.provenance,
        "steps": args.steps,
        "seed": args.seed,
        "dataset_clips": args.dataset_clips,
        "options": dataclasses.asdict(options),
        "tokenizer_run": _run_of(args.tokenizer),
        "sketch_tokenizer_run": _run_of(args.sketch_tokenizer),
        "start": None if args.start is None else _run_of(args.start),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "command": command_line(),
    }


def command_line() -> str:
    return shlex.join(["nuwa", *sys.argv[1:]])


def _run_of(checkpoint: Path | None) -> dict:
    """run.json beside this folder, else what a checkpoint says of itself, or nothing."""
    if checkpoint is None:
        return {}
    for path in (checkpoint.parent / "run.json", checkpoint / "training.json"):
        if path.exists():
            found: dict = json.loads(path.read_text())
            return found
    return {}
