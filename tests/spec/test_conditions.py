"""Which texts a request's rows see."""

from __future__ import annotations

import pytest

from nuwa.spec.conditions import lane_texts


@pytest.mark.parametrize(
    ("prompt", "guidance", "texts"),
    [
        ("a 3", 1.0, ("a 3",)),
        (" a 3\n", 2.0, ("a 3", "none")),
        ("a 3", 0.5, ("a 3", "none")),
        ("a 3", 0.0, ("none",)),
        ("", 2.0, ("none",)),
        (" none ", 2.0, ("none",)),
        ("", 1.0, ("none",)),
    ],
)
def test_a_lane_for_each_text(prompt, guidance, texts):
    assert lane_texts(prompt, guidance) == texts
