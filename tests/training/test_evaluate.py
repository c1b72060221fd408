"""The evaluator over generators whose scores are known beforehand.

`Perfect` gives the real answer to every question, so it must score exactly the real ceiling and
meet every bar; the others spoil its answers in one known way, and must miss the bars of just that.
"""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import pytest
from PIL import Image

from nuwa.training import evaluate as evaluation
from nuwa.training import published
from nuwa.training.evaluate import TASKS, evaluate, find_judge
from nuwa.training.evaluation.parts import parts_of
from nuwa.training.report import format_report
from nuwa.training.sprites.world import SpriteWorld

SAMPLES, SEED = 9, 100
WORLD = SpriteWorld("digits", "test")
PARTS = {part.name: part for part in parts_of(TASKS, WORLD, sketch_prompt="caption")}


@pytest.fixture(autouse=True)
def _few_reference_samples(monkeypatch):
    monkeypatch.setattr(evaluation, "REFERENCE_SAMPLES", 12)


class Perfect:
    """Real answers, looked up by the seed: question i is asked with SEED + i."""

    def __init__(self) -> None:
        self.requests = []

    def __call__(self, **request):
        self.requests.append(request)
        index = request["seed"] - SEED
        if request["frame_count"] == 100:
            return WORLD.long_clip(index, range(100))[0]
        captioned = request["task"] == "v2v" and request["prompt"]
        return PARTS["v2v_captioned" if captioned else request["task"]].question(index).real


class Spoiled(Perfect):
    """The real answers after `spoil(clip)`; known pixels stay, as they do in the runtime."""

    def __init__(self, spoil) -> None:
        super().__init__()
        self.spoil = spoil

    def __call__(self, **request):
        clip = super().__call__(**request)
        made, frames = self.spoil(clip.copy()), request["frames"]
        if frames is not None:
            known = True if request["mask"] is None else ~request["mask"][..., None]
            made[: len(frames)] = np.where(known, frames, made[: len(frames)])
        return made


def _evaluate(generate, **options):
    defaults = {"tasks": TASKS, "split": "test", "samples": SAMPLES, "seed": SEED}
    return evaluate(generate, **(defaults | options))


def _model(report, part):
    return {name: score["model"] for name, score in report["tasks"][part]["scores"].items()}


def _missed(report):
    return {(bar["part"], bar["score"]) for bar in report["bars"] if not bar["holds"]}


@pytest.fixture(scope="module")
def perfect():
    generate = Perfect()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "REFERENCE_SAMPLES", 12)
        return generate, _evaluate(generate, reconstruct=lambda clip: clip, about={"bundle": "b"})


def test_real_answers_score_the_ceilings_and_meet_every_bar(perfect):
    _, report = perfect
    assert list(report["tasks"]) == [*TASKS[:7], "v2v_captioned", "tv2v"]
    for task in report["tasks"].values():
        for name, score in task["scores"].items():
            assert score["model"] == score["reconstructed"]
            if not name.startswith(("psnr", "ssim")):
                assert score["model"] == score["real"]
            if not name.endswith("_judge"):
                assert score["low"] <= score["model"] <= score["high"]
                assert score["samples"] <= SAMPLES
    assert not _missed(report) and all(
        bar["holds_against_real"] in (True, None) for bar in report["bars"]
    )
    barred = {(bar["part"], bar["score"]) for bar in report["bars"]}
    assert {("t2i", "joint"), ("t2v", "joint"), ("s2i", "miou"), ("s2v", "miou")} <= barred
    assert {("s2i", "class"), ("i2i", "class"), ("i2i", "known_identical")} <= barred
    assert {("ti2i", "edited_class"), ("tv2v", "edited_motion"), ("tv2v", "kept_motion")} <= barred
    assert {("v2v", "identity"), ("v2v_captioned", "psnr")} <= barred
    assert _model(report, "v2v_captioned")["psnr"] == 100.0


def test_what_the_generator_is_asked_for(perfect):
    generate, _ = perfect
    first = {}
    for request in generate.requests:
        name = request["task"] + ("+" if request["task"] == "v2v" and request["prompt"] else "")
        first.setdefault(name, request)
    sample, factors = WORLD.sample(0), WORLD.factors(0)
    assert all(request["seed"] == SEED for request in first.values())
    for name in ("t2i", "s2i"):
        assert first[name]["prompt"] == factors.image_caption and first[name]["frame_count"] == 1
    for name in ("t2v", "s2v"):
        assert first[name]["prompt"] == factors.video_caption and first[name]["frame_count"] == 10
    assert first["i2i"]["prompt"] == first["v2v"]["prompt"] == ""
    assert first["t2v"]["frames"] is first["t2v"]["mask"] is first["t2v"]["sketch"] is None
    np.testing.assert_array_equal(first["s2v"]["sketch"], sample.segmentation)
    np.testing.assert_array_equal(first["v2v"]["frames"], sample.frames[:2])
    np.testing.assert_array_equal(first["tv2v"]["frames"], sample.frames)
    hidden = first["i2i"]["mask"]
    assert hidden.sum() == 64 * 32 and not first["i2i"]["frames"][0][hidden].any()


def test_black_frames_miss_everything_but_what_is_given():
    report = _evaluate(Spoiled(np.zeros_like), reconstruct=lambda clip: clip)
    held = {(bar["part"], bar["score"]) for bar in report["bars"] if bar["holds"]}
    # All backgrounds of this level are black, and half of a sprite may still tell its class.
    assert {score for _, score in held} <= {"known_identical", "kept_background", "class"}
    assert ("s2i", "class") not in held and ("s2v", "class") not in held
    for part in ("t2i", "t2v", "s2i", "s2v", "ti2i", "tv2v"):
        assert _model(report, part)["joint"] == 0.0
    assert _model(report, "s2v")["sprite_iou"] == 0.0 and _model(report, "v2v")["identity"] == 0.0
    fid = report["tasks"]["t2v"]["scores"]["fid_judge"]
    assert fid["model"] > fid["real"] + 30
    assert _model(report, "t2v")["fvd_judge"] > _real(report, "t2v", "fvd_judge") + 30


def _real(report, part, name):
    return report["tasks"][part]["scores"][name]["real"]


def test_swapped_colour_costs_colour_and_nothing_else():
    # red -> green -> blue -> red; yellow, which is red and green, becomes cyan
    tasks = ["s2i", "t2v", "tv2v"]
    report = _evaluate(Spoiled(lambda clip: clip[..., [2, 0, 1]]), tasks=tasks)
    assert _missed(report) == {
        ("t2v", "joint"),
        ("tv2v", "edited_colour"),
        ("tv2v", "kept_colour"),
    }
    for part in ("s2i", "t2v"):
        scores = _model(report, part)
        assert scores["colour"] == scores["joint"] == 0.0
        for name in ("class", "background"):
            assert scores[name] == _real(report, part, name)
    assert _model(report, "s2i")["miou"] == _real(report, "s2i", "miou")


def test_a_shifted_sprite_costs_the_overlap_and_not_the_class():
    report = _evaluate(Spoiled(lambda clip: np.roll(clip, 3, axis=2)), tasks=["s2v"])
    assert _missed(report) == {("s2v", "miou")}
    assert 0.2 < _model(report, "s2v")["sprite_iou"] < 0.7


def test_a_still_clip_costs_motion_and_psnr_and_not_identity():
    report = _evaluate(
        Spoiled(lambda clip: clip[[0, 1] + [1] * 8]),
        tasks=["t2v", "v2v"],
        reconstruct=lambda clip: clip,
    )
    assert _missed(report) == {("t2v", "joint"), ("v2v_captioned", "psnr")}
    scores = _model(report, "v2v_captioned")
    assert scores["motion"] == 0.0 and 5 < scores["psnr"] < 25 and scores["ssim"] < 0.9
    assert _model(report, "v2v")["identity"] >= 0.9
    assert _model(report, "t2v")["fvd_judge"] > _real(report, "t2v", "fvd_judge") + 20


def test_ignored_edits_miss_the_edited_factor_only():
    class Original(Perfect):
        """Gives back what it was given."""

        def __call__(self, **request):
            return request["frames"]

    missed = _missed(_evaluate(Original(), tasks=["ti2i", "tv2v"]))
    assert missed == {
        (part, f"edited_{factor}")
        for part, factors in (
            ("ti2i", ("colour", "class")),
            ("tv2v", ("colour", "class", "motion")),
        )
        for factor in factors
    }


def test_one_changed_known_pixel_is_seen():
    class Careless(Perfect):
        def __call__(self, **request):
            clip = super().__call__(**request).copy()
            corner = np.argwhere(~request["mask"])[0]
            clip[0, corner[0], corner[1], 0] ^= 1
            return clip

    report = _evaluate(Careless(), tasks=["i2i", "ti2i", "tv2v"])
    assert _missed(report) == {(part, "known_identical") for part in ("i2i", "ti2i", "tv2v")}
    assert _model(report, "i2i")["known_identical"] == 0.0


def test_ceilings_keep_known_pixels_and_scale_the_bars():
    """A tokenizer that paints everything black leaves what is given."""
    report = _evaluate(Perfect(), tasks=["t2i", "i2i"], reconstruct=np.zeros_like)
    scores = report["tasks"]["i2i"]["scores"]
    assert scores["known_identical"]["reconstructed"] == 1.0
    assert scores["class"]["reconstructed"] == scores["class"]["visible"]
    bars = {(bar["part"], bar["score"]): bar for bar in report["bars"]}
    assert bars["t2i", "joint"]["threshold"] == 0.0 and bars["t2i", "joint"]["holds"]
    nothing = _evaluate(Spoiled(np.zeros_like), tasks=["t2i"], reconstruct=np.zeros_like)
    assert _missed(nothing) == {("t2i", "joint")}, "a share of nothing is nothing"
    assert bars["i2i", "class"]["threshold"] == 0.9 * scores["class"]["visible"]


def test_the_novel_split_has_a_lower_bar_for_text():
    world = SpriteWorld("digits", "novel")
    parts = parts_of(TASKS, world, sketch_prompt="caption")
    least = {part.name: str(part.bars[0]) for part in parts}
    assert least["t2i"] == least["t2v"] == "joint >= 0.8 x ceiling"
    assert least["s2i"] == "miou >= 0.85"


def test_sketches_without_a_caption_are_not_blamed_for_the_colour():
    generate = Spoiled(lambda clip: clip[..., [2, 0, 1]])
    report = _evaluate(generate, tasks=["s2i"], sketch_prompt="none")
    assert {request["prompt"] for request in generate.requests} == {""}
    assert not _missed(report) and "colour" not in _model(report, "s2i")
    assert report["sketch_prompt"] == "none"


def test_the_same_whatever_the_concurrency():
    reports = [_evaluate(Perfect(), tasks=["t2i", "ti2i"], concurrency=n) for n in (1, 5)]
    assert reports[0] == reports[1]


def test_long_clips_are_scored_window_by_window():
    def fading(clip):
        return np.concatenate([clip[:60], np.zeros_like(clip[60:])]) if len(clip) == 100 else clip

    kept = _evaluate(Perfect(), tasks=["v2v"], samples=2, long=3)["long"]
    lost = _evaluate(Spoiled(fading), tasks=["v2v"], samples=2, long=3)["long"]
    for name in ("class", "colour", "axis"):
        assert kept["scores"][name]["model"] == kept["scores"][name]["real"] == [1.0] * 10
        assert kept["scores"][name]["holds"] and not lost["scores"][name]["holds"]
        assert lost["scores"][name]["model"] == [1.0] * 6 + [0.0] * 4
        assert lost["scores"][name]["change"] == -1.0


def test_a_sprite_that_stops_loses_its_axis():
    def stopping(clip):
        return clip[np.minimum(np.arange(100), 49)] if len(clip) == 100 else clip

    scores = _evaluate(Spoiled(stopping), tasks=["v2v"], samples=2, long=3)["long"]["scores"]
    assert scores["axis"]["model"] == [1.0] * 5 + [0.0] * 5
    assert scores["class"]["model"] == [1.0] * 10


def test_written_files(tmp_path, perfect):
    done = []
    report = _evaluate(
        Perfect(),
        samples=3,
        tasks=["i2i", "v2v"],
        long=2,
        out=tmp_path,
        about={"bundle_hash": "abc"},
        progress=lambda count, total: done.append((count, total)),
    )
    assert done == [(3, 11), (6, 11), (9, 11), (11, 11)]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    table = (tmp_path / "report.md").read_text()
    assert table == format_report(report)
    assert "- bundle_hash: abc" in table
    assert "| i2i | known_identical >= 1 | 1.000 | 1.000 | 1.000 | yes | yes |" in table
    assert "| axis, model | 1.000 |" in table
    names = {path.name for path in tmp_path.iterdir()}
    sheets = {"i2i.png", "v2v.png", "v2v_captioned.png", "v2v_long.png"}
    assert names == sheets | {"report.json", "report.md"}
    sheet = np.asarray(Image.open(tmp_path / "v2v.png"))
    frames = WORLD.sample(0).frames
    np.testing.assert_array_equal(sheet[:64, :64], frames[0])  # given
    np.testing.assert_array_equal(sheet[65:129, 9 * 65 : 9 * 65 + 64], frames[9])  # made


def test_wrong_requests_and_results_are_refused():
    with pytest.raises(ValueError, match="'t2w'.*t2i, s2i, i2i"):
        _evaluate(Perfect(), tasks=["t2w"])
    with pytest.raises(ValueError, match="samples is 1"):
        _evaluate(Perfect(), samples=1)
    with pytest.raises(ValueError, match="train, val, test, novel"):
        _evaluate(Perfect(), split="dev")
    with pytest.raises(ValueError, match="'both' is not one of caption, none"):
        _evaluate(Perfect(), sketch_prompt="both")
    with pytest.raises(ValueError, match="v2v, which is not among the tasks"):
        _evaluate(Perfect(), tasks=["t2i"], long=2)
    with pytest.raises(ValueError, match=r"uint8 \[10, 32, 32, 3\].*\[10, 64, 64, 3\]"):
        _evaluate(lambda **_: np.zeros((10, 32, 32, 3), np.uint8), tasks=["t2v"])
    with pytest.raises(ValueError, match="nuwa train judge --level nowhere"):
        find_judge("nowhere")


def test_published_metrics_only_from_the_published_files(tmp_path, monkeypatch):
    path = tmp_path / "inception.pth"
    with pytest.raises(ValueError, match="there is no file"):
        published.Published({"inception": path})
    path.write_bytes(b"other weights")
    with pytest.raises(ValueError, match="SHA-256 is .*FID, IS would not be what their name says"):
        _evaluate(Perfect(), tasks=["t2i"], weights={"inception": path})
    with pytest.raises(ValueError, match="'vgg'; choose from inception, clip, i3d"):
        published.Published({"vgg": path})
    digest = hashlib.sha256(b"other weights").hexdigest()
    known = published.WEIGHTS["inception"]
    monkeypatch.setitem(
        published.WEIGHTS, "inception", published.Weights(known.file, digest, known.metrics)
    )
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match="FID, IS cannot be computed.*torchvision"):
        published.Published({"inception": path})


def test_published_metrics_of_real_answers():
    """Networks that are means of colours: equal clips are at distance 0."""

    def inception(pictures):
        means = pictures.mean((1, 2))
        return means, means

    networks = published.Networks(
        inception=inception,
        clip=lambda pictures, prompts: np.full(len(pictures), 0.25),
        i3d=lambda clips: clips.mean((1, 2, 3)),
    )
    collector = published.Collector(networks)
    questions = [PARTS["t2v"].question(index) for index in range(4)]
    collector.add([each.real for each in questions[:2]], questions[:2])
    collector.add([each.real for each in questions[2:]], questions[2:])
    scores = collector.scores()
    assert list(scores) == ["FID-img", "IS", "FVD", "CLIPSIM"]
    assert scores["FVD"]["model"] == pytest.approx(0, abs=1e-6) and scores["FVD"]["samples"] == 4
    assert scores["FID-img"]["samples"] == 40
    assert scores["CLIPSIM"]["model"] == scores["CLIPSIM"]["real"] == 0.25
    assert scores["IS"]["model"] == scores["IS"]["real"] >= 1.0


def test_inception_score_by_hand():
    sure, even = np.log([[0.97, 0.01, 0.02]] * 4), np.zeros((4, 3))
    assert published.inception_score(sure, 2) == pytest.approx(1.0)
    assert published.inception_score(even, 2) == pytest.approx(1.0)
    one_hot = 50.0 * np.eye(4)
    assert published.inception_score(one_hot, 1) == pytest.approx(4.0)
    assert published.inception_score(np.tile(one_hot, (3, 1)), 3) == pytest.approx(4.0)
