"""Configs: round trip, refusals, presets."""

import json

import pytest

from nuwa.spec.config import PRESETS, DecoderConfig, ModelConfig, VQGANConfig, preset
from nuwa.spec.grid import FULL, Extent, Grid
from nuwa.spec.tasks import Task, parse_task


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name):
    assert ModelConfig.from_json(PRESETS[name].to_json()) == PRESETS[name]


def test_unknown_missing_and_broken_are_refused():
    data = json.loads(PRESETS["sprites"].to_json())
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\]"):
        ModelConfig.from_dict({**data, "colour": 1})
    with pytest.raises(ValueError, match=r"ModelConfig lacks \['name'\]"):
        ModelConfig.from_dict({key: data[key] for key in data if key != "name"})
    with pytest.raises(ValueError, match="not JSON"):
        ModelConfig.from_json("{")
    with pytest.raises(ValueError, match="not a JSON object"):
        ModelConfig.from_json("[1]")
    with pytest.raises(ValueError, match="choose one of sprites, base"):
        preset("large")


def test_values_are_checked():
    for heads in (3, 0, -2):
        with pytest.raises(ValueError, match=f"not a multiple of heads {heads}"):
            DecoderConfig(width=64, heads=heads)
    with pytest.raises(ValueError, match="'diagonal' is not one of"):
        DecoderConfig(shift="diagonal")
    with pytest.raises(ValueError, match="resolution 100 is not a multiple of 16"):
        VQGANConfig(resolution=100)
    with pytest.raises(ValueError, match="attention_resolutions has 16"):
        VQGANConfig(resolution=336, attention_resolutions=(16,))
    with pytest.raises(ValueError, match="8x8 tokens a frame, the tokenizer's 21x21"):
        ModelConfig(name="x", decoder=DecoderConfig(grid=Grid(10, 8, 8)))


def test_layers_share_columns_of_equal_extents():
    config = DecoderConfig(
        grid=Grid(2, 3, 3), width=8, heads=2, layers=4, extents=(FULL, Extent(3, 3, 3))
    )
    # `full` on a 2x3x3 grid is the window (3, 5, 5): 38 offsets at or before the query.
    assert [config.neighbour_columns(n) for n in range(4)] == [(0, 38), (38, 52)] * 2
    assert config.neighbour_count == 52


def test_tasks():
    assert parse_task("T2V") is Task.T2V
    with pytest.raises(ValueError, match="t2i, s2i, i2i, ti2i, t2v, s2v, v2v, tv2v"):
        parse_task("a2b")
    assert [t for t in Task if t.is_video] == [Task.T2V, Task.S2V, Task.V2V, Task.TV2V]
    assert [t for t in Task if t.needs_mask] == [Task.I2I, Task.TI2I, Task.TV2V]
