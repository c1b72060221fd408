"""What hides a picture: the colour is exactly the median."""

import numpy as np
import pytest

from nuwa.spec.known import blank_hidden

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("highest", [1, 3, 256])
def test_the_plain_colour_is_the_median_of_what_is_known(count, highest):
    for _ in range(20):
        frames = RANDOM.integers(0, highest, (1, 3, 3, 3), dtype=np.uint8)
        known = np.zeros(9, bool)
        known[RANDOM.permutation(9)[:count]] = True
        known = known.reshape(1, 3, 3)
        median = np.median(frames[known], axis=0).astype(np.uint8)
        expected = np.where(known[..., None], frames, median)
        np.testing.assert_array_equal(blank_hidden(frames, known), expected)


def test_nothing_known_is_black():
    frames = np.full((2, 4, 4, 3), 9, np.uint8)
    assert not blank_hidden(frames, np.zeros((2, 2, 2), bool)).any()
