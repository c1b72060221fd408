"""`nuwa export`: a checkpoint folder becomes a bundle folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nuwa.spec.engines import RUNTIMES, TENSORRT
from nuwa.spec.manifest import PRECISIONS, Manifest

from . import engines_cli

EPILOG = """\
examples:
  nuwa export runs/model/checkpoint bundles/sprites
  nuwa export runs/model/checkpoint bundles/sprites-fp16 --precision fp16
  nuwa export runs/model/checkpoint bundles/sprites --overwrite
  nuwa export runs/model/checkpoint bundles/sprites-bf16 --precision bf16 --tensorrt --plugins
  nuwa export runs/model/checkpoint bundles/sprites-fp16 --precision fp16 --tensorrt tensorrt-rtx \\
      --target sm_89

Every graph is run on ONNX Runtime and compared with PyTorch; a bundle whose numbers disagree is not
written.
"""


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Export a checkpoint to an ONNX bundle."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="bundle folder to write")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="storage type of weights and caches (%(default)s); bf16, for GPUs and processors with "
        "AMX, leaves the tokenizers fp16; int8, for processors, and fp8, for TensorRT and else as "
        "bf16, are of the decoder's weights only",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it is a bundle already"
    )
    parser.add_argument(
        "--tensorrt",
        nargs="?",
        choices=RUNTIMES,
        const=TENSORRT,
        metavar="RUNTIME",
        help=f"then build engines of it, with {' or '.join(RUNTIMES)} (%(const)s); more options "
        "has `nuwa build-engines`",
    )
    engines_cli.add_options(parser.add_argument_group("with --tensorrt"))
    return run


def run(arguments: argparse.Namespace) -> int:
    """Exports with a progress bar on stderr; prints parity figures and sizes; 0 when done."""
    from rich.console import Console

    errors = Console(stderr=True)
    if not arguments.checkpoint.is_dir():
        raise ValueError(f"{arguments.checkpoint} is not a checkpoint folder")
    options = None
    if arguments.tensorrt is not None:  # what cannot be built is told before anything is written
        from .engines import check

        options = engines_cli.options(arguments, arguments.tensorrt)
        check(options, arguments.precision)
    elif given := engines_cli.given(arguments):
        raise ValueError(f"{', '.join(given)}: of engines, so give --tensorrt, too")
    manifest = _export(arguments, errors)
    report(manifest, arguments.out, Console())
    if options is not None:
        engines_cli.build(arguments.out, options)
    return 0


def _export(arguments: argparse.Namespace, console: Any) -> Manifest:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from .bundle import export_bundle

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading the checkpoint", total=None)

        def show(what: str, done: int, steps: int) -> None:
            bar.update(task, description=what, completed=done, total=steps)

        return export_bundle(
            arguments.checkpoint,
            arguments.out,
            precision=arguments.precision,
            overwrite=arguments.overwrite,
            progress=show,
        )


def report(manifest: Manifest, folder: Path, console: Any) -> None:
    """Prints what was written: file sizes, and how far each graph is from PyTorch."""
    from rich.table import Table

    table = Table("file", "MB", "difference from PyTorch")
    table.columns[1].justify = "right"
    for name in sorted(manifest.files):
        parity = manifest.parity.get(Path(name).stem, {}) if name.endswith(".onnx") else {}
        size = (folder / name).stat().st_size / 1e6
        table.add_row(name, f"{size:.2f}", figures_text(parity))
    console.print(table)
    console.print(
        f"{folder}: {manifest.name}, {manifest.parameter_count / 1e6:.2f} M parameters, "
        f"{manifest.precision}, licence of the weights: {manifest.licence}",
        soft_wrap=True,
        highlight=False,
    )


def figures_text(parity: dict[str, Any]) -> str:
    """Parity figures of one graph as one line per figure."""
    lines = []
    for name, value in parity.items():
        if name.endswith("_of") or name.endswith("_absolute"):
            continue
        words = name.replace("_", " ")
        total = parity.get(f"{name}_of")
        if total is not None:
            lines.append(f"{words}: {value} of {total}")
        else:
            lines.append(f"{words}: {value:.2g}")
    return "\n".join(lines)
