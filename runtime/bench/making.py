"""Makes what is measured where there is none yet: bundles of a checkpoint, of random weights, and
TensorRT engines.

In processes of their own: torch and the exporter are not part of the memory that is measured, and
runtime imports neither. `python -m nuwa.runtime.bench.making PRESET OUT PRECISION` is the one for
random weights.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nuwa import plugins_trt
from nuwa.spec.engines import TENSORRT
from nuwa.spec.manifest import MANIFEST

RANDOM = "nuwa.random_bundles"  # entry points: (preset, folder, precision) -> a bundle there
EXTRA = "needs `pip install 'nuwa-runtime[export]'`"


def random_bundle(preset: str, out: Path, precision: str) -> Path:
    """A bundle of that size in the folder `out`, in the place of an older one; ValueError says why
    not.
    """
    if (out / MANIFEST).is_file():
        shutil.rmtree(out)
    _run(["nuwa.runtime.bench.making", preset, str(out), precision], f"--preset {preset}")
    return out


def export(checkpoint: Path, out: Path, precision: str) -> Path:
    """As `nuwa export`, which replaces an older bundle in `out`."""
    words = ["export", str(checkpoint), str(out), "--precision", precision, "--overwrite"]
    _run(["nuwa.runtime", *words], f"exporting {checkpoint} in {precision}")
    return out


def with_engines(bundle: Path, out: Path, runtime: str, slots: int, rows: Sequence[int]) -> Path:
    """The bundle's files in the folder `out` as well, with engines for these ranges of rows.

    For TensorRT with the plugins, where they were built; the engines' record tells whether.
    """
    _link(bundle, out)
    words = ["build-engines", str(out), "--runtime", runtime, "--slots", str(slots)]
    if runtime == TENSORRT:
        words += _plugins()
    try:
        _run(["nuwa.runtime", *words, "--rows", *map(str, rows)], f"building engines of {bundle}")
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return out


def _plugins() -> list[str]:
    """What has engines built with the plugins; nothing where there are none."""
    try:
        return ["--plugins", str(plugins_trt.library())]
    except FileNotFoundError:
        return []


def _link(bundle: Path, out: Path) -> None:
    """By hard links, as a bundle with others is refused; copies on another disk."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path in bundle.iterdir():
        if path.is_file():
            try:
                os.link(path, out / path.name)
            except OSError:
                shutil.copyfile(path, out / path.name)


def _run(words: Sequence[str], what: str) -> None:
    made = subprocess.run(
        [sys.executable, "-m", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if made.returncode:
        said = made.stderr.strip().splitlines() or [f"exit status {made.returncode}"]
        problem = said[-1].partition("error: ")[2] or said[-1]
        raise ValueError(f"{what}: {problem}")


def main(preset: str, out: str, precision: str) -> int:
    """The process for random weights; what is wrong is told in one line."""
    found = list(importlib.metadata.entry_points(group=RANDOM))
    try:
        if not found:
            raise ValueError(EXTRA)
        found[0].load()(preset, Path(out), precision)
    except ModuleNotFoundError as error:
        return _fail(f"{EXTRA} ({error.name} is missing)")
    except (ValueError, OSError) as error:
        return _fail(str(error))
    return 0


def _fail(problem: str) -> int:
    print(f"error: {' '.join(problem.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
