"""What hides a picture: the colour is exactly the median, and edges tell where a mask cuts."""

import numpy as np
import pytest

from nuwa.spec.known import blank_hidden, hidden_edges

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


def test_edges_tell_where_a_mask_cuts_through_patches():
    mask = np.zeros((24, 24), bool)
    mask[3:18, 8:21] = True
    top, bottom, right = 64, 16, 1
    expected = [
        [0, 2 * top, 2 * top + 2 * right],  # 3 of 8 rows visible: level 2; 3 of 8 columns too
        [0, 0, 2 * right],
        [0, 3 * bottom, 3 * bottom + 2 * right],  # 6 of 8 rows
    ]
    np.testing.assert_array_equal(hidden_edges(mask, 3, 3, 4), expected)
    assert not hidden_edges(mask, 3, 3, 1).any()
    assert not hidden_edges(np.zeros((24, 24), bool), 3, 3, 4).any()
    assert not hidden_edges(np.ones((24, 24), bool), 3, 3, 4).any()


@pytest.mark.parametrize("levels", [2, 4, 8])
def test_every_edge_goes_through_all_levels(levels):
    seen = set()
    for visible in range(8):
        mask = np.zeros((8, 8), bool)
        mask[visible:, :] = True
        number = int(hidden_edges(mask, 1, 1, levels)[0, 0])
        turned = [np.flip(mask, 0), mask.T, np.flip(mask.T, 1)]
        digits = [int(hidden_edges(each, 1, 1, levels)[0, 0]) for each in turned]
        assert number % levels**3 == 0
        powers = zip(digits, (2, 1, 0), strict=True)
        assert {digit // levels**power for digit, power in powers} == {number // levels**3}
        seen.add(number // levels**3)
    assert seen == set(range(levels))
