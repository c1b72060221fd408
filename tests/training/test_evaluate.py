"""The evaluator over generators whose scores are known beforehand.

`Replay` answers with the real clips, so it must score exactly the real ceiling; the others spoil
its answers in one known way.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from nuwa.training import evaluate as evaluation
from nuwa.training.evaluate import TASKS, evaluate, find_judge
from nuwa.training.report import format_report
from nuwa.training.sprites.world import SpriteWorld

SAMPLES, SEED = 24, 100


@pytest.fixture(autouse=True)
def _few_reference_samples(monkeypatch):
    monkeypatch.setattr(evaluation, "REFERENCE_SAMPLES", 40)


class Replay:
    """Real clips, looked up by the seed: sample i is asked for with SEED + i."""

    def __init__(self) -> None:
        self.world, self.calls = SpriteWorld("digits", "test"), []

    def __call__(self, *, task, prompt, frame_count, seed, frames):
        self.calls.append(
            (task, prompt, frame_count, seed, None if frames is None else len(frames))
        )
        index = seed - SEED
        clip = self.world.sample(index).frames
        return clip[index % 10][None] if task == "t2i" else clip


def _evaluate(generate, **options):
    defaults = {"tasks": TASKS, "split": "test", "samples": SAMPLES, "seed": SEED}
    return evaluate(generate, **(defaults | options))


def _model(report, task):
    return {name: score["model"] for name, score in report["tasks"][task]["scores"].items()}


def test_real_clips_score_the_real_ceiling():
    generate = Replay()
    report = _evaluate(generate, reconstruct=lambda clip: clip)
    for task in TASKS:
        for name, score in report["tasks"][task]["scores"].items():
            assert score["model"] == score["reconstructed"]
            if not name.startswith("psnr"):
                assert score["model"] == score["real"]
            if name in ("class", "colour", "motion", "joint"):
                assert score["model"] >= 0.9 and score["ratio"] == 1.0
                assert score["low"] <= score["model"] <= score["high"]
    assert _model(report, "t2v")["motion"] == _model(report, "t2v")["colour"] == 1.0
    assert _model(report, "v2v")["psnr"] == _model(report, "v2v")["psnr_next"] == 100.0


def test_what_the_generator_is_asked_for():
    generate = Replay()
    _evaluate(generate, samples=2)
    first = generate.world.factors(0)
    assert generate.calls[::2] == [
        ("t2i", first.image_caption, 1, SEED, None),
        ("t2v", first.video_caption, 10, SEED, None),
        ("v2v", "", 10, SEED, 4),
    ]
    assert [call[3] for call in generate.calls] == [SEED, SEED + 1] * 3


def test_black_frames_score_nothing():
    def black(*, frame_count, **_):
        return np.zeros((frame_count, 64, 64, 3), np.uint8)

    report = _evaluate(black)
    for task in ("t2i", "t2v"):
        scores = _model(report, task)
        assert scores["class"] == scores["colour"] == scores["joint"] == 0.0
        assert scores["background"] == 1.0, "every background of this level is black"
        fid = report["tasks"][task]["scores"]["fid_judge"]
        assert fid["model"] > 4 * fid["real"]
    assert _model(report, "t2v")["motion"] == 0.0
    assert _model(report, "v2v")["class"] == 0.0


def test_swapped_colour_costs_colour_and_nothing_else():
    # red -> green -> blue -> red; yellow, which is red and green, becomes cyan
    replay = Replay()

    def swapped(**request):
        return replay(**request)[..., [2, 0, 1]]

    report = _evaluate(swapped, tasks=["t2v"])
    scores, real = _model(report, "t2v"), report["tasks"]["t2v"]["scores"]
    assert scores["colour"] == scores["joint"] == 0.0
    for name in ("class", "background", "motion"):
        assert scores[name] == real[name]["real"]


def test_another_ending_costs_motion_and_not_the_rest():
    replay = Replay()

    def frozen(**request):
        return replay(**request)[[0, 1, 2, 3, 3, 3, 3, 3, 3, 3]]

    scores = _model(_evaluate(frozen, tasks=["v2v"]), "v2v")
    assert scores["motion"] <= 0.1 and scores["class"] >= 0.9 and scores["colour"] == 1.0
    assert 5 < scores["psnr"] < 20


def test_written_files(tmp_path):
    done = []
    report = _evaluate(
        Replay(),
        samples=4,
        tasks=["t2i", "t2v"],
        out=tmp_path,
        progress=lambda count, total: done.append((count, total)),
    )
    assert done == [(i, 8) for i in range(1, 9)]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    table = (tmp_path / "report.md").read_text()
    assert table == format_report(report)
    assert "| t2v | motion | 1.000 | 1.000 .. 1.000 | 1.000 | - | - |" in table
    sheet = np.asarray(Image.open(tmp_path / "t2v.png"))
    assert np.array_equal(sheet[:64, :64], SpriteWorld("digits", "test").sample(0).frames[0])
    assert (tmp_path / "t2i.png").is_file() and not (tmp_path / "v2v.png").exists()


def test_wrong_requests_and_results_are_refused():
    with pytest.raises(ValueError, match="'s2v'.*t2i, t2v, v2v"):
        _evaluate(Replay(), tasks=["s2v"])
    with pytest.raises(ValueError, match="samples is 1"):
        _evaluate(Replay(), samples=1)
    with pytest.raises(ValueError, match="train, val, test, novel"):
        _evaluate(Replay(), split="dev")
    with pytest.raises(ValueError, match=r"uint8 \[10, 32, 32, 3\].*\[10, 64, 64, 3\]"):
        _evaluate(lambda **_: np.zeros((10, 32, 32, 3), np.uint8), tasks=["t2v"])
    with pytest.raises(ValueError, match="nuwa train judge --level nowhere"):
        find_judge("nowhere")
