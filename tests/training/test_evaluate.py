"""The evaluator over generators whose scores are known beforehand.

`Perfect` gives the real answer to every question, so it must score exactly the real ceiling and
meet every bar; the others spoil its answers in one known way, and must miss the bars of just that.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nuwa.training import published
from nuwa.training.evaluate import TASKS, evaluate, find_judge
from nuwa.training.evaluation import measuring
from nuwa.training.evaluation.manipulation import in_whole_cells
from nuwa.training.evaluation.parts import parts_of
from nuwa.training.judge import Judge
from nuwa.training.metrics import mean_iou, wilson_interval
from nuwa.training.report import format_report
from nuwa.training.sprites.world import SpriteWorld

SCORES = Path(__file__).parents[2] / "benchmarks" / "scores.py"
SAMPLES, SEED = 9, 100
WORLD = SpriteWorld("digits", "test")
PARTS = {part.name: part for part in parts_of(TASKS, WORLD, sketch_prompt="caption")}


@pytest.fixture(autouse=True)
def _few_reference_samples(monkeypatch):
    monkeypatch.setattr(measuring, "REFERENCE_SAMPLES", 12)


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
    return {(bar["part"], bar["score"]) for bar in report["bars"] if bar["holds"] is False}


def _bars(report):
    return {(bar["part"], bar["bar"]): bar for bar in report["bars"]}


@pytest.fixture(scope="module")
def perfect():
    generate = Perfect()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "REFERENCE_SAMPLES", 12)
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
                assert score["low"] - 1e-9 <= score["model"] <= score["high"] + 1e-9
                assert score["samples"] <= SAMPLES
    # The half that is visible may be enough for the judge.
    assert _missed(report) <= {("i2i", "class")}
    assert all(bar["holds_against_real"] in (True, None) for bar in report["bars"])
    assert all(bar["samples"] <= SAMPLES and bar["verdict"] for bar in report["bars"])
    barred = {(bar["part"], bar["score"]) for bar in report["bars"]}
    assert {("t2i", "joint"), ("t2v", "joint"), ("s2i", "miou"), ("s2v", "miou")} <= barred
    assert {("s2i", "class"), ("i2i", "class"), ("i2i", "known_identical")} <= barred
    assert {("ti2i", "edited_class"), ("tv2v", "edited_motion"), ("tv2v", "kept_motion")} <= barred
    assert {("s2i", "miou_sample"), ("s2v", "miou_sample")} <= barred
    assert {("v2v", "identity"), ("v2v", "psnr_one_way"), ("v2v_captioned", "psnr")} <= barred
    assert "class > visible" in {bar["bar"] for bar in report["bars"] if bar["part"] == "i2i"}
    assert set(report["tasks"]["i2i"]["scores"]["class_cut"]) >= {
        "model",
        "real",
        "reconstructed",
        "visible",
    }
    every = _bars(report)["i2i", "known_identical in every sample"]
    assert every["verdict"] == "holds" and every["margin_low"] is None
    joint = _bars(report)["t2v", "joint >= 0.95 x ceiling"]
    assert joint["verdict"] == "holds, within noise", "of nine samples"
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
    box, given = first["tv2v"]["mask"], first["tv2v"]["frames"]
    np.testing.assert_array_equal(given, np.where(box[..., None], 0, sample.frames))
    hidden = first["i2i"]["mask"]
    assert hidden.sum() == 64 * 32 and not first["i2i"]["frames"][0][hidden].any()


def test_readmes_tables(perfect):
    """benchmarks/scores.py: every bar that was measured, and each score in one of the two."""
    spec = importlib.util.spec_from_file_location("scores", SCORES)
    scores = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scores)
    _, report = perfect
    bars, further = scores.bars(report), scores.further(report)
    for table in (bars, further):
        assert len({line.count("|") for line in table}) == 1
    assert any(line.startswith("| V2V with caption | psnr | 100.0 | ") for line in bars)
    visible = report["tasks"]["i2i"]["scores"]["class"]["visible"]
    assert any(f"> visible, which is {visible:.3f} | yes" in line for line in bars)
    assert any(line.startswith("| T2V | fvd judge | ") for line in further)
    assert not any("psnr one way" in line for line in further), "it has a bar"
    assert not any("known identical" in line for line in bars + further)


def test_black_frames_miss_everything_but_what_is_given():
    report = _evaluate(Spoiled(np.zeros_like), reconstruct=lambda clip: clip)
    held = {(bar["part"], bar["score"]) for bar in report["bars"] if bar["holds"]}
    # All backgrounds of this level are black, and half of a sprite may still tell its class.
    assert {score for _, score in held} <= {"known_identical", "kept_background", "class"}
    assert not {("s2i", "class"), ("s2v", "class")} & held
    visible = _bars(report)["i2i", "class > visible"]
    assert visible["value"] == visible["threshold"] and not visible["holds"], "nothing was painted"
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
    assert _missed(report) == {("s2v", "miou"), ("s2v", "miou_sample")}
    assert 0.2 < _model(report, "s2v")["sprite_iou"] < 0.7


def test_a_still_clip_costs_motion_and_psnr_and_not_identity():
    report = _evaluate(
        Spoiled(lambda clip: clip[[0, 1] + [1] * 8]),
        tasks=["t2v", "v2v"],
        reconstruct=lambda clip: clip,
    )
    assert _missed(report) == {
        ("t2v", "joint"),
        ("v2v", "psnr_one_way"),
        ("v2v_captioned", "psnr"),
    }
    scores = _model(report, "v2v_captioned")
    assert scores["motion"] == 0.0 and 5 < scores["psnr"] < 25 and scores["ssim"] < 0.9
    assert _model(report, "v2v")["identity"] >= 0.9
    assert _model(report, "t2v")["fvd_judge"] > _real(report, "t2v", "fvd_judge") + 20


def test_ignored_edits_miss_the_edited_factor_only():
    class Original(Perfect):
        """Gives back the clip of which it was given the part that is not hidden."""

        def __call__(self, **request):
            index, given = request["seed"] - SEED, request["frames"]
            assert not given[:, request["mask"]].any(), "nothing hidden is given away"
            frames = WORLD.sample(index).frames
            original = frames if len(given) > 1 else frames[index % 10][None]
            assert (original == given)[:, ~request["mask"]].all()
            return original

    missed = _missed(_evaluate(Original(), tasks=["ti2i", "tv2v"], samples=16))
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
    missed = {(part, "known_identical") for part in ("i2i", "ti2i", "tv2v")}
    assert missed <= _missed(report) <= missed | {("i2i", "class")}
    assert _model(report, "i2i")["known_identical"] == 0.0


def test_ceilings_keep_known_pixels_and_scale_the_bars():
    """A tokenizer that paints everything black leaves what is given."""
    report = _evaluate(Perfect(), tasks=["t2i", "i2i"], reconstruct=np.zeros_like)
    scores = report["tasks"]["i2i"]["scores"]
    assert scores["known_identical"]["reconstructed"] == 1.0
    assert scores["class"]["reconstructed"] == scores["class"]["visible"]
    bars = _bars(report)
    joint = bars["t2i", "joint >= 0.95 x ceiling"]
    assert joint["threshold"] == 0.0 and not joint["holds"], "a share of nothing is nothing"
    assert joint["tokenizer_keeps"] is False and joint["holds_against_real"]
    assert bars["i2i", "class >= 0.9 x ceiling"]["threshold"] == 0.9 * scores["class"]["visible"]


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


@pytest.mark.parametrize("given", [1, 9])
def test_prediction_from_fewer_or_more_frames(given):
    generate = Perfect()
    report = _evaluate(generate, tasks=["v2v"], given=str(given), reconstruct=lambda clip: clip)
    assert {len(request["frames"]) for request in generate.requests} == {given}
    bars = {(bar["part"], bar["score"]) for bar in report["bars"]}
    assert (("v2v", "psnr_one_way") in bars) == (given > 1), "one frame does not tell"
    assert ("v2v_captioned", "psnr") in bars and not _missed(report)
    assert _model(report, "v2v")["identity"] == _real(report, "v2v", "identity")
    assert report["given"] == str(given)
    assert ("first frame," if given == 1 else "first 9 frames") in report["tasks"]["v2v"]["asks"]


@pytest.mark.parametrize("given", ["0", "10", "two"])
def test_prediction_needs_one_to_nine_frames(given):
    with pytest.raises(ValueError, match=f"given '?{given}'? is not "):
        _evaluate(Perfect(), tasks=["v2v"], given=given)


def test_the_same_whatever_the_concurrency():
    reports = [_evaluate(Perfect(), tasks=["t2i", "ti2i"], concurrency=n) for n in (1, 5)]
    assert reports[0] == reports[1]


def test_a_sprite_that_vanishes_is_not_right():
    def vanishing(clip):
        clip[3:] = 0
        return clip

    tasks = ["t2v", "s2v", "v2v"]
    report = _evaluate(Spoiled(vanishing), tasks=tasks)
    for part in tasks:
        scores = _model(report, part)
        assert scores["class"] == scores["colour"] == 0.0 and scores["background"] == 1.0
    assert _model(report, "t2v")["joint"] == _model(report, "v2v")["identity"] == 0.0
    assert {("t2v", "joint"), ("s2v", "class"), ("v2v", "identity")} <= _missed(report)


def test_a_sprite_that_is_gone_for_one_frame_is_still_there():
    def blinking(clip):
        clip[4] = 0
        return clip

    report = _evaluate(Spoiled(blinking), tasks=["t2v"])
    assert _model(report, "t2v")["joint"] == _real(report, "t2v", "joint")


def test_miou_pools_the_pixels_and_reads_each_frame():
    """Every clip becomes another one halfway: half of its labels are wrong."""
    other = WORLD.sample(SAMPLES + 1)

    def turning(clip):
        return np.concatenate([clip[:5], other.frames[5:]])

    report = _evaluate(Spoiled(turning), tasks=["s2v"])
    judge = Judge.load(find_judge("digits"))
    labels, sketches = [], []
    for index in range(SAMPLES):
        sample = WORLD.sample(index)
        verdict = judge.read(turning(sample.frames))
        sprite = verdict.layout.ink_FSS >= 0.5
        labels.append(sprite * (verdict.classes_F[:, None, None] + 1))
        sketches.append(sample.segmentation)
    each = [mean_iou(a, b, 21) for a, b in zip(labels, sketches, strict=True)]
    pooled = mean_iou(np.stack(labels), np.stack(sketches), 21)
    scores = report["tasks"]["s2v"]["scores"]
    assert scores["miou"]["model"] == pytest.approx(pooled)
    assert scores["miou_sample"]["model"] == pytest.approx(np.mean(each))
    assert abs(pooled - np.mean(each)) > 0.01, "they are not the same"
    assert scores["miou"]["low"] < pooled < scores["miou"]["high"]
    assert scores["miou"]["real"] > 0.9


@pytest.mark.parametrize("task", ["ti2i", "tv2v"])
def test_boxes_hold_the_sprite_before_and_after_the_edit(task):
    part = PARTS[task]
    masks = []
    for index in range(60):
        question = part.question(index)
        for clip in (question.frames, question.real):
            assert not clip[:, ~question.mask].any(), "the background is black"
        masks.append(question.mask)
    off_cells = [mask for mask in masks if not in_whole_cells(mask)]
    assert 20 <= len(off_cells) <= 40
    for mask in off_cells:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == len(rows) * len(columns)
        # A tile of 24 pixels, at most 36 more of its way, and 1 to 3 to spare on each side.
        assert max(len(rows), len(columns)) <= 24 + 36 + 6


def test_the_edit_does_not_follow_the_frame():
    frames = {}
    for index in range(120):
        frames.setdefault(PARTS["ti2i"].question(index).edited, set()).add(index % 10)
    assert frames == {"colour": set(range(10)), "class": set(range(10))}


def test_answers_off_the_cells_are_scored_apart(perfect):
    _, report = perfect
    for part in ("ti2i", "tv2v"):
        scores = report["tasks"][part]["scores"]
        masks = [PARTS[part].question(index).mask for index in range(SAMPLES)]
        expected = sum(not in_whole_cells(mask) for mask in masks)
        assert 0 < scores["joint_off_cells"]["samples"] == expected < SAMPLES


def test_a_bar_without_samples_is_shown():
    """Two questions cannot have all three edits."""
    report = _evaluate(Perfect(), tasks=["tv2v"], samples=2)
    rows = {bar["score"]: bar for bar in report["bars"]}
    unmeasured = [
        score for score in ("edited_colour", "edited_class", "edited_motion")
        if rows[score]["holds"] is None
    ]  # fmt: skip
    assert unmeasured
    assert rows[unmeasured[0]]["verdict"] == "not measured (0 samples)"
    assert f"| tv2v | {unmeasured[0]} >= 0.9 | - |" in format_report(report)


def test_long_clips_are_scored_window_by_window():
    def fading(clip):
        return np.concatenate([clip[:60], np.zeros_like(clip[60:])]) if len(clip) == 100 else clip

    reports = [
        _evaluate(generate, tasks=["v2v"], samples=2, long=3, reconstruct=lambda clip: clip)
        for generate in (Perfect(), Spoiled(fading))
    ]
    kept, lost = (report["long"]["v2v_long"]["scores"] for report in reports)
    assert reports[0]["long"]["v2v_long_captioned"]["scores"] == kept
    for name in ("class", "colour", "axis"):
        assert kept[name]["model"] == kept[name]["real"] == [1.0] * 10
        assert lost[name]["model"] == [1.0] * 6 + [0.0] * 4
        assert kept[name]["change"] == 0.0 and lost[name]["change"] == -1.0
        assert kept[name]["change_low"] == pytest.approx(wilson_interval(1.0, 3)[0] - 1)
        for against in (f"{name}_first", "ceiling"):
            bars = [_bars(each)["v2v_long", f"{name}_last >= 0.95 x {against}"] for each in reports]
            assert bars[0]["verdict"] == "holds, within noise", "three clips"
            assert bars[1]["holds"] is False and bars[1]["samples"] == 3


def test_a_long_clip_that_was_never_right_is_no_success():
    report = _evaluate(Spoiled(np.zeros_like), tasks=["v2v"], samples=2, long=3)
    assert report["long"]["v2v_long"]["scores"]["class"]["first"] == 0.0
    long = {bar["bar"]: bar for bar in report["bars"] if bar["part"] == "v2v_long"}
    assert long["class_last >= 0.95 x class_first"]["holds"] is False
    assert not any(bar["holds"] for bar in long.values())


def test_a_long_clip_must_keep_up_with_real_ones():
    """Never right in colour, but for one clip of four, and that to the end: nothing is lost."""

    def mostly_swapped(**request):
        clip = Perfect()(**request)
        return clip if request["seed"] == SEED or len(clip) < 100 else clip[..., [2, 0, 1]]

    report = _evaluate(mostly_swapped, tasks=["v2v"], samples=2, long=4)
    assert report["long"]["v2v_long"]["scores"]["colour"]["model"] == [0.25] * 10
    bars = _bars(report)
    assert bars["v2v_long", "colour_last >= 0.95 x colour_first"]["holds"]
    assert not bars["v2v_long", "colour_last >= 0.95 x ceiling"]["holds"]


def test_a_sprite_that_stops_loses_its_axis():
    def stopping(clip):
        return clip[np.minimum(np.arange(100), 49)] if len(clip) == 100 else clip

    report = _evaluate(Spoiled(stopping), tasks=["v2v"], samples=2, long=3)
    scores = report["long"]["v2v_long"]["scores"]
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
        ranking={"samples": 4, "rank_by": "clip"},
        progress=lambda count, total: done.append((count, total)),
    )
    assert done == [(3, 13), (6, 13), (9, 13), (11, 13), (13, 13)]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    table = (tmp_path / "report.md").read_text()
    assert table == format_report(report)
    assert "- bundle_hash: abc" in table and "NOT MEASURED" not in table
    known = "| i2i | known_identical in every sample | 1.000 | 1.000 | 1.000 | - | 3 | holds | - |"
    assert known in table
    assert "| axis, model | 1.000 |" in table
    names = {path.name for path in tmp_path.iterdir()}
    sheets = {"i2i.png", "v2v.png", "v2v_captioned.png", "v2v_long.png", "v2v_long_captioned.png"}
    assert names == sheets | {"report.json", "report.md"}
    sheet = np.asarray(Image.open(tmp_path / "v2v.png"))
    frames = WORLD.sample(0).frames
    np.testing.assert_array_equal(sheet[:64, :64], frames[0])  # given
    np.testing.assert_array_equal(sheet[65:129, 9 * 65 : 9 * 65 + 64], frames[9])  # made
    # Only where there is a prompt can answers be ranked.
    per_prompt = {part: each["samples_per_prompt"] for part, each in report["tasks"].items()}
    assert per_prompt == {"i2i": 1, "v2v": 1, "v2v_captioned": 4}
    assert report["judge"]["folder"] == "judge-digits" and "weights_sha256" in report["judge"]


class Killed(Perfect):
    """Stops at the first question of a task."""

    def __init__(self, task):
        super().__init__()
        self.task = task

    def __call__(self, **request):
        if request["task"] == self.task:
            raise KeyboardInterrupt
        return super().__call__(**request)


def test_a_killed_evaluation_goes_on_with_the_next_part(tmp_path, capsys):
    options = {"tasks": ["t2i", "s2i", "i2i"], "samples": 3}
    with pytest.raises(KeyboardInterrupt):
        _evaluate(Killed("i2i"), out=tmp_path, **options)
    partial = json.loads((tmp_path / "report.json").read_text())
    assert list(partial["tasks"]) == ["t2i", "s2i"] and partial["unfinished"] == ["i2i"]
    assert "NOT MEASURED YET: i2i" in (tmp_path / "report.md").read_text()
    capsys.readouterr()
    generate, done = Perfect(), []
    report = _evaluate(generate, out=tmp_path, progress=lambda *of: done.append(of), **options)
    assert {request["task"] for request in generate.requests} == {"i2i"} and done == [(3, 3)]
    assert report == _evaluate(Perfect(), **options)
    assert "has the same settings; kept as measured: t2i, s2i" in capsys.readouterr().err


def test_a_report_of_other_settings_is_replaced_only_where_that_is_asked_for(tmp_path, capsys):
    options = {"tasks": ["t2i"], "samples": 2, "out": tmp_path}
    written, asked = tmp_path / "report.json", Perfect()
    first = _evaluate(asked, **options, about={"precision": "fp32", "runs_on": "cpu"})
    asked.requests.clear()
    others = (
        ({"sketch_prompt": "none"}, "differs in sketch_prompt; give another folder, or --overwr"),
        ({"samples": 3}, "differs in samples;"),
        ({"about": {"precision": "int8", "runs_on": "cpu"}}, r"differs in about\.precision;"),
        ({"about": {"precision": "fp32"}}, r"differs in about\.runs_on;"),
        ({"about": {"precision": "int8", "files": {}}}, "precision, about.files, about.runs_on;"),
    )
    for other, message in others:
        with pytest.raises(ValueError, match=f"^{written} .*{message}"):
            _evaluate(asked, **{"about": first["about"]} | options | other)
        assert json.loads(written.read_text()) == first and not asked.requests
    about = {"precision": "int8"}
    second = _evaluate(asked, **options, about=about, overwrite=True)
    assert "differs in about.precision, about.runs_on and is replaced" in capsys.readouterr().err
    assert len(asked.requests) == 2 and json.loads(written.read_text()) == second
    assert second["about"] == about
    _evaluate(asked, **options, about=about, overwrite=True)
    assert len(asked.requests) == 2, "of the same settings it is kept"


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_report_that_cannot_be_read_is_replaced_only_where_that_is_asked_for(tmp_path, text):
    written = tmp_path / "report.json"
    written.write_text(text, errors="surrogateescape")
    asked = Perfect()
    with pytest.raises(ValueError, match=f"{written} .*; give another folder, or --overwrite"):
        _evaluate(asked, tasks=["t2i"], samples=2, out=tmp_path)
    assert not asked.requests and written.read_text(errors="surrogateescape") == text
    made = _evaluate(asked, tasks=["t2i"], samples=2, out=tmp_path, overwrite=True)
    assert json.loads(written.read_text()) == made


def test_a_bundle_is_the_same_by_its_files_whatever_its_name(tmp_path):
    """An export of the same day after has another hash, for its manifest has a date."""
    options = {"tasks": ["t2i"], "samples": 2, "out": tmp_path}
    about = {"bundle": "a", "bundle_hash": "1", "files": {"decoder.onnx": "ab"}}
    _evaluate(Perfect(), **options, about=about)
    renamed, asked = about | {"bundle": "b", "bundle_hash": "2"}, Perfect()
    made = _evaluate(asked, **options, about=renamed)
    assert not asked.requests and made["about"] == renamed
    assert json.loads((tmp_path / "report.json").read_text())["about"] == renamed
    with pytest.raises(ValueError, match=r"differs in about\.files;"):
        _evaluate(asked, **options, about=about | {"files": {"decoder.onnx": "cd"}})
    other = tmp_path / "other"
    _evaluate(asked, **options | {"out": other}, about={"bundle_hash": "1"})
    with pytest.raises(ValueError, match=r"differs in about\.bundle_hash;"):  # all that is known
        _evaluate(asked, **options | {"out": other}, about={"bundle_hash": "2"})


def test_long_clips_are_kept_and_remade_as_their_number_says(tmp_path):
    options = {"tasks": ["v2v"], "samples": 2, "out": tmp_path}
    first = _evaluate(Perfect(), long=2, **options)
    again = Perfect()
    assert _evaluate(again, long=2, **options) == first and not again.requests
    more = _evaluate(again, long=3, **options)
    assert len(again.requests) == 6 and more["long"]["v2v_long"]["samples"] == 3
    prompts = [bool(request["prompt"]) for request in again.requests]
    assert sorted(prompts) == [False] * 3 + [True] * 3
    assert all(" moving " not in request["prompt"] for request in again.requests)
    assert [bar["samples"] for bar in more["bars"] if bar["part"] == "v2v_long"] == [3] * 6


def test_a_folder_that_cannot_be_is_found_before_anything_is_asked(tmp_path):
    (tmp_path / "file").write_text("")
    generate = Perfect()
    with pytest.raises(ValueError, match="file cannot be written to: File exists"):
        _evaluate(generate, tasks=["t2i"], out=tmp_path / "file")
    assert not generate.requests


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


def _fidelity(monkeypatch):
    """Stands in for torch-fidelity: the squared distance of the means; the largest logit."""
    fid = types.SimpleNamespace(
        KEY_METRIC_FID="fid",
        fid_features_to_statistics=lambda features: features.mean(0),
        fid_statistics_to_metric=lambda a, b, verbose: {"fid": float(((a - b) ** 2).sum())},
    )

    def isc(logits, splits, shuffle):
        assert torch.is_tensor(logits) and splits == min(10, len(logits)) and shuffle
        return {"mean": float(logits.max())}

    module = types.ModuleType("torch_fidelity")
    module.metric_fid = fid
    module.metric_isc = types.SimpleNamespace(
        KEY_METRIC_ISC_MEAN="mean", isc_features_to_metric=isc
    )
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)


class ByColour:
    """Published metrics from networks that take mean colours for features."""

    files: dict = {}

    def collector(self):
        return published.Collector(
            published.Networks(
                inception=lambda pictures: (pictures.mean((1, 2)),) * 2,
                clip=lambda pictures, prompts: np.full(len(pictures), 0.25),
                i3d=lambda clips: clips.mean((1, 2, 3)),
            )
        )


def test_published_metrics_are_of_judged_frames_against_other_answers(monkeypatch):
    _fidelity(monkeypatch)
    monkeypatch.setattr("nuwa.training.evaluate.Published", lambda weights: ByColour())
    report = _evaluate(Perfect(), tasks=["t2v", "v2v"], samples=4)
    part = PARTS["v2v"]
    measured, reference = (
        np.concatenate([part.question(i).real[2:].mean((1, 2)) for i in indices])
        for indices in (range(4), range(4, 16))
    )
    scores = report["tasks"]["v2v"]["scores"]
    expected = np.square(measured.mean(0) - reference.mean(0)).sum()
    assert scores["FID-img"]["model"] == pytest.approx(expected) != 0
    assert scores["FID-img"]["real"] == scores["FID-img"]["model"]
    assert scores["FID-img"]["samples"] == 32 and "note" not in scores["FID-img"]
    assert scores["IS"]["model"] == pytest.approx(measured.max())
    assert "FVD" not in scores, "eight frames are too few"
    assert "CLIPSIM" not in scores, "nothing was said"
    scores = report["tasks"]["t2v"]["scores"]
    assert scores["FVD"]["model"] == scores["FVD"]["real"] > 0
    assert scores["CLIPSIM"]["model"] == scores["CLIPSIM"]["real"] == 0.25


def test_too_few_samples_for_a_covariance_are_noted(monkeypatch):
    _fidelity(monkeypatch)
    monkeypatch.setattr("nuwa.training.evaluate.Published", lambda weights: ByColour())
    report = _evaluate(Perfect(), tasks=["t2i"], samples=2)
    score = report["tasks"]["t2i"]["scores"]["FID"]
    assert score["note"].startswith("2 samples do not determine a covariance of 3 features")
    assert f"- t2i, FID: {score['note']}." in format_report(report)
