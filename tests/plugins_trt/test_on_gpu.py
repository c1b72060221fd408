"""Plugins on a GPU: what `enqueue` computes on device memory, against the reference."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest

from .calls import SIZES, TOLERANCES, Sizes, drawn, errors, exact, read, stored
from .native_attention import STORAGES, NativeAttention
from .plugin_harness import ROOT, Harness, built_library

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def harness():
    return Harness(built_library("80-real;86-real;87-real;89-real;90-real;100-real;120"))


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return NativeAttention(tmp_path_factory.mktemp("attention"))


MANY = (
    *SIZES,
    Sizes(98, 1, 800, 27, 20, 64),
    Sizes(700, 3, 900, 27, 4, 32, bias=True),  # more rows than are fused by themselves
)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("sizes", MANY)
def test_attention(harness, native, sizes, storage):
    kept, meant = stored(native, drawn(sizes, writes=False), storage)
    (out,) = harness.enqueue("NearbyAttention", storage, sizes, kept)
    (wanted,) = exact(meant, sizes.heads)
    error = np.abs(read(out, storage) - wanted).max()
    assert error <= TOLERANCES[storage] * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("sizes", MANY)
@pytest.mark.parametrize(("tactic", "in_place"), [(0, True), (1, True), (2, True), (0, False)])
def test_cached_attention(harness, native, sizes, storage, tactic, in_place):
    kept, meant = stored(native, drawn(sizes, seed=1), storage)
    how = {"tactic": tactic, "in_place": in_place}
    out, *made = harness.enqueue("CachedNearbyAttention", storage, sizes, kept, **how)
    wanted, *caches = exact(meant, sizes.heads)
    error = np.abs(read(out, storage) - wanted).max()
    assert error <= TOLERANCES[storage] * max(1.0, np.abs(wanted).max())
    for cache, expected in zip(made, caches, strict=True):
        assert (read(cache, storage) == expected).all()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", ["NearbyAttention", "CachedNearbyAttention"])
def test_errors_are_at_most_twice_those_of_plain_pytorch(harness, native, name, sizes, storage):
    pytest.importorskip("torch")
    ours = plain = 0.0
    for seed in range(5):
        tensors = drawn(sizes, seed, writes=name == "CachedNearbyAttention")
        kept, meant = stored(native, tensors, storage)
        out, *_ = harness.enqueue(name, storage, sizes, kept)
        own, theirs = errors(out, meant, storage, sizes.heads)
        ours, plain = max(ours, own), max(plain, theirs)
    assert ours <= 2 * plain


@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_does_not_depend_on_the_others_nor_on_the_tactic(harness, native, storage):
    sizes = Sizes(40, 3, 90, 27, 4, 64, bias=True)
    kept, _ = stored(native, drawn(sizes, seed=2), storage)
    name = "CachedNearbyAttention"
    outs = [harness.enqueue(name, storage, sizes, kept, tactic=tactic)[0] for tactic in (1, 2)]
    assert (outs[0] == outs[1]).all()
    _, key, value = harness.enqueue(name, storage, sizes, kept)
    later = kept | {"key": key, "value": value}
    for row in (0, 17, 39):
        own = later | {each: later[each][row : row + 1] for each in ("query", "slot", "neighbours")}
        one = Sizes(1, 3, 90, 27, 4, 64, bias=True)
        (alone,) = harness.enqueue("NearbyAttention", storage, one, own)
        assert (alone[0] == outs[0][row]).all()


@pytest.mark.parametrize("tool", ["memcheck", "initcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(harness, tool):
    """In the tests above; the harness is built before, so that only they are watched."""
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("no compute-sanitizer on PATH")
    watch = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    tests = [__file__, "-m", "gpu", "-k", "test_attention or test_cached_attention", "-q"]
    command = [*watch, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
