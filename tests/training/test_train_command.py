"""`nuwa train`: what it refuses before any work, and what its help says."""

import argparse
import dataclasses

import pytest
import torch

from nuwa.training import cli, parallel
from nuwa.training.commands import arguments
from nuwa.training.train_vqgan import VQGANOptions

RUNS = ("tokenizer", "sketch-tokenizer", "model", "ranker")


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    command = cli.command(parser)
    return command(parser.parse_args(list(map(str, words))))


def written_to(kind: str, folder, out) -> list:
    words = {
        "prune": ["--tokenizer", folder / "none"],
        "average": [folder / "none", folder / "neither"],
        "judge": [],
    }[kind]
    return [kind, *words, "--out", out]


@pytest.mark.parametrize("kind", ["prune", "average", "judge"])
def test_a_folder_that_holds_something_is_not_written_to(tmp_path, kind, monkeypatch):
    """Found first of all: not even the folders to read from are there."""
    monkeypatch.setattr("nuwa.training.train_judge.make_judge", None)
    out = tmp_path / "out"
    out.mkdir()
    (out / "judge.json").write_text("kept")
    for filled in (out, out / "judge.json"):
        with pytest.raises(ValueError, match=f"^{filled} is there and not empty; name another"):
            run(*written_to(kind, tmp_path, filled))
    assert [path.read_text() for path in out.iterdir()] == ["kept"]


@pytest.mark.parametrize("kind", ["prune", "average"])
def test_an_empty_folder_may_be_written_to(tmp_path, kind):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileNotFoundError, match="none"):
        run(*written_to(kind, tmp_path, tmp_path / "out"))


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize(
    "option", ["--steps", "--stop-after", "--checkpoint-every", "--sample-every", "--threads"]
)
@pytest.mark.parametrize("value", ["0", "-1", "some"])
def test_counts_are_at_least_one(tmp_path, capsys, kind, option, value):
    with pytest.raises(SystemExit):
        run(kind, "--run", tmp_path / "run", option, value)
    said = "invalid whole number value: 'some'" if value == "some" else f"{value} is not at least 1"
    assert f"argument {option}: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:0", "cuda:x", "meta", ""])
def test_a_device_that_is_not_there_is_found_before_a_run_is_begun(
    tmp_path, monkeypatch, kind, device
):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    words = ["--text", "none"] if kind == "ranker" else []
    with pytest.raises(ValueError, match=f"^device '{device}' is not one of this machine's: cpu$"):
        run(kind, *words, "--run", tmp_path / "run", "--device", device)
    assert not (tmp_path / "run").exists()


def test_devices_of_a_machine_with_two_gpus(monkeypatch):
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for device in ("cpu", "cuda", "cuda:0", "cuda:1"):
        parallel.check_device(device)
    with pytest.raises(ValueError, match="'cuda:2' is not .*: cpu, cuda, cuda:0, cuda:1$"):
        parallel.check_device("cuda:2")


@pytest.mark.parametrize("kind", RUNS)
def test_help_tells_what_the_options_do(monkeypatch, capsys, kind):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        run(kind, "--help")
    said = capsys.readouterr().out
    _, heading, options = said.partition("\noptions of the recipe:\n")
    assert heading and "docstring" not in said
    prose, _, flags = options.partition("\n\n  --")
    assert max(map(len, prose.splitlines())) <= 80
    assert flags and "\n\n  " in prose, "paragraphs stay apart"
    if kind.endswith("tokenizer"):
        assert "The codebook joins at `quantize_from`, the discriminator" in prose
        assert " ".join(prose.split()) == " ".join((VQGANOptions.__doc__ or "").split())


def test_a_switch_of_a_recipe_points_to_what_tells_of_it():
    @dataclasses.dataclass(frozen=True)
    class Options:
        """mirrored: whether pictures are turned."""

        mirrored: bool = False

    parser = argparse.ArgumentParser()
    arguments.add_options(parser, Options)
    said = parser.format_help()
    assert "options of the recipe:\n  mirrored: whether pictures are turned.\n" in said
    assert "--mirrored  see above\n" in said
    assert parser.parse_args(["--mirrored"]).mirrored


def test_no_example_writes_to_what_is_shipped():
    assert "checkpoints" not in cli.EPILOG.replace("/checkpoint", "").replace("CHECKPOINT", "")
