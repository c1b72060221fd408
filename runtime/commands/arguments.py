"""Command-line arguments that several subcommands share, and how their values are read."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuwa.spec.sampling import SAMPLING_NAMES

from ..backends.base import AUTO, BACKENDS

if TYPE_CHECKING:
    from ..client import Access

TOKEN_VARIABLE = "NUWA_TOKEN"


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


positive.__name__ = "whole number"  # argparse says "invalid whole number value: 'x'"


def add_engine(parser: argparse.ArgumentParser, *, slots: bool) -> None:
    """--threads, --backend, and --slots where several requests may run at a time."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        default=AUTO,
        help="what decodes (default: %(default)s, the fastest for this machine's processor)",
    )
    group.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads (default: one a core)"
    )
    if slots:
        group.add_argument(
            "--slots",
            type=positive,
            default=1,
            metavar="N",
            help="samples that are decoded at a time; others wait (default: %(default)s)",
        )


def engine(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of add_engine that load_engine takes, --slots aside."""
    return {"threads": arguments.threads, "backend": arguments.backend}


def add_access(parser: argparse.ArgumentParser) -> None:
    """--tls, --token-file and what belongs to them, for a server that wants them."""
    group = parser.add_argument_group("access to a server")
    group.add_argument("--tls", action="store_true", help="connect over TLS")
    for name, help in (
        ("tls-ca", "who signs the server's certificate, PEM (default: those the system trusts)"),
        ("tls-certificate", "own certificate, PEM, where the server asks for one"),
        ("tls-key", "its private key, PEM"),
        ("token-file", f"file with the token (default: the variable {TOKEN_VARIABLE})"),
    ):
        group.add_argument(f"--{name}", type=Path, metavar="FILE", help=help)


def check_place(arguments: argparse.Namespace) -> None:
    """ValueError for options of a server without one, or of an engine that a server has itself."""
    if arguments.server is None:
        names = ("tls", "tls_ca", "tls_certificate", "tls_key", "token_file")
        given, where = [name for name in names if getattr(arguments, name)], "--server"
    else:
        none = {"backend": AUTO, "threads": None}
        given = [name for name, value in none.items() if getattr(arguments, name) != value]
        where = "a bundle, and a server has its own"
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{options}: of {where}")


def access(arguments: argparse.Namespace) -> Access:
    """That of add_access."""
    from ..client import Access

    token = os.environ.get(TOKEN_VARIABLE) or None
    if arguments.token_file is not None:
        try:
            token = arguments.token_file.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError:
            raise ValueError(f"--token-file {arguments.token_file} is not text") from None
    certificates = (arguments.tls_ca, arguments.tls_certificate, arguments.tls_key)
    return Access(arguments.tls or any(certificates), *certificates, token)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn. Absent values are left to the model's defaults for the task."""
    group = parser.add_argument_group(
        "sampling", "defaults: those that the model has for the task; `nuwa inspect` shows them"
    )
    group.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="0 takes the likeliest token always; lower is safer, higher more varied",
    )
    group.add_argument(
        "--top-k", type=int, metavar="K", help="draw from the K likeliest tokens; 0: all"
    )
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the likeliest tokens that together have probability P; 1: all",
    )
    group.add_argument(
        "--guidance-scale",
        type=float,
        metavar="G",
        help="how strongly the text leads, about 1.5 to 4; 1: no guidance",
    )


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of add_sampling that were given."""
    values = {name: getattr(arguments, name) for name in SAMPLING_NAMES}
    return {name: value for name, value in values.items() if value is not None}
