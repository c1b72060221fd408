"""Training runs: killed and resumed they repeat an unbroken run; bad settings are refused."""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from nuwa.spec.config import DecoderConfig, ModelConfig, TextConfig, VisualConfig
from nuwa.spec.grid import Extent, Grid
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task
from nuwa.training import cli
from nuwa.training.checkpoint import (
    IMAGE_TOKENIZER,
    SKETCH_TOKENIZER,
    load_checkpoint,
    load_tokenizer,
    load_tokenizer_of,
    save_checkpoint,
    save_tokenizer,
)
from nuwa.training.commands import record
from nuwa.training.ranker import Ranker, RankerConfig, tokenizer_digest
from nuwa.training.trainer import TrainerOptions, train
from nuwa.training.vqgan import VQGAN

from .tiny import TINY_VQGAN

TINY = ModelConfig(
    name="tiny",
    image=TINY_VQGAN,
    text=TextConfig(vocabulary_size=300, width=16, layers=1, heads=2, mask_padding=True),
    decoder=DecoderConfig(
        grid=Grid(10, 8, 8),
        width=16,
        layers=1,
        heads=2,
        ff_multiplier=1,
        extents=(Extent(3, 3, 3),),
    ),
    visual=VisualConfig(layers=1, heads=2, ff_multiplier=1, relative_bias=True),
    sketch=dataclasses.replace(TINY_VQGAN, channels=21),
    tasks=tuple(Task),
)
STEPS = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    (folder / "tiny.json").write_text(TINY.to_json())
    torch.manual_seed(0)
    save_tokenizer(VQGAN(TINY.image), folder / "vqgan")
    assert TINY.sketch is not None
    save_tokenizer(VQGAN(TINY.sketch), folder / "sketches")
    return folder


def command(folder, kind, run) -> list[str]:
    code = (
        "import argparse, sys; from nuwa.training.cli import command;"
        "parser = argparse.ArgumentParser(); run = command(parser); run(parser.parse_args())"
    )
    shared = ["--config", str(folder / "tiny.json"), "--run", str(run), "--threads", "1"]
    shared += ["--steps", str(STEPS), "--checkpoint-every", "3", "--sample-every", "100"]
    own = {
        "tokenizer": ["--batch", "2", "--quantize-from", "4", "--discriminator-from", "8"],
        "sketch-tokenizer": ["--batch", "2", "--quantize-from", "4", "--emphasis", "2"],
        "model": ["--tokenizer", str(folder / "vqgan"), "--dataset-clips", "6"]
        + ["--images", "3", "--clips", "2", "--none-clips", "0.5"]
        + ["--sketch-tokenizer", str(folder / "sketches"), "--visual-from", "4"]
        + ["--sketch-images", "1", "--hidden-images", "1"]
        + ["--sketch-clips", "1", "--hidden-clips", "1"]
        + ["--steady-clips", "0.5", "--own-tokens", "0.9", "--mistaken-tokens", "0.2"]
        + ["--strange-clips", "0.3"],
    }[kind]
    return [sys.executable, "-c", code, kind, *shared, *own]


def losses(run) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "sketch-tokenizer", "model"])
def test_killed_and_resumed_equals_unbroken(folder, kind):
    whole, broken = folder / f"{kind}-whole", folder / f"{kind}-broken"
    subprocess.run(command(folder, kind, whole), check=True, capture_output=True)
    kills = 0
    for wanted in (5, 11):
        process = subprocess.Popen(
            command(folder, kind, broken), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            path = broken / "metrics.jsonl"
            if path.exists() and len(path.read_text().splitlines()) >= wanted:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        process.wait()
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')  # a line cut short by the kill
    subprocess.run(command(folder, kind, broken), check=True, capture_output=True)
    assert kills == 2
    assert [step for step, _ in losses(whole)] == list(range(STEPS))
    assert losses(broken) == losses(whole)
    states = [sorted(run.glob("state-*.pt")) for run in (whole, broken)]
    assert [path.name for path in states[0]] == [path.name for path in states[1]]
    assert len(states[0]) == 2


@pytest.mark.slow
def test_a_finished_model_run_is_a_whole_checkpoint(folder):
    run = folder / "model-whole"
    if not (run / "checkpoint").exists():
        subprocess.run(command(folder, "model", run), check=True, capture_output=True)
    checkpoint = load_checkpoint(run / "checkpoint")
    assert checkpoint.config.text.vocabulary_size == checkpoint.text_tokenizer.vocabulary_size
    assert checkpoint.provenance["command"].startswith("nuwa ")
    assert list((run / "samples").glob("*.png"))
    assert any((run / "tensorboard").iterdir())


@pytest.mark.slow
def test_two_processes_train_one_model(folder):
    run = folder / "model-team"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", "--no-python", "--"]
    words = command(folder, "model", run)
    subprocess.run([*launcher, *words, "--stop-after", "5"], check=True, capture_output=True)
    subprocess.run([*launcher, *words], check=True, capture_output=True)
    assert [step for step, _ in losses(run)] == list(range(STEPS))
    load_checkpoint(run / "checkpoint")
    alone = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "begun with other settings (processes was 2, is 1)" in alone.stderr
    tokenizer = command(folder, "tokenizer", folder / "no")
    refused = subprocess.run([*launcher, *tokenizer], capture_output=True, text=True, check=False)
    assert "tokenizer is trained by one process, not by 2" in refused.stderr
    assert not (folder / "no").exists()


@pytest.mark.slow
def test_other_settings_on_the_same_run_are_refused(folder):
    run = folder / "model-whole"
    if not (run / "checkpoint").exists():
        subprocess.run(command(folder, "model", run), check=True, capture_output=True)
    words = [w if w != str(STEPS) else "15" for w in command(folder, "model", run)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert f"begun with other settings (steps was {STEPS}, is 15)" in result.stderr


def test_what_a_run_was_begun_with(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Options:
        lr: float = 0.5
        new: int = 3

    weights, run = tmp_path / "weights", tmp_path / "run"
    weights.mkdir()
    (weights / "nuwa.safetensors").write_bytes(b"one")
    args = argparse.Namespace(kind="model", level="digits", steps=9, seed=0, run=run)

    def begin(options: Options, **more) -> None:
        said = {"weights": record.weights(start=weights, tokenizer=None), "data": {"side": 8}}
        record.remember(args, options, said | more)

    begin(Options(lr=0.1))
    begin(Options(lr=0.1))
    with pytest.raises(
        ValueError, match=r"\(options.lr was 0.1, is 0.5; options.new was 3, is 4\)"
    ):
        begin(Options(new=4))
    with pytest.raises(ValueError, match=r"\(data.side was 8, is 16\)"):
        begin(Options(lr=0.1), data={"side": 16})
    (weights / "nuwa.safetensors").write_bytes(b"two")
    with pytest.raises(ValueError, match=r"\(weights.start.nuwa.safetensors was "):
        begin(Options(lr=0.1))
    # An earlier version knew no `new`, and did not write down which weights.
    said = json.loads((run / "run.json").read_text())
    del said["options"]["new"], said["weights"]
    (run / "run.json").write_text(json.dumps(said))
    begin(Options(lr=0.1))
    with pytest.raises(ValueError, match=r"options.new was 3, is 4"):
        begin(Options(lr=0.1, new=4))


def test_what_a_run_was_begun_with_is_written_once(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Options:
        widths: tuple[int, ...] = (1, 2)

    path = tmp_path / "run" / "run.json"
    args = argparse.Namespace(kind="model", level="digits", steps=9, seed=0, run=path.parent)
    record.remember(args, Options(), {})
    written = path.stat()
    record.remember(args, Options(), {})
    assert path.stat() == written
    record.remember(args, Options(), {"data": None})  # which an earlier version did not write down
    assert "data" in json.loads(path.read_text())
    path.write_text('{"kind": "mod')
    for read in (lambda: record.remember(args, Options(), {}), lambda: record.run_of(path)):
        with pytest.raises(ValueError, match=f"{path} cannot be read as JSON"):
            read()


def test_tasks_without_rows_are_left_out(folder, tmp_path, capsys):
    """But for those that the checkpoint did at which it began, whose defaults go with it."""
    run, start = tmp_path / "run", tmp_path / "start"
    words = command(folder, "model", run)[4:]
    for name in ("--hidden-images", "--sketch-clips", "--clips"):
        words[words.index(name) + 1] = "0"
    words[words.index("--steps") + 1] = "1"
    words[words.index("--visual-from") + 1] = "0"
    parser = argparse.ArgumentParser()
    run_command = cli.command(parser)
    run_command(parser.parse_args(["model", *words]))
    said = "no row of a step is of i2i, ti2i, t2v, s2v, v2v: the model will not do these"
    assert said in capsys.readouterr().out
    made = load_checkpoint(run / "checkpoint")
    assert set(made.config.tasks) == {Task.T2I, Task.S2I, Task.TV2V}
    assert made.ranker is None and made.sampling == {}
    sampling = {Task.TV2V: Sampling(temperature=0.5), Task.T2I: Sampling(guidance_scale=2.0)}
    ranker = Ranker(RankerConfig(tokenizer=tokenizer_digest(made.text_tokenizer)))
    save_checkpoint(
        start,
        made.config,
        made.vqgan,
        made.nuwa,
        made.text_tokenizer,
        {"data": "none"},
        sketch_vqgan=made.sketch_vqgan,
        ranker=ranker,
        sampling=sampling,
    )
    words[words.index("--run") + 1] = str(tmp_path / "again")
    words[words.index("--hidden-clips") + 1] = "0"
    for name in ("--tokenizer", "--sketch-tokenizer"):  # those of the start
        del words[words.index(name) : words.index(name) + 2]
    run_command(parser.parse_args(["model", *words, "--start", str(start)]))
    again = load_checkpoint(tmp_path / "again" / "checkpoint")
    assert set(again.config.tasks) == set(made.config.tasks), "TV2V too"
    assert again.sampling == sampling and again.ranker is not None
    assert again.provenance["start"] == {"data": "none"} and again.provenance["processes"] == 1


@pytest.mark.parametrize("kind", ["tokenizer", "sketch-tokenizer"])
def test_a_vqgan_goes_on_from_a_whole_checkpoints(folder, tmp_path, kind):
    """From the one of the same kind, and unless it is said with as many codes."""
    assert TINY.sketch is not None
    kinds = {"tokenizer": (IMAGE_TOKENIZER, TINY.image)}
    kinds["sketch-tokenizer"] = (SKETCH_TOKENIZER, TINY.sketch)
    for name, config in kinds.values():
        fewer = dataclasses.replace(config, codebook_size=config.codebook_size - 3)
        save_tokenizer(VQGAN(fewer), tmp_path / "whole", name=name)
    words = command(folder, kind, tmp_path / "run")[4:]
    words[words.index("--quantize-from") + 1] = "0"
    words[words.index("--steps") + 1] = "2"
    parser = argparse.ArgumentParser()
    run_command = cli.command(parser)
    run_command(parser.parse_args([kind, *words, "--start", str(tmp_path / "whole")]))
    before = load_tokenizer(tmp_path / "whole", kinds[kind][0])
    assert load_tokenizer(tmp_path / "run" / "checkpoint").config == before.config


@pytest.mark.parametrize(
    ("kind", "option", "other", "needed"),
    [
        ("model", "--sketch-tokenizer", "vqgan", 21),
        ("model", "--tokenizer", "sketches", 3),
        ("tokenizer", "--start", "sketches", 3),
        ("sketch-tokenizer", "--start", "vqgan", 21),
    ],
)
def test_a_vqgan_of_the_other_kind_is_refused(folder, tmp_path, kind, option, other, needed):
    words = command(folder, kind, tmp_path / "run")[4:]
    parser = argparse.ArgumentParser()
    run_command = cli.command(parser)
    with pytest.raises(ValueError, match=f"{other} has .* channels, where {needed} are needed"):
        run_command(parser.parse_args([kind, *words, option, str(folder / other)]))


@pytest.mark.parametrize(
    ("said", "sketches"),
    [
        ({"kind": "tokenizer"}, False),
        ({"kind": "sketch-tokenizer"}, True),
        ({"kind": "prune", "sketches": True}, True),
        ({"kind": "prune", "sketches": False}, False),
    ],
)
def test_the_kind_of_a_vqgan_is_known_where_its_channels_do_not_tell(tmp_path, said, sketches):
    """As with OpenMoji: three classes, three colours."""
    record.write_provenance(tmp_path, said)
    record.check_kind(tmp_path, sketches=sketches)
    needed = "pictures" if sketches else "class maps"
    with pytest.raises(ValueError, match=rf"{tmp_path} is of .*, where one of {needed} is needed"):
        record.check_kind(tmp_path, sketches=not sketches)


@pytest.mark.parametrize("said", [{}, {"kind": "model"}, {"kind": "prune"}])
def test_a_vqgan_of_which_nothing_is_known_may_be_of_either_kind(tmp_path, said):
    record.write_provenance(tmp_path, said)
    for sketches in (False, True):
        record.check_kind(tmp_path, sketches=sketches)


def test_of_a_checkpoint_with_three_classes_each_kind_is_found(tmp_path):
    config = dataclasses.replace(TINY.sketch, channels=3)
    save_tokenizer(VQGAN(TINY.image), tmp_path)
    save_tokenizer(VQGAN(config), tmp_path, name=SKETCH_TOKENIZER)
    for sketches, expected in ((False, TINY.image), (True, config)):
        assert load_tokenizer_of(tmp_path, 3, sketches=sketches).config == expected


@pytest.mark.parametrize(("words", "channels"), [(["--sketches"], 21), ([], 3)])
def test_pruning_refuses_a_vqgan_of_the_other_kind(folder, tmp_path, words, channels):
    parser = argparse.ArgumentParser()
    run_command = cli.command(parser)
    other = folder / ("vqgan" if words else "sketches")
    words = ["prune", "--tokenizer", str(other), "--out", str(tmp_path / "pruned"), *words]
    with pytest.raises(ValueError, match=f"{other} has .* channels, where {channels} are needed"):
        run_command(parser.parse_args(words))
    assert not (tmp_path / "pruned").exists()


def test_pruning_says_where_the_codes_come_from(folder, tmp_path):
    parser = argparse.ArgumentParser()
    run_command = cli.command(parser)
    words = ["--tokenizer", str(folder / "vqgan"), "--dataset-clips", "2", "--threshold", "0.5"]
    run_command(parser.parse_args(["prune", *words, "--out", str(tmp_path / "pruned")]))
    said = record.run_of(tmp_path / "pruned")
    assert said["kind"] == "prune" and said["threshold"] == 0.5 and "level digits" in said["data"]


class Counting:
    """A recipe whose loss is its step, infinite at `bad`."""

    def __init__(self, bad: int = -1) -> None:
        self.bad, self.seen = bad, []

    def step(self, step, lr_factor):
        self.seen.append((step, lr_factor))
        return {"loss": float("inf") if step == self.bad else float(step)}

    def state(self):
        return {"seen": len(self.seen)}

    def load_state(self, state):
        self.loaded = state["seen"]

    def sample(self, path):
        path.write_bytes(b"")

    def export(self, folder):
        folder.mkdir(exist_ok=True)


def test_a_loss_that_is_not_finite_stops_with_the_last_state_kept(tmp_path):
    options = TrainerOptions(steps=10, checkpoint_every=4)
    with pytest.raises(FloatingPointError, match="inf at step 6"):
        train(Counting(bad=6), tmp_path, options)
    recipe = Counting()
    train(recipe, tmp_path, options)
    assert recipe.loaded == 4
    assert [step for step, _ in recipe.seen] == [4, 5, 6, 7, 8, 9]
    assert [step for step, _ in losses(tmp_path)] == list(range(10))


def test_a_planned_pause_goes_on(tmp_path):
    first, second = Counting(), Counting()
    train(first, tmp_path, TrainerOptions(steps=10, stop_after=5))
    train(second, tmp_path, TrainerOptions(steps=10))
    assert [step for step, _ in first.seen + second.seen] == list(range(10))


@pytest.mark.parametrize("name", ["steps", "stop_after", "checkpoint_every", "sample_every"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_of_steps_are_at_least_one(name, value):
    with pytest.raises(ValueError, match=f"^{name} {value} is not at least 1$"):
        TrainerOptions(**({"steps": 9} | {name: value}))


def test_what_killed_runs_left_of_states_is_removed(tmp_path):
    for name in (".state-00000002.pt.partial", "state-00000002.partial", "other.partial"):
        (tmp_path / name).write_bytes(b"half")
    train(Counting(), tmp_path, TrainerOptions(steps=3))
    left = {path.name for path in tmp_path.iterdir()} - {"samples", "tensorboard", "checkpoint"}
    assert left == {"other.partial", "metrics.jsonl", "state-00000003.pt"}


def test_a_state_that_cannot_be_written_leaves_the_one_of_before(tmp_path, monkeypatch):
    def full(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("unexpected pos 768 vs 662")

    train(Counting(), tmp_path, TrainerOptions(steps=9, stop_after=2))
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RuntimeError, match="unexpected pos"):
        train(Counting(), tmp_path, TrainerOptions(steps=9))
    assert [path.name for path in tmp_path.glob("*state-*")] == ["state-00000002.pt"]


def test_metrics_are_rewritten_only_where_lines_have_to_go(tmp_path):
    metrics = tmp_path / "metrics.jsonl"

    def go_on(last: int) -> int:
        train(Counting(), tmp_path, TrainerOptions(steps=9, stop_after=last))
        assert [step for step, _ in losses(tmp_path)] == list(range(last))
        return metrics.stat().st_ino

    same = go_on(2)
    assert go_on(3) == same
    for cut in ('{"step": 3, "lo', '{"step": 7, "loss": 7.0}\n', '{"step": 7, "loss": 7.0}'):
        with metrics.open("a") as file:
            file.write(cut)
        before, same = same, go_on(3)
        assert same != before
    metrics.write_text(metrics.read_text().rstrip("\n"))
    assert go_on(4) != same, "or the next line would be none"


def test_learning_rate_rises_stays_and_falls():
    options = TrainerOptions(steps=100, warmup=0.1, decay=0.5)
    factors = [options.lr_factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:50] == [1.0] * 41
    assert factors[75] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.02)
    with pytest.raises(ValueError, match="steps 0"):
        TrainerOptions(steps=0)
    with pytest.raises(ValueError, match="do not fit"):
        TrainerOptions(steps=1, warmup=0.8, decay=0.3)


def test_checkpoints_load_strictly(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load_checkpoint(tmp_path)
    save_tokenizer(VQGAN(TINY.image), tmp_path)
    weights = tmp_path / "image_tokenizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_tokenizer(tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "vqgan" / "image_tokenizer.safetensors")
    tensors.pop("encoder.conv_in.bias")
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="encoder.conv_in.bias"):
        load_tokenizer(tmp_path)
