"""`nuwa build-engines`: TensorRT engines of a bundle, kept in the bundle."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuwa.spec.engines import RUNTIMES, TENSORRT_RTX

if TYPE_CHECKING:
    from .engines import EngineOptions

NOT_GIVEN: dict[str, Any] = {"target": [], "slots": 1, "rows": None, "plugins": None}

EPILOG = """\
examples:
  nuwa build-engines bundles/sprites --target sm_89 --target sm_120
  nuwa build-engines bundles/sprites --runtime tensorrt --slots 8 --plugins
  nuwa build-engines bundles/sprites --runtime tensorrt --plugins /opt/libnuwa_plugins.so \\
      --timing-cache timing.bin

TensorRT builds for the GPU that it runs on. TensorRT-RTX builds for any that it knows, also on a
machine without one.
"""


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Build TensorRT engines of a bundle's graphs."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder made by `nuwa export`")
    parser.add_argument(
        "--runtime", choices=RUNTIMES, default=TENSORRT_RTX, help="which TensorRT (%(default)s)"
    )
    add_options(parser)
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="read and written")
    parser.add_argument(
        "--version-compatible",
        action="store_true",
        help="engines that later versions of the same major TensorRT can run",
    )
    return run


def given(arguments: argparse.Namespace) -> list[str]:
    """Which of those of `add_options` are not as they are when nobody gives them."""
    return [f"--{name}" for name, value in NOT_GIVEN.items() if getattr(arguments, name) != value]


def add_options(parser: argparse._ActionsContainer) -> None:
    """What `options` reads."""
    from .engines import ROWS

    parser.add_argument(
        "--target",
        action="append",
        default=NOT_GIVEN["target"],
        metavar="sm_NN",
        help="GPU architecture, may be repeated (default: this machine's GPU)",
    )
    parser.add_argument(
        "--slots",
        type=int,
        default=NOT_GIVEN["slots"],
        metavar="N",
        help="as of `nuwa serve` (%(default)s)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        metavar="T",
        help="upper ends of the ranges of rows that a step is tuned for "
        f"({' '.join(map(str, ROWS))})",
    )
    parser.add_argument(
        "--plugins",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="FILE",
        help="run 3DNA as a plugin, from this library or the installed one (default: as standard "
        "operators)",
    )


def options(arguments: argparse.Namespace, runtime: str, **more: Any) -> EngineOptions:
    """ValueError for what does not go together."""
    from .engines import ROWS, EngineOptions

    return EngineOptions(
        runtime=runtime,
        targets=tuple(dict.fromkeys(arguments.target)),
        slots=arguments.slots,
        rows=ROWS if arguments.rows is None else tuple(arguments.rows),
        plugins=_plugins(arguments.plugins),
        **more,
    )


def run(arguments: argparse.Namespace) -> int:
    """Builds with a progress bar on stderr; prints the folder and the files' sizes."""
    asked = options(
        arguments,
        arguments.runtime,
        timing_cache=arguments.timing_cache,
        version_compatible=arguments.version_compatible,
    )
    build(arguments.bundle, asked)
    return 0


def build(bundle: Path, asked: EngineOptions) -> None:
    """Builds with a progress bar on stderr; prints the folder and the files' sizes."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from .engines import build_engines

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading the bundle", total=None)

        def show(what: str, done: int, steps: int) -> None:
            bar.update(task, description=what, completed=done, total=steps)

        folder, record = build_engines(bundle, asked, show)
    for name in record.files:
        print(f"{(folder / name).stat().st_size / 1e6:9.2f} MB  {name}")
    print(folder)


def _plugins(given: Path | None) -> Path | None:
    if given is None or given != Path():
        return given
    from nuwa.plugins_trt import library

    return library()
