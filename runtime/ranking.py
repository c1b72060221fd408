"""Rankers: what scores a sample against its prompt, by the names that requests give in rank_by.

A bundle may bring one as a graph; other packages add theirs through the entry point group
`nuwa.rankers`. All are loaded when first used. Knows no requests; selection.py picks the best.
"""

from __future__ import annotations

import importlib.metadata
import threading
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from nuwa.spec.manifest import RANKER, Manifest

from .core import Pixels

if TYPE_CHECKING:
    import onnxruntime as ort

    from .bundle import Bundle

GROUP = "nuwa.rankers"


class Ranker(Protocol):
    """Called by several threads. Must not change `frames`."""

    def __call__(self, prompt: str, frames: Pixels) -> float:
        """How well frames u8 [F, H, W, 3] (F = 1 for an image) show the prompt; higher is better.

        Only scores of one prompt are compared with each other.
        """
        ...


def ranker_names(manifest: Manifest) -> tuple[str, ...]:
    """Those of the bundle, then those of other packages; loads none."""
    return tuple(dict.fromkeys([*manifest.rankers, *_entry_points()]))


def find_rankers(bundle: Bundle) -> dict[str, Ranker]:
    """By name, in the order of `ranker_names`. A bundle's ranker hides a package's of its name."""
    own: dict[str, Ranker] = {name: BundleRanker(bundle) for name in bundle.manifest.rankers}
    others = {name: PackageRanker(entry) for name, entry in _entry_points().items()}
    return own | {name: ranker for name, ranker in others.items() if name not in own}


class BundleRanker:
    """The graph `ranker` of a bundle, on ONNX Runtime's CPU provider, whatever the backend."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        # One score at a time on one thread, so that most cores stay with the decode thread.
        self._lock = threading.Lock()

    def __call__(self, prompt: str, frames: Pixels) -> float:
        tokens = self._bundle.text_tokenizer.encode(prompt)
        with self._lock:
            score = self._session.run(["score"], {"tokens": tokens, "frames": frames})[0]
        return float(score)

    @cached_property
    def _session(self) -> ort.InferenceSession:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3  # errors
        path = self._bundle.graph(RANKER)
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class PackageRanker:
    """A ranker that another package brings, imported at the first score."""

    def __init__(self, entry: importlib.metadata.EntryPoint) -> None:
        self._entry = entry

    def __call__(self, prompt: str, frames: Pixels) -> float:
        return self._entry.load()(prompt, frames)


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {each.name: each for each in importlib.metadata.entry_points(group=GROUP)}
