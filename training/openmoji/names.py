"""What an OpenMoji file name says: the emoji, which drawings to leave out, and the split.

A name is the emoji's code points in hexadecimal, as in 1F469-200D-1F33E, a woman farmer. Knows
strings only: no file, no drawing, no table of captions.
"""

from __future__ import annotations

import hashlib

SPLITS = ("train", "val", "test")
SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
TAGS = range(0xE0020, 0xE0080)  # of flags of regions: England, Scotland, ...
_JOINER, _VARIATION = 0x200D, 0xFE0F
# What drawings of one family differ by: person, man or woman, and which way they face.
_VARIANTS = frozenset((0x1F468, 0x1F469, 0x1F9D1, 0x2640, 0x2642, 0x27A1, _JOINER, _VARIATION))


def code_points(name: str) -> tuple[int, ...]:
    """ValueError if the name is not hexadecimal numbers joined by hyphens."""
    try:
        return tuple(int(word, 16) for word in name.split("-"))
    except ValueError:
        raise ValueError(f"drawing {name!r} is not named by code points such as 1F600") from None


def characters(name: str) -> str:
    """The emoji itself."""
    return "".join(map(chr, code_points(name)))


def has_skin_tone(name: str) -> bool:
    """Whether it is one of the five tones of a drawing that also has its neutral yellow."""
    return any(point in SKIN_TONES for point in code_points(name))


def is_region(name: str) -> bool:
    """Whether it is the flag of a country or region: their line art is one and the same frame."""
    points = code_points(name)
    letters = sum(point in REGIONAL_INDICATORS for point in points)
    return letters == 2 or any(point in TAGS for point in points)


def split_of(name: str) -> str:
    """One of SPLITS, by the hash of the family: farmer, woman farmer and man farmer share one.

    Eight families of ten are for training. The split does not depend on resolution or version.
    """
    points = code_points(name)
    family = [point for point in points if point not in _VARIANTS] or points
    digest = hashlib.sha256("-".join(f"{point:X}" for point in family).encode()).digest()
    tenth = int.from_bytes(digest[:8], "big") % 10
    return "train" if tenth < 8 else "val" if tenth == 8 else "test"


def plain_caption(words: str, name: str) -> str:
    """A caption from a name as tables write it, such as ":woman_farmer:" or "flag: Germany"."""
    text = words.strip(":").replace("_", " ").replace("’", "'").removeprefix("flag: ").strip()
    return f"flag of {text}" if is_region(name) else text
