"""Files that are there whole or not at all, whenever their writer is killed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = 2**16  # bytes: a disk with less is full


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The body writes to the path that it gets; in the end that file is on the disk, as `path`.

    If the body fails, what was there before stays, and nothing else does; OSError that names `path`
    where the disk is full, whatever the body made of that. A link is followed. What is no ordinary
    file, such as /dev/stdout, is written to as it is.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        yield path
        return
    partial = partial_of(path)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
    except BaseException as error:
        full = path.parent.is_dir() and shutil.disk_usage(path.parent).free < FULL
        partial.unlink(missing_ok=True)
        if full and isinstance(error, Exception):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """As `replacing`, in UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def make_writable(folder: Path) -> Path:
    """The folder itself, made if need be; ValueError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to: {error.strerror}") from None
    return folder


def partial_of(path: Path) -> Path:
    """Where `path` is written before it is there; who is killed leaves it, until the next time."""
    return path.with_name(f".{path.name}.partial")


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
