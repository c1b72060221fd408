"""Hostile messages and files: a few of those that benchmarks/fuzz.py tries, and its own eyes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PATH.parent))
        spec = importlib.util.spec_from_file_location("fuzz", PATH)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "fuzz", module)  # for its dataclasses
        spec.loader.exec_module(module)
        yield module


def test_nothing_hostile_does_more_than_be_refused(fuzz, tiny_bundle):
    manifest = (tiny_bundle / "manifest.json").read_bytes()
    report, faults = fuzz.run(2500, 1, manifest)
    assert not faults
    outcomes = report["outcomes"]
    for name in ("image request", "clip request", "infer request"):
        assert min(outcomes[name][kind] for kind in ("FieldError", "read")) > 10
        assert outcomes[name]["gRPC INVALID_ARGUMENT"] > 3
    assert outcomes["file"]["MediaError"] > outcomes["file"]["read"] > 10
    assert outcomes["manifest"]["BundleError"] > 100
    assert json.dumps(report)


def test_a_reader_that_lets_an_error_through_is_found(fuzz, monkeypatch):
    decode_mask = fuzz.media.decode_mask

    def careless(data, limits):
        raise IndexError("out of range")

    monkeypatch.setattr(fuzz.media, "decode_mask", careless)
    monkeypatch.setattr(fuzz, "bombs", lambda: iter(()))
    with pytest.raises(IndexError):
        fuzz.run(10, 0, b"")  # even on what is valid
    seen = []

    def late(data, limits):
        seen.append(data)
        if len(seen) > 100:
            raise IndexError("out of range")
        return decode_mask(data, limits)

    monkeypatch.setattr(fuzz.media, "decode_mask", late)
    _, faults = fuzz.run(800, 0, b"")
    assert faults and "IndexError: out of range" in faults[0]


def test_cases_are_repeatable(fuzz):
    import numpy as np

    target = fuzz.targets(b"")[0]
    for make in (
        lambda draw: fuzz.mutated(draw, target.seeds),
        lambda draw: fuzz.swollen(draw, target.seeds),
        lambda draw: fuzz.restructured(draw, target.seeds, target.kind),
    ):
        first, again = (
            [make(np.random.default_rng((3, case))) for case in range(50)] for _ in range(2)
        )
        assert first == again and len(set(first)) > 30
