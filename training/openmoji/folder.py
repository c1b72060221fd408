"""Renders drawings into a picture folder, in steps that can be interrupted anywhere.

A picture folder is what `--data` of the training commands reads (dataset.py):

    pictures.npy   u8 [N, H, W, 3]
    sketches.npy   u8 [N, H, W], class ids below the number of classes, 0 the background
    captions.json  N objects: caption, tags, emoji, group, name, split (train, val or test)
    data.json      count, resolution, background, classes, splits and where the data are from

data.json is written last: a folder with it is complete. Until then parts/ holds what is done. Knows
no package; drawings and the rasterizer are given.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import track

from nuwa.spec.files import replacing, write_text

from .layers import CLASSES, class_map, line_art, over
from .names import SPLITS, characters, split_of
from .source import Drawing

FORMAT = 1
PART = 128  # drawings of a part: about two seconds of work
DATA, PICTURES, SKETCHES, CAPTIONS = "data.json", "pictures.npy", "sketches.npy", "captions.json"

Rasterizer = Callable[[str, int], npt.NDArray[np.uint8]]


def render_folder(
    folder: Path,
    drawings: Sequence[Drawing],
    rasterize: Rasterizer,
    *,
    resolution: int,
    background: tuple[int, int, int],
    provenance: dict,
) -> dict:
    """Writes the folder, or goes on where an earlier call stopped; returns data.json's content.

    Of drawings that look alike at this resolution only the one with the shortest caption is kept.
    ValueError if the folder was begun with other settings or drawings.
    """
    if resolution < 8:
        raise ValueError(f"resolution {resolution} is not at least 8")
    if not drawings:
        raise ValueError("there are no drawings to render")
    order = json.dumps([[d.name, d.svg, d.words.caption] for d in drawings]).encode()
    identity = {
        "format": FORMAT,
        "drawings": hashlib.sha256(order).hexdigest(),
        "resolution": resolution,
        "background": list(background),
        **provenance,
    }
    parts = folder / "parts"
    done = _begun(folder / DATA, identity)
    if done is not None:
        shutil.rmtree(parts, ignore_errors=True)
        return done
    parts.mkdir(parents=True, exist_ok=True)
    if _begun(parts / DATA, identity) is None:
        _write(parts / DATA, identity)
    starts = range(0, len(drawings), PART)
    paths = [parts / f"{start:06}.npz" for start in starts]
    for start, path in track(list(zip(starts, paths, strict=True)), "rendering"):
        if not path.exists():
            some = drawings[start : start + PART]
            _render_part(path, some, rasterize, resolution, background)
    data = _assemble(folder, drawings, paths, identity)
    shutil.rmtree(parts)
    return data


def _begun(path: Path, identity: dict) -> dict | None:
    """The JSON at `path` if it has this identity, None if there is none; else ValueError."""
    if not path.exists():
        return None
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(key for key in identity if identity[key] != before.get(key))
    if changed:
        raise ValueError(
            f"{path} was begun with other settings ({', '.join(changed)} differ); "
            f"give the same ones, or another folder"
        )
    return before


def _render_part(
    path: Path,
    drawings: Sequence[Drawing],
    rasterize: Rasterizer,
    resolution: int,
    background: tuple[int, int, int],
) -> None:
    pictures, sketches = [], []
    for drawing in drawings:
        whole_HW4 = rasterize(drawing.svg, resolution)
        lines_HW4 = rasterize(line_art(drawing.svg), resolution)
        pictures.append(over(whole_HW4, background))
        sketches.append(class_map(whole_HW4[..., 3], lines_HW4[..., 3]))
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, pictures=np.stack(pictures), sketches=np.stack(sketches))


def _assemble(folder: Path, drawings: Sequence[Drawing], paths: list[Path], identity: dict) -> dict:
    kept = _distinct(drawings, paths)
    side = identity["resolution"]
    shapes = {PICTURES: (len(kept), side, side, 3), SKETCHES: (len(kept), side, side)}
    wanted = set(kept)
    row = 0
    with ExitStack() as files:
        arrays = {}
        for name, shape in shapes.items():
            partial = files.enter_context(replacing(folder / name))
            arrays[name] = np.lib.format.open_memmap(
                partial, mode="w+", dtype=np.uint8, shape=shape
            )
        for number, path in enumerate(paths):
            with np.load(path) as part:
                rows = [i for i in range(len(part["sketches"])) if number * PART + i in wanted]
                for name, array in arrays.items():
                    array[row : row + len(rows)] = part[Path(name).stem][rows]
            row += len(rows)
        for array in arrays.values():
            array.flush()
    captions = [_row(drawings[i]) for i in kept]
    _write(folder / CAPTIONS, captions)
    data = {
        **identity,
        "count": len(kept),
        "classes": list(CLASSES),
        "splits": {split: sum(row["split"] == split for row in captions) for split in SPLITS},
    }
    _write(folder / DATA, data)
    return data


def _distinct(drawings: Sequence[Drawing], paths: list[Path]) -> list[int]:
    """Numbers of the drawings to keep, in order."""
    best: dict[bytes, int] = {}
    for number, path in enumerate(paths):
        with np.load(path) as part:
            pictures = part["pictures"]
        for i, picture in enumerate(pictures, number * PART):
            key = hashlib.sha256(picture.tobytes()).digest()
            caption = drawings[i].words.caption
            if key not in best or len(caption) < len(drawings[best[key]].words.caption):
                best[key] = i
    return sorted(best.values())


def _row(drawing: Drawing) -> dict[str, Any]:
    return {
        "caption": drawing.words.caption,
        "tags": list(drawing.words.tags),
        "emoji": characters(drawing.name),
        "group": drawing.words.group,
        "name": drawing.name,
        "split": split_of(drawing.name),
    }


def _write(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
