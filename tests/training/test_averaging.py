"""The weight average: short at first, then of the asked length; frozen weights are copied."""

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nuwa.training import cli
from nuwa.training.averaging import WeightAverage, weighted_mean
from nuwa.training.checkpoint import load_checkpoint, save_tokenizer
from nuwa.training.vqgan import VQGAN

from ..conftest import make_tiny_checkpoint


def test_average_forgets_the_start_and_copies_what_is_frozen():
    source = torch.nn.BatchNorm1d(2)
    source.bias.requires_grad_(False)
    average = WeightAverage(source, 0.99)
    with torch.no_grad():
        source.weight.fill_(5.0)
        source.bias.fill_(7.0)
        source.running_mean.fill_(3.0)
    for step in range(30):
        average.update(step)
    assert average.model.weight.tolist() == pytest.approx([5.0, 5.0], abs=0.01)
    assert average.model.bias.tolist() == [7.0, 7.0]
    assert average.model.running_mean.tolist() == [3.0, 3.0]


def test_late_steps_weigh_one_minus_decay():
    source = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(source, 0.9)
    before = average.model.weight.item()
    torch.nn.init.constant_(source.weight, before + 1.0)
    average.update(10**6)
    assert average.model.weight.item() == pytest.approx(before + 0.1, abs=1e-6)
    with pytest.raises(ValueError, match="decay 1.0"):
        WeightAverage(source, 1.0)


def test_a_mean_of_states():
    states = [{"a": torch.tensor([1.0, 3.0]), "n": torch.tensor(5)} for _ in range(2)]
    states[1]["a"] = torch.tensor([5.0, -1.0])
    mean = weighted_mean(states, [3.0, 1.0])
    assert mean["a"].tolist() == [2.0, 2.0] and mean["n"].item() == 5
    assert states[0]["a"].tolist() == [1.0, 3.0]


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    command = cli.command(parser)
    return command(parser.parse_args(["average", *map(str, words)]))


def test_models_of_two_runs_are_averaged(tmp_path):
    first, second, out = (tmp_path / name for name in ("first", "second", "out"))
    make_tiny_checkpoint(first)
    made = load_checkpoint(first)
    make_tiny_checkpoint(second)
    weights = load_file(first / "nuwa.safetensors")
    save_file(
        {k: (v.float() + 1.0).half() for k, v in weights.items()}, second / "nuwa.safetensors"
    )
    assert run(first, second, "--shares", 3, 1, "--out", out) == 0
    mean = load_checkpoint(out)
    for name, value in made.nuwa.state_dict().items():
        assert torch.allclose(mean.nuwa.state_dict()[name], value + 0.25, atol=2e-3), name
    said = json.loads((out / "training.json").read_text())
    assert [each["share"] for each in said["of"]] == [3.0, 1.0]
    assert mean.config == made.config and mean.sampling == made.sampling


def test_what_cannot_be_averaged_is_refused(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    make_tiny_checkpoint(first)
    make_tiny_checkpoint(second)
    out = ("--out", tmp_path / "out")
    for words, message in (
        ((first,), "1 checkpoints and 1 shares"),
        ((first, second, "--shares", 1), "2 checkpoints and 1 shares"),
        ((first, second, "--shares", 1, 0), "share 0.0 is not above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*words, *out)
    torch.manual_seed(7)
    save_tokenizer(VQGAN(load_checkpoint(second).config.image), second)
    with pytest.raises(ValueError, match="second has another VQ-GAN of pictures than .*first"):
        run(first, second, *out)
    assert not (tmp_path / "out").exists()
