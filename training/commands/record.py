"""What a training run writes down about itself: run.json, and the provenance of a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nuwa.spec.manifest import file_hash

from ..sources import Pictures, Source
from ..stored import read_object, write_object

RUN = "run.json"


def remember(args: argparse.Namespace, options: Any, settings: dict) -> None:
    """Writes run.json, or refuses to go on with other settings than the run was begun with.

    options: a dataclass; what a run of an earlier version did not know of counts as its default.
    ValueError also if what is there cannot be read.
    """
    said = {
        "kind": args.kind,
        "level": args.level,
        "steps": args.steps,
        "seed": args.seed,
        "options": dataclasses.asdict(options),
        **settings,
    }
    now = json.loads(json.dumps(said))  # as it reads back
    path = args.run / RUN
    found = read_object(path) if path.exists() else None
    if found is not None:
        known = plain(type(options)()) | found.get("options", {})
        before = found | {"options": known}
        if changed := sorted(_differences(before, now)):
            raise ValueError(
                f"{args.run} was begun with other settings ({'; '.join(changed)}); give the same "
                f"ones, or another --run"
            )
    args.run.mkdir(parents=True, exist_ok=True)
    if found != now:
        write_object(path, now)


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Of nested settings, those of `now` that were written down otherwise before."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now.keys() & before.keys():
            yield from _differences(before[key], now[key], f"{name}.{key}" if name else key)
    elif before != now:
        yield f"{name} was {json.dumps(before)}, is {json.dumps(now)}"


def weights(**named: Path | None) -> dict[str, Any]:
    """SHA-256 of files, or of the weights in folders, by name: a path does not tell what is there.

    None for what is not there.
    """
    return {name: _hashed(path) for name, path in named.items()}


def _hashed(path: Path | None) -> Any:
    if path is None:
        return None
    if path.is_dir():
        return {each.name: file_hash(each) for each in sorted(path.glob("*.safetensors"))}
    return file_hash(path) if path.exists() else None


def plain(config: Any) -> Any:
    """A dataclass as it reads back from JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def path(named: Path | None) -> str | None:
    return None if named is None else str(named)


def data(args: argparse.Namespace) -> dict | None:
    """What the picture folder says of itself; None for the sprites."""
    return None if args.data is None else Pictures(args.data).folder.data


def provenance(
    args: argparse.Namespace, options: Any, source: Source, *, rollouts: Any, processes: int
) -> dict:
    """Of a model: its data, settings and tokenizers, and where it was trained.

    rollouts: what they say of how they were made, or None.
    """
    import torch

    return {
        **source.provenance,
        "steps": args.steps,
        "seed": args.seed,
        "dataset_clips": args.dataset_clips,
        "options": dataclasses.asdict(options),
        "tokenizer_run": run_of(args.tokenizer),
        "sketch_tokenizer_run": run_of(args.sketch_tokenizer),
        "start": None if args.start is None else run_of(args.start),
        "rollouts": rollouts,
        "processes": processes,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "command": command_line(),
    }


def check_kind(folder: Path, *, sketches: bool) -> None:
    """ValueError if what is known of a VQ-GAN's folder says that it is of the other kind, which its
    channels need not tell: there may be as many classes as colours.
    """
    run = run_of(folder)
    kinds = {"tokenizer": False, "sketch-tokenizer": True, "prune": run.get("sketches")}
    known = kinds.get(run.get("kind", ""))
    if known is not None and known != sketches:
        names = {False: "pictures", True: "class maps"}
        raise ValueError(
            f"the VQ-GAN in {folder} is of {names[known]}, where one of {names[sketches]} is needed"
        )


def write_provenance(folder: Path, said: dict) -> None:
    """Beside weights that come from no run."""
    from ..checkpoint import PROVENANCE

    write_object(folder / PROVENANCE, said)


def command_line() -> str:
    return shlex.join(["nuwa", *sys.argv[1:]])


def run_of(checkpoint: Path | None) -> dict:
    """What a folder of weights says of itself, else run.json beside it, or nothing."""
    from ..checkpoint import PROVENANCE

    if checkpoint is None:
        return {}
    for path in (checkpoint / PROVENANCE, checkpoint.parent / RUN):
        if path.exists():
            return read_object(path)
    return {}
