"""Compares the graphs of a bundle, run by ONNX Runtime, with the PyTorch model they came from.

PyTorch runs the checkpoint as it is: fp32, nothing folded. Differences are relative to the largest
magnitude of what is compared. Beyond `LIMITS` an export is refused.

The decoder is run as serving runs it, each cache bound as input and output at once. Its tokens are
judged twice: against PyTorch's, and against PyTorch's sampler given the graph's own logits, where
rounding of the model no longer counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor

from nuwa.spec.manifest import (
    DECODER_STEP,
    IMAGE_DETOKENIZER,
    IMAGE_TOKENIZER,
    TEXT_ENCODER,
    decoder_step_inputs,
    graph_file,
    layer_names,
    text_encoder_outputs,
)
from nuwa.spec.plan import cache_entries
from nuwa.training.checkpoint import Checkpoint
from nuwa.training.decode import DecoderStep, TextConditions
from nuwa.training.sampling import sample
from nuwa.training.vqgan import to_bytes, to_signed

from .cases import SEQUENCES, Feeds, RealSteps, pictures, random_steps, text_ids

_COMPARED_CALLS = 12  # of real decoding, evenly spread over it
_SAMPLING_INPUTS = ("temperature", "top_k", "top_p", "uniform", "ranks")


class ExportError(Exception):
    """A graph's numbers disagree with PyTorch's; the message says which, by how much."""


# Largest figures an export may have, by precision. relative: difference over largest magnitude;
# *_mismatches: share of differing elements; pixels: levels of 255.
LIMITS: dict[str, dict[str, float]] = {
    "fp32": {
        "relative": 1e-4,
        "sampler_mismatches": 0.01,
        "token_mismatches": 0.01,
        "code_mismatches": 0.01,
        "pixels_max": 2,
        "pixels_mean": 0.02,
    },
    # Token mismatches are what fp16 costs: a draw near the edge between two tokens goes the other
    # way. It is recorded, and bounded only loosely.
    "fp16": {
        "relative": 2e-2,
        "sampler_mismatches": 0.01,
        "token_mismatches": 0.2,
        "code_mismatches": 0.1,
        "pixels_max": 32,
        "pixels_mean": 1.0,
    },
}


@dataclass
class Figures:
    """Parity figures of one graph, gathered case by case."""

    maxima: dict[str, float] = field(default_factory=dict)
    shares: dict[str, tuple[int, int]] = field(default_factory=dict)  # differing, of how many

    def differ(self, name: str, got: npt.NDArray, wanted: npt.NDArray) -> None:
        """Records the largest absolute and relative difference of two real tensors."""
        assert got.shape == wanted.shape, f"{name} has shape {got.shape}, PyTorch's {wanted.shape}"
        absolute = float(np.abs(got.astype(np.float64) - wanted).max(initial=0.0))
        absolute = absolute if np.isfinite(got).all() else float("inf")
        scale = float(np.abs(wanted).max(initial=0.0))
        self._raise_to(f"{name}_absolute", absolute)
        self._raise_to(f"{name}_relative", absolute / scale if scale else absolute)

    def differ_pixels(self, got: npt.NDArray[np.uint8], wanted: npt.NDArray[np.uint8]) -> None:
        """Records the largest and the mean difference of pictures, in levels of 255."""
        difference = np.abs(got.astype(int) - wanted)
        self._raise_to("pixels_max", float(difference.max()))
        self._raise_to("pixels_mean", float(difference.mean()))

    def mismatch(self, name: str, got: npt.NDArray, wanted: npt.NDArray) -> None:
        """Counts differing elements of two integer tensors."""
        differing, total = self.shares.get(name, (0, 0))
        self.shares[name] = (differing + int((got != wanted).sum()), total + got.size)

    def _raise_to(self, name: str, value: float) -> None:
        self.maxima[name] = max(self.maxima.get(name, 0.0), value)

    def check(self, graph: str, precision: str) -> dict[str, Any]:
        """The figures as JSON-able data; ExportError if one is beyond its limit."""
        limits = LIMITS[precision]
        values = dict(self.maxima)
        values |= {name: differing / total for name, (differing, total) in self.shares.items()}
        for name, value in values.items():
            limit = limits["relative"] if name.endswith("_relative") else limits.get(name)
            if limit is not None and not value <= limit:
                raise ExportError(
                    f"{graph}.onnx disagrees with PyTorch: {name} is {value:.3g}, the limit for "
                    f"{precision} is {limit:g}"
                )
        counts = {f"{name}_of": total for name, (_, total) in self.shares.items()}
        return {**{name: float(f"{value:.3g}") for name, value in values.items()}, **counts}


def verify(
    checkpoint: Checkpoint,
    folder: Path,
    precision: str,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Parity figures of the four graphs in `folder`; ExportError if any is beyond its limit."""
    figures = {}
    for name, check in VERIFIERS.items():
        if progress is not None:
            progress(name)
        figures[name] = verify_graph(checkpoint, folder / graph_file(name), name, precision)
    figures["versions"] = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    return figures
