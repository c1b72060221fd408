"""`nuwa inspect`: what a bundle holds, for people and for programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nuwa.spec.manifest import Manifest
from nuwa.spec.plan import longest_clip
from nuwa.spec.tasks import Task

from ..ranking import ranker_names

DESCRIPTION = """\
Show what a bundle holds: the model, the tasks it can do, the precision, its licence and files.

The files are checked against the manifest, so a damaged bundle is refused."""

EXAMPLES = """\
examples:
  nuwa inspect demo/bundle
  nuwa inspect demo/bundle --json | jq .config
"""


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("bundle", type=Path, help="folder made by `nuwa export`")
    parser.add_argument("--json", action="store_true", help="print the manifest as it is, in JSON")
    return run


def run(args: argparse.Namespace) -> int:
    from ..bundle import open_bundle

    bundle = open_bundle(args.bundle)
    text = bundle.manifest.to_json()
    if args.json:
        print(text, end="")
        return 0
    manifest = json.loads(text)
    files = manifest.pop("files")
    manifest |= abilities(bundle.manifest)
    rows = [*flatten(manifest), ("bundle hash", bundle.hash)]
    rows += [(f"file {name}", _file(args.bundle / name, files[name])) for name in sorted(files)]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    return 0


def abilities(manifest: Manifest) -> dict[str, Any]:
    """What requests may ask of this bundle, here; the manifest says it in other words or not."""
    sketch = manifest.config.sketch
    predicts = Task.V2V in manifest.tasks
    return {
        "max_predicted_frames": longest_clip(manifest.config.decoder) if predicts else None,
        "sketch_classes": None if sketch is None else sketch.channels,
        "rankers": list(ranker_names(manifest)),  # those of installed packages too
    }


def flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each plain value of nested objects with its dotted path; a short list is one value."""
    for name, inner in value.items():
        path = f"{prefix}{name}"
        if isinstance(inner, dict):
            yield from flatten(inner, f"{path}.")
        elif isinstance(inner, list):
            yield path, ", ".join(map(str, inner)) or "none"
        elif isinstance(inner, int) and not isinstance(inner, bool):
            yield path, f"{inner:,}".replace(",", " ")
        else:
            yield path, "none" if inner is None else str(inner)


def _file(path: Path, digest: str) -> str:
    return f"{path.stat().st_size / 1e6:8.2f} MB  sha256 {digest[:16]}"
