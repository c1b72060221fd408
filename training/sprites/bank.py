"""The glyph banks: alpha tiles by class and split.

Knows which glyph belongs to which split (by the hash of its content, so that equal glyphs never
straddle two splits); knows nothing of colours, motions or frames.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np

TILE = 24
DIGITS = tuple("0123456789")
ANIMALS = (
    *("bear", "bird", "cat", "cow", "dog"),
    *("elephant", "giraffe", "horse", "sheep", "zebra"),
)
GLYPH_SPLITS = ("train", "val", "test")


def _glyph_split(glyph_TT: np.ndarray) -> str:
    tenth = int.from_bytes(hashlib.sha256(glyph_TT.tobytes()).digest()[:8], "big") % 10
    return "train" if tenth < 8 else "val" if tenth == 8 else "test"


@functools.cache
def load_bank(name: str) -> dict[str, tuple[np.ndarray, ...]]:
    """{split: ten arrays u8[n,TILE,TILE], one a class} of the bank "digits" or "animals".

    Read once a process; the arrays are read-only, their order is that of the file.
    """
    with np.load(Path(__file__).parent / "glyphs" / f"{name}.npz", allow_pickle=False) as file:
        glyphs, labels = file["glyphs"], file["labels"]
    splits = np.array([GLYPH_SPLITS.index(_glyph_split(glyph)) for glyph in glyphs])
    bank = {
        split: tuple(glyphs[(splits == s) & (labels == label)] for label in range(10))
        for s, split in enumerate(GLYPH_SPLITS)
    }
    for group in bank.values():
        for array in group:
            array.flags.writeable = False
    return bank
