"""Philox4x32-10 against the known answers of Random123, and the uniforms made of it."""

import numpy as np
import pytest

from nuwa.spec.philox import philox4x32, uniforms

KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    assert philox4x32(np.array([counter], np.uint32), key)[0].tolist() == list(answer)


def test_a_position_keeps_its_number_in_any_company():
    every = uniforms(7, 3, np.arange(640))
    assert (uniforms(7, 3, np.array([5, 639, 0])) == every[[5, 639, 0]]).all()
    assert every.dtype == np.float32
    assert (every >= 0).all()
    assert (every < 1).all()


def test_seeds_and_samples_differ():
    positions = np.arange(1000)
    rows = [uniforms(s, k, positions) for s, k in [(0, 0), (1, 0), (0, 1), (2**63 - 1, 0)]]
    for a in range(4):
        assert abs(rows[a].mean() - 0.5) < 0.04
        for b in range(a):
            assert (rows[a] == rows[b]).mean() < 0.01


def test_ranges_are_checked():
    with pytest.raises(ValueError, match="seed -1"):
        uniforms(-1, 0, np.arange(2))
    with pytest.raises(ValueError, match="sample 4294967296"):
        uniforms(0, 2**32, np.arange(2))
