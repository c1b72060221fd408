"""What training finds again in files: JSON objects, and arrays that took long to make.

Knows neither models nor data sets, and imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nuwa.spec.files import replacing, write_text

if TYPE_CHECKING:
    from torch import nn


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError that names the file if it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of UTF-8
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def write_object(path: Path, content: dict[str, Any]) -> None:
    """As `read_object` reads it; atomic."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def stored(path: Path, identity: dict[str, Any], make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in the .npy file `path` if it is of this identity, else that of `make`, kept there.

    A .json beside it says what it is of.
    """
    label = path.with_suffix(".json")
    if not (path.exists() and _is_of(label, identity)):
        array = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        label.unlink(missing_ok=True)
        # Whoever maps the old file keeps it.
        with replacing(path) as partial, partial.open("wb") as file:
            np.save(file, array)
        write_object(label, identity)
    return np.load(path, mmap_mode="r")


def _is_of(label: Path, identity: dict[str, Any]) -> bool:
    try:
        return read_object(label) == identity
    except (FileNotFoundError, ValueError):  # made anew, whatever it was
        return False


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the weights, in fp32."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
