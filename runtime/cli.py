"""The `nuwa` command: finds a subcommand, runs it, and tells errors in one line.

serve, generate, inspect, evaluate and bench live in commands/; train and export come from the entry
point group `nuwa.commands`, so that runtime imports neither. A subcommand is loaded only when
chosen: to serve needs no torch, and help should not wait for it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Callable, Sequence

from .client import ClientError
from .core import CancelledError, QueueFullError, UnsupportedTaskError
from .errors import ShuttingDownError, UnavailableError

GROUP = "nuwa.commands"
BUILT_IN = {
    "generate": "make one image or clip with a bundle or a server",
    "serve": "answer requests over gRPC with a bundle",
    "inspect": "show what a bundle holds",
    "evaluate": "score a bundle on a data set",
    "bench": "measure how fast a bundle or a server is",
}
# What is said of the commands of other folders without loading them.
KNOWN = {
    "data": "make a data set to train on",
    "train": "train a model",
    "export": "turn a checkpoint into a bundle",
    "build-engines": "build TensorRT engines of a bundle",
}
EXTRAS = {"data": "openmoji", "train": "train", "export": "export", "build-engines": "export"}

Run = Callable[[argparse.Namespace], int]
Command = Callable[[argparse.ArgumentParser], Run]

# What a user can cause and read a sentence about; anything else keeps its traceback.
USER_ERRORS = (
    ValueError,
    OSError,
    ClientError,
    UnsupportedTaskError,
    QueueFullError,
    CancelledError,
    ShuttingDownError,
    UnavailableError,
    FloatingPointError,  # a loss that is not finite
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `nuwa ARGV...`; the exit status: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"nuwa-runtime {importlib.metadata.version('nuwa-runtime')}")
        return 0
    name, debug = words[0], "--debug" in words[1:]
    try:
        return _run(name, words[1:])
    except SystemExit as end:  # argparse has printed what was wrong
        return end.code if isinstance(end.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output left, as `head` does. Keep Python from flushing into the void.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        if debug:
            raise
        return _fail(name, _missing(name, error))
    except USER_ERRORS as error:
        if debug:
            raise
        return _fail(name, _sentence(error))


def overview() -> str:
    """`nuwa --help`."""
    entries = BUILT_IN | {name: KNOWN.get(name, "") for name in _external()}
    lines = [f"  {name:<13} {summary}".rstrip() for name, summary in entries.items()]
    return "\n".join(
        [
            "usage: nuwa COMMAND ...",
            "",
            "Train NÜWA models, export them, and generate images and clips with them.",
            "",
            *lines,
            "",
            "`nuwa COMMAND --help` explains a command and shows examples; `nuwa --version`.",
        ]
    )


def _run(name: str, words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"nuwa {name}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    run = _load(name)(parser)
    args = parser.parse_args(words)
    args.words = words
    logging.basicConfig(
        level=logging.DEBUG if args.debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    return run(args)


def _load(name: str) -> Command:
    if name in BUILT_IN:
        return importlib.import_module(f".commands.{name}", __package__).command
    external = _external()
    if name not in external:
        choices = ", ".join([*BUILT_IN, *external])
        raise ValueError(f"there is no such command; choose one of {choices}")
    return external[name].load()


def _external() -> dict[str, importlib.metadata.EntryPoint]:
    return {each.name: each for each in importlib.metadata.entry_points(group=GROUP)}


def _missing(name: str, error: ModuleNotFoundError) -> str:
    module = error.name or str(error)
    if module.split(".")[0] == "nuwa":
        return f"{module} is missing from this installation; install nuwa-runtime again"
    extra = f"[{EXTRAS[name]}]" if name in EXTRAS else ""
    return f"needs {module}; install it with: pip install 'nuwa-runtime{extra}'"


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _fail(name: str, message: str) -> int:
    print(f"nuwa {name}: error: {message}", file=sys.stderr)
    return 2
