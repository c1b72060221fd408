"""A bundle with random weights: hardware can be measured without a checkpoint."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from nuwa.spec.config import preset
from nuwa.spec.tasks import Task
from nuwa.training.random_model import write_random_checkpoint

from .bundle import export_bundle


def random_bundle(name: str, out: Path, precision: str = "fp32") -> Path:
    """Exports the preset `name` into the folder `out`, for T2I and T2V.

    Without sketch tokenizer and visual encoder. ValueError for an unknown preset or precision, and
    if `out` exists.
    """
    model = dataclasses.replace(preset(name), sketch=None, visual=None, tasks=(Task.T2I, Task.T2V))
    with tempfile.TemporaryDirectory(prefix="nuwa-random-") as folder:
        checkpoint = Path(folder) / "checkpoint"
        write_random_checkpoint(checkpoint, model)
        export_bundle(checkpoint, out, precision=precision)
    return out
