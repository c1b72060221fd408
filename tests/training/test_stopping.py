"""Runs that are told to stop: no step is lost, and whoever says so twice is obeyed at once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from nuwa.training.trainer import TrainerOptions, train

SIGNALS = [signal.SIGINT, signal.SIGTERM]


class Told:
    """A recipe to which signals come: in the middle of a step, or of a sample."""

    def __init__(self, *, steps: dict | None = None, samples: dict | None = None) -> None:
        self.at_steps, self.at_samples = steps or {}, samples or {}
        self.done: list[int] = []
        self.exported = False

    def step(self, step, lr_factor):
        for number in self.at_steps.get(step, ()):
            os.kill(os.getpid(), number)
        self.done.append(step)
        return {"loss": float(step)}

    def state(self):
        return {"done": self.done}

    def load_state(self, state):
        self.done = state["done"]

    def sample(self, path):
        for number in self.at_samples.get(int(path.stem), ()):
            os.kill(os.getpid(), number)
        path.write_bytes(b"")

    def export(self, folder):
        self.exported = True


@pytest.fixture(autouse=True)
def _handlers(ctrl_c_is_heard):
    """Those of before are there again after every run."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def last_state(run) -> dict:
    return torch.load(sorted(run.glob("state-*.pt"))[-1], weights_only=True)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_step_is_finished_and_saved(tmp_path, capsys, number):
    options = TrainerOptions(steps=9)
    first = Told(steps={3: [number]})
    with pytest.raises(KeyboardInterrupt):
        train(first, tmp_path, options, alone=True)
    assert first.done == [0, 1, 2, 3] and not first.exported
    assert last_state(tmp_path) == {"step": 4, "recipe": {"done": [0, 1, 2, 3]}}
    said = "stopped at step 4; the same command goes on from there\n"
    assert capsys.readouterr().err.endswith(said)
    again = Told()
    train(again, tmp_path, options, alone=True)
    assert again.done == list(range(9)) and again.exported
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(9))


def test_a_signal_while_a_sample_is_drawn_ends_the_next_step(tmp_path):
    recipe = Told(samples={4: [signal.SIGTERM]})
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path, TrainerOptions(steps=9, sample_every=4), alone=True)
    assert last_state(tmp_path)["step"] == 5


@pytest.mark.parametrize("where", ["steps", "samples"])
def test_a_signal_at_the_very_end_is_not_lost(tmp_path, capsys, where):
    recipe = Told(**{where: {2 if where == "steps" else 3: [signal.SIGINT]}})
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path, TrainerOptions(steps=3), alone=True)
    assert last_state(tmp_path)["step"] == 3 and not recipe.exported
    assert "stopped at step 3;" in capsys.readouterr().err


def test_the_second_one_interrupts_at_once(tmp_path, capsys):
    recipe = Told(steps={3: [signal.SIGTERM, signal.SIGINT]})
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path, TrainerOptions(steps=9, checkpoint_every=2), alone=True)
    assert recipe.done == [0, 1, 2] and last_state(tmp_path)["step"] == 2
    assert "stopped" not in capsys.readouterr().err


def test_one_of_several_processes_is_interrupted_at_once(tmp_path):
    """Alone it could not finish the step."""
    recipe = Told(steps={3: [signal.SIGINT]})
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path, TrainerOptions(steps=9, checkpoint_every=2))
    assert recipe.done == [0, 1, 2] and last_state(tmp_path)["step"] == 2


def test_what_is_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        recipe = Told(steps={1: [signal.SIGINT]})
        train(recipe, tmp_path, TrainerOptions(steps=3), alone=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert recipe.exported


def test_beside_the_main_thread_runs_train_as_they_do_elsewhere(tmp_path):
    recipe = Told()
    thread = threading.Thread(
        target=train, args=(recipe, tmp_path, TrainerOptions(steps=3)), kwargs={"alone": True}
    )
    thread.start()
    thread.join()
    assert recipe.exported


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_that_is_stopped_goes_on(tmp_path, number):
    run = tmp_path / "run"
    words = [
        sys.executable,
        "-c",
        "import sys; from nuwa.runtime.cli import main; sys.exit(main())",
    ]
    words += ["train", "tokenizer", "--run", str(run), "--batch", "1", "--threads", "1"]
    words += ["--checkpoint-every", "100000", "--sample-every", "100000", "--steps", "100000"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and "\n" in metrics.read_text()):
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    done = len(metrics.read_text().splitlines())
    assert err == f"stopped at step {done}; the same command goes on from there\n"
    assert [path.name for path in run.glob("*state-*")] == [f"state-{done:08d}.pt"]
    words += ["--stop-after", str(done + 1)]
    subprocess.run(words, check=True, capture_output=True)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(done + 1))
