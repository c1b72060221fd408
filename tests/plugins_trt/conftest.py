"""Tests that are marked gpu are skipped for want of a GPU, and of nothing else if asked for."""

from __future__ import annotations

import pytest

from . import needs


def pytest_configure(config: pytest.Config) -> None:
    needs.required = needs.asks_for_gpu(config.getoption("markexpr"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not needs.gpus():
        pytest.skip("no NVIDIA GPU")
