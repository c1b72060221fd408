"""Parity figures: how far two results are apart, and how far they may be.

Differences of real tensors are relative to the largest magnitude of what is compared. Knows neither
models nor runtimes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nuwa.spec.manifest import DECODER_STEP


class ExportError(ValueError):
    """A graph's numbers disagree with PyTorch's; the message says which, by how much."""


# Largest figures an export may have, by precision. relative: difference over largest magnitude;
# draw_error: see draws.py; pixels: levels of 255; overwritten_entries: share of a cache;
# score_error: of a cosine similarity, by a ranker, which is fp32 in any bundle. Tokens and
# codes that differ have no limit: where two are equally near, rounding decides; logits, draw_error
# and features (verify.implied_error) do have one.
LIMITS: dict[str, dict[str, float]] = {
    "fp32": {
        "relative": 1e-4,
        "draw_error": 1e-4,
        "overwritten_entries": 0,
        "pixels_max": 2,
        "pixels_mean": 0.02,
        "score_error": 1e-4,
    },
    "fp16": {
        "relative": 2e-2,
        "draw_error": 1e-4,
        "overwritten_entries": 0,
        "pixels_max": 8,
        "pixels_mean": 0.25,
        "score_error": 1e-4,
    },
}
# Of bf16 the weights alone are rounded here (widen of spec/onnx_file.py); they have 8 bits, where
# fp16 has 11.
LIMITS["bf16"] = LIMITS["fp16"] | {"relative": 5e-2}
# int8 and fp8 are what the decoder's matrices are stored as; all else of such bundles is fp32 or
# bf16.
LIMITS["int8"], LIMITS["fp8"] = LIMITS["fp32"], LIMITS["bf16"]
# quantized_error: from the same bytes in PyTorch, see verify.py. An int8 has 8 bits, an fp8 has 4.
QUANTIZED_STEP = {
    "int8": LIMITS["fp32"] | {"relative": 0.2, "quantized_error": 1e-4},
    "fp8": LIMITS["fp32"] | {"relative": 0.5, "quantized_error": 1e-4},
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
        scale = float(np.abs(wanted).max(initial=0.0))
        self._raise_to(f"{name}_absolute", absolute)
        self._raise_to(f"{name}_relative", absolute / scale if scale else absolute)

    def differ_pixels(self, got: npt.NDArray[np.uint8], wanted: npt.NDArray[np.uint8]) -> None:
        """Records the largest and the mean difference of pictures, in levels of 255."""
        difference = np.abs(got.astype(int) - wanted)
        self._raise_to("pixels_max", float(difference.max()))
        self._raise_to("pixels_mean", float(difference.mean()))

    def exceed(self, name: str, value: float) -> None:
        """Records the largest value of a figure that is a difference already."""
        self._raise_to(name, value)

    def mismatch(self, name: str, got: npt.NDArray, wanted: npt.NDArray) -> None:
        """Counts differing elements of two integer tensors."""
        differing, total = self.shares.get(name, (0, 0))
        self.shares[name] = (differing + int((got != wanted).sum()), total + got.size)

    def _raise_to(self, name: str, value: float) -> None:
        value = value if math.isfinite(value) else math.inf  # as NaN is larger than nothing
        self.maxima[name] = max(self.maxima.get(name, 0.0), value)

    def check(self, graph: str, precision: str) -> dict[str, Any]:
        """The figures as JSON-able data; ExportError if one is beyond its limit."""
        stepped = QUANTIZED_STEP if graph == DECODER_STEP else {}
        limits = stepped.get(precision, LIMITS[precision])
        shares = {name: count / max(total, 1) for name, (count, total) in self.shares.items()}
        for name, value in (self.maxima | shares).items():
            limit = limits["relative"] if name.endswith("_relative") else limits.get(name)
            if limit is not None and not value <= limit:
                raise ExportError(
                    f"{graph}.onnx disagrees with PyTorch: {name} is {value:.3g}, the limit for "
                    f"{precision} is {limit:g}"
                )
        figures = {name: float(f"{value:.3g}") for name, value in self.maxima.items()}
        for name, (count, total) in self.shares.items():
            figures |= {name: count, f"{name}_of": total}
        return figures
