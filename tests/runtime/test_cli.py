"""The command line over the fake engine: what it writes, prints, and says of mistakes."""

from __future__ import annotations

import importlib.metadata
import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from nuwa.runtime import cli, media
from nuwa.runtime.commands import evaluate
from nuwa.runtime.server import Server
from nuwa.spec.config import preset
from nuwa.spec.manifest import Manifest
from nuwa.spec.tasks import Task

from .fake_engine import FakeEngine, expected_pixels, expected_tokens


@pytest.fixture
def engine(monkeypatch):
    """What `load_engine` gives; its arguments are noted in `engine.loaded`."""
    engine = FakeEngine()
    engine.loaded = []
    module = types.ModuleType("nuwa.runtime.engine")

    def load_engine(bundle, *, slots=1, threads=None, backend="auto"):
        engine.loaded.append((str(bundle), slots, threads))
        return engine

    module.load_engine = load_engine
    monkeypatch.setitem(sys.modules, "nuwa.runtime.engine", module)
    return engine


def clip(seed: int, frames: int) -> np.ndarray:
    return np.stack([expected_pixels(expected_tokens(seed, index)) for index in range(frames)])


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_generate_writes_a_clip(engine, tmp_path, capsys):
    out = tmp_path / "clip.webp"
    words = ["generate", "b", "--task", "t2v", "--prompt", "a 3", "--out", out, "--frames", 3]
    knobs = ["--temperature", 0.5, "--top-k", 4, "--top-p", 0.9, "--guidance-scale", 2]
    assert run(*words, *knobs, "--seed", 5, "--scale", 2, "--threads", 2) == 0
    np.testing.assert_array_equal(media.decode_clip(out.read_bytes()), media.upscale(clip(5, 3), 2))
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{out}: 3 frames of 16 x 16, seed 5, ")
    assert printed.err == "", "no progress bar where nobody looks"
    assert engine.loaded == [("b", 1, 2)]
    sampling = engine.admitted[0].sampling
    values = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.guidance_scale)
    assert values == (0.5, 4, 0.9, 2.0)


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "PNG"])
def test_generate_writes_an_image(engine, tmp_path, suffix):
    out = tmp_path / f"three.{suffix}"
    assert run("generate", "b", "--task", "T2I", "--prompt", "a 3", "--seed", 1, "--out", out) == 0
    np.testing.assert_array_equal(media.decode_clip(out.read_bytes()), clip(1, 1))


def test_generate_asks_a_server(tmp_path, capsys):
    out = tmp_path / "clip.gif"
    with Server(FakeEngine()) as server:
        words = ["--task", "t2v", "--prompt", "a 3", "--seed", 1, "--frames", 2, "--out", out]
        assert run("generate", "--server", server.address, *words) == 0
        np.testing.assert_array_equal(media.decode_clip(out.read_bytes()), clip(1, 2))
        assert run("generate", "--server", server.address, *words, "--top-p", 3) == 2
    assert "nuwa generate: error: top_p 3.0 is not in (0, 1]" in capsys.readouterr().err


def test_generate_writes_every_sample(engine, tmp_path, capsys):
    out = tmp_path / "three.png"
    words = ["generate", "b", "--task", "t2i", "--prompt", "a 3", "--seed", 7, "--samples", 3]
    assert run(*words, "--out", out) == 0
    paths = [out, tmp_path / "three-2.png", tmp_path / "three-3.png"]
    for index, path in enumerate(paths):
        np.testing.assert_array_equal(media.decode_clip(path.read_bytes()), clip(7 + index, 1))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [f"{path}: sample {index}" for index, path in enumerate(paths)]
    assert engine.loaded == [("b", 3, None)], "samples are decoded side by side"


def test_generate_writes_the_best_first(engine, tmp_path, capsys):
    # The first tokens are 510, 511, 0, 1.
    words = ["generate", "b", "--task", "t2v", "--prompt", "a 3", "--seed", 510, "--frames", 2]
    ranked = ["--samples", 4, "--rank-by", "first"]
    assert run(*words, *ranked, "--out", tmp_path / "best.webp") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["best.webp"]
    assert run(*words, *ranked, "--return", 2, "--out", tmp_path / "best.webp") == 0
    for name, seed in (("best.webp", 511), ("best-2.webp", 510)):
        written = media.decode_clip((tmp_path / name).read_bytes())
        np.testing.assert_array_equal(written, clip(seed, 2))
    lines = capsys.readouterr().out.splitlines()
    assert "ranked in" in lines[2]
    assert lines[3] == f"{tmp_path / 'best.webp'}: sample 1, score 511.0000"
    assert lines[4] == f"{tmp_path / 'best-2.webp'}: sample 0, score 510.0000"


def test_generate_predicts_beyond_the_models_length(engine, tmp_path):
    given, out = tmp_path / "given.webp", tmp_path / "long.webp"
    given.write_bytes(media.encode_animation(clip(3, 2), "webp"))
    words = ["--task", "v2v", "--video", given, "--frames", 30, "--seed", 3, "--out", out]
    assert run("generate", "b", *words) == 0
    np.testing.assert_array_equal(media.decode_clip(out.read_bytes()), clip(3, 30))


def test_help_shows_every_task(capsys):
    assert run("generate", "--help") == 0
    examples = capsys.readouterr().out.split("examples:")[1]
    for task in Task:
        assert f"--task {task} " in examples
    assert ".gif" not in examples, "a .gif does not keep given pixels"


def test_generate_takes_files_and_boxes(engine, tmp_path):
    picture = np.full((8, 8, 3), 200, np.uint8)
    still, moving = tmp_path / "still.png", tmp_path / "moving.webp"
    still.write_bytes(media.encode_picture(picture, "png"))
    moving.write_bytes(media.encode_animation(np.stack([picture] * 6), "webp"))
    drawing = tmp_path / "drawing.webp"
    drawing.write_bytes(media.encode_animation(np.full((6, 8, 8, 3), 4, np.uint8), "webp"))
    image, video = tmp_path / "out.png", tmp_path / "out.webp"
    assert (
        run("generate", "b", "--task", "i2i", "--image", still, "--mask", still, "--out", image)
        == 0
    )
    boxes = ["--box", "0,0,2,2", "--box", "7,7,1,1"]
    words = ["--task", "tv2v", "--prompt", "a 3", "--video", moving, "--out", video]
    assert run("generate", "b", *words, *boxes) == 0
    assert run("generate", "b", "--task", "s2v", "--sketch", drawing, "--out", video) == 0
    words = ["--task", "v2v", "--video", moving, "--keep", 4, "--frames", 7, "--out", video]
    assert run("generate", "b", *words, "--schedule", "raster", "--sample-index", 3) == 0
    completion, edit, drawn, predicted = engine.admitted
    assert completion.mask.all() and edit.mask.sum() == 5
    assert len(edit.frames) == 6 and drawn.sketch.shape == (6, 8, 8) and (drawn.sketch == 4).all()
    assert len(predicted.frames) == 4 and predicted.frame_count == 7
    assert (predicted.schedule, predicted.sample_index) == ("raster", 3)


def test_generate_goes_on_from_either_end_of_a_long_clip(engine, tmp_path):
    frames = np.zeros((300, 8, 8, 3), np.uint8)
    frames[..., 0] = (np.arange(300) % 256)[:, None, None]
    frames[256:, ..., 1] = 1
    given, out = tmp_path / "long.webp", tmp_path / "out.webp"
    given.write_bytes(media.encode_animation(frames, "webp"))
    words = ["generate", "b", "--task", "v2v", "--video", given, "--out", out]
    assert run(*words, "--keep", 3) == run(*words, "--keep-last", 2) == 0
    first, last = (request.frames for request in engine.admitted)
    np.testing.assert_array_equal(first, frames[:3])
    np.testing.assert_array_equal(last, frames[-2:])


def test_generate_tells_that_a_gif_may_change_given_pixels(engine, tmp_path, capsys):
    picture = tmp_path / "given.png"
    picture.write_bytes(media.encode_picture(clip(1, 1)[0], "png"))
    words = ["generate", "b", "--task", "i2i", "--image", picture, "--box", "0,0,2,2", "--out"]
    assert run(*words, tmp_path / "x.gif") == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "given pixels may change" in error
    assert run(*words, tmp_path / "x.png") == 0 and capsys.readouterr().err == ""
    words = ["generate", "b", "--task", "t2i", "--prompt", "a 3", "--out", tmp_path / "x.gif"]
    assert run(*words) == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("b --task t2v --prompt a --out x.png", "clips end in .webp or .gif"),
        ("b --task t2i --prompt a --out x.mp4", "images end in .png or .webp or .gif"),
        ("b --task t2i --prompt a --out no/such/x.png", "there is no folder no/such"),
        ("b --task t2x --out x.png", "unknown task 't2x'; choose one of t2i"),
        ("b --task t2i --out x.png", "prompt is empty; task T2I needs one"),
        ("b --task t2i --prompt refused --out x.png", "'refused' is refused"),
        ("b --task s2i --out x.png", "this bundle cannot do S2I; it can do T2I"),
        ("b --task t2i --prompt a --scale 9 --out x.png", "--scale 9 is not in [1, 8]"),
        ("b --task t2v --prompt a --fps 0 --out x.gif", "--fps 0 is not in [1, 50]"),
        ("b --task t2v --prompt a --frames 99 --out x.gif", "frame_count 99 is not in [1, 10]"),
        ("b --task t2i --prompt a --frames 2 --out x.png", "task t2i takes no --frames"),
        ("b --task t2v --prompt a --image i.png --out x.gif", "task t2v takes no --image"),
        ("b --task i2i --image no.png --box 0,0,1,1 --out x.png", "no.png: No such file"),
        ("b --task t2v --prompt a --keep 2 --out x.gif", "--keep needs --video"),
        ("b --task t2v --prompt a --keep-last 2 --out x.gif", "--keep-last needs --video"),
        ("b --task v2v --video v --keep 2 --keep-last 2 --out x.gif", "not allowed with"),
        ("b --task t2i --prompt a --mask m --box 0,0,1,1 --out x.png", "not both"),
        ("b --task t2i --prompt a --box 1,2 --out x.png", "is not LEFT,TOP,WIDTH,HEIGHT"),
        ("b --task t2i --prompt a --seed -1 --out x.png", "seed -1 is not in"),
        ("b --task t2i --prompt a --top-k 99999999999 --out x.png", "top_k 99999999999"),
        ("b --task t2i --prompt a --threads 0 --out x.png", "0 is not at least 1"),
        ("b --task t2i --prompt a --samples 65 --out x.png", "sample_count 65 is not in [1, 64]"),
        ("b --task t2i --prompt a --samples 0 --out x.png", "sample_count 0 is not in [1, 64]"),
        ("b --task t2i --prompt a --rank-by best --out x.png", "'best'; choose one of first"),
        ("b --task t2i --prompt a --return 2 --out x.png", "return_count 2 is not in [1, 1]"),
        ("b --task t2i --prompt a --samples 2 --return 1 --out x.png", "needs rank_by to choose"),
        ("--task t2i --prompt a --out x.png", "name either a bundle or --server"),
        ("b --server h:1 --task t2i --prompt a --out x.png", "name either a bundle or --server"),
        ("b --task t2i", "the following arguments are required: --out"),
        ("b --task t2i --prompt a --out .", "images end in"),
        ("b --task t2i --prompt a --fps 9 --out x.png", "task t2i takes no --fps"),
        ("b --task t2i --prompt a --deadline -1 --out x.png", "deadline -1.0 is not a number of"),
        ("b --task t2i --prompt a --deadline nan --out x.png", "deadline nan is not a number of"),
        ("b --task t2i --prompt \udce9 --out x.png", "'\\udce9' is not valid Unicode"),
        ("b --task t2i --prompt a --tls --tls-ca c --out x.png", "--tls, --tls-ca: of --server"),
        ("--server h:1 --task t2i --threads 2 --out x.png", "--threads: of a bundle, and a server"),
        ("--server http://h:1 --task t2i --prompt a --out x.png", "'http://h:1' is a URL; name"),
        (f"--server h:1 --tls-ca {__file__} --task t2i --out x.png", "has no certificate"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_file(
    engine, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    assert run("generate", *words.split()) == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith("nuwa generate: error: ") and message in last, error
    assert "Traceback" not in error and list(tmp_path.iterdir()) == []


def test_a_folder_is_no_output(engine, tmp_path, capsys):
    (tmp_path / "x.png").mkdir()
    words = ["b", "--task", "t2i", "--prompt", "a 3", "--out", tmp_path / "x.png"]
    assert run("generate", *words) == 2
    assert "x.png is a folder; name a file in it" in capsys.readouterr().err
    assert not engine.admitted


def test_a_deadline_bounds_the_wait_for_a_server(tmp_path, capsys):
    words = ["--server", "127.0.0.1:1", "--task", "t2i", "--prompt", "a 3", "--deadline", 0.3]
    assert run("generate", *words, "--out", tmp_path / "x.png") == 2
    assert "within 0.3 s; one that wants TLS would not either" in capsys.readouterr().err


def test_debug_shows_where_an_error_comes_from(engine, tmp_path):
    with pytest.raises(ValueError, match="prompt is empty"):
        run("generate", "b", "--task", "t2i", "--out", tmp_path / "x.png", "--debug")


def test_faults_that_are_ours_keep_their_traceback(engine, tmp_path):
    engine.step_error = ZeroDivisionError("a bug")
    with pytest.raises(RuntimeError, match="engine failed while decoding"):
        run("generate", "b", "--task", "t2i", "--prompt", "a", "--out", tmp_path / "x.png")


def test_ctrl_c_is_quiet(monkeypatch, engine, tmp_path, capsys):
    def interrupt(request):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "check", interrupt)
    words = ["--task", "t2i", "--prompt", "a", "--out", tmp_path / "x.png"]
    assert run("generate", "b", *words) == 130
    assert capsys.readouterr().err == ""


@pytest.fixture
def bundle(monkeypatch, tmp_path):
    """A manifest as export writes it, and one file."""
    (tmp_path / "decoder_step.onnx").write_bytes(bytes(2_500_000))
    manifest = Manifest(
        name="sprites",
        config=preset("sprites"),
        tasks=(Task.T2I, Task.T2V, Task.V2V),
        precision="fp32",
        opset=18,
        cache_entries=640,
        files={"decoder_step.onnx": "ab" * 32},
        parity={"decoder_step": {"max_abs": 1e-6}},
        parameter_count=5_000_000,
        licence="CC0-1.0",
        training_data="sprites",
        created="2026-01-01T00:00:00Z",
        rankers=("clip",),
    )
    opened = types.SimpleNamespace(path=tmp_path, manifest=manifest, hash="cd" * 32)
    monkeypatch.setattr("nuwa.runtime.bundle.open_bundle", lambda path: opened)
    return manifest


def test_inspect_is_readable(bundle, tmp_path, capsys):
    assert run("inspect", tmp_path) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["name"] == "sprites" and lines["tasks"] == "t2i, t2v, v2v"
    assert (
        lines["parameter_count"] == "5 000 000" and lines["parity.decoder_step.max_abs"] == "1e-06"
    )
    assert lines["bundle"].endswith("cd" * 32)
    assert "2.50 MB  sha256 abababababababab" in lines["file"]
    assert any(name.startswith("config.") for name in lines)
    assert lines["sketch_classes"] == "21" and lines["max_predicted_frames"] == "1 000"
    assert lines["rankers"] == "clip"


def test_inspect_json_is_the_manifest(bundle, tmp_path, capsys):
    assert run("inspect", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(bundle.to_json())


def test_inspect_of_no_bundle(tmp_path, capsys):
    assert run("inspect", tmp_path) == 2
    assert "nuwa inspect: error: " in capsys.readouterr().err


class Evaluator:
    """Calls `generate` once a task and reports what it got."""

    holds: bool | None = False  # its one bar

    def __call__(
        self,
        generate,
        *,
        tasks,
        split,
        samples,
        seed,
        level="digits",
        out=None,
        progress=None,
        reconstruct=None,
        concurrency=1,
        about=None,
        ranking=None,
        long=0,
    ):
        self.options = (split, samples, seed, level, out)
        self.concurrency, self.about, self.ranking, self.long = concurrency, about, ranking, long
        self.reconstructed = reconstruct(clip(5, 2))
        self.results = {}
        for index, name in enumerate(tasks):
            task = Task(name)
            count = 10 if task.is_video else 1
            self.results[name] = generate(
                task=name,
                prompt="" if task in (Task.V2V, Task.I2I) else "a 3",
                frame_count=count,
                seed=seed,
                frames=clip(0, 4 if task is Task.V2V else count) if task.needs_frames else None,
                mask=np.eye(8, dtype=bool) if task.needs_mask else None,
                sketch=np.full((count, 8, 8), 2, np.uint8) if task.needs_sketch else None,
            )
            progress(index + 1, len(tasks))
        return {
            "tasks": {
                task: {"scores": {"class": {"model": 0.5, "low": None, "intervals": {}}}}
                for task in tasks
            },
            "bars": [
                {
                    "part": "t2v",
                    "bar": "class >= 0.9",
                    "value": 0.5,
                    "margin_low": -0.5,
                    "margin_high": None,
                    "samples": samples,
                    "holds": self.holds,
                    "verdict": "does what it does",
                }
            ],
        }


@pytest.fixture
def evaluator(monkeypatch):
    evaluator = Evaluator()
    monkeypatch.setattr(evaluate, "load_evaluator", lambda name: evaluator)
    manifest = types.SimpleNamespace(files={"decoder_step.onnx": "ab" * 32})
    monkeypatch.setattr(
        "nuwa.runtime.bundle.open_bundle",
        lambda path, verify: types.SimpleNamespace(manifest=manifest),
    )
    return evaluator


def test_evaluate_hands_the_engine_to_the_evaluator(engine, evaluator, tmp_path, capsys):
    words = ["--tasks", "t2i,t2v,v2v", "--samples", 8, "--seed", 3, "--split", "novel"]
    assert run("evaluate", "b", *words, "--out", tmp_path, "--top-k", 2, "--set", "level=full") == 0
    assert evaluator.options == ("novel", 8, 3, "full", tmp_path)
    np.testing.assert_array_equal(evaluator.results["t2i"], clip(3, 1))
    # The four given frames come back as they were given.
    np.testing.assert_array_equal(evaluator.results["v2v"][:4], clip(0, 4))
    np.testing.assert_array_equal(evaluator.results["v2v"][4:], clip(3, 10)[4:])
    np.testing.assert_array_equal(evaluator.reconstructed, clip(5, 2))
    assert all(request.sampling.top_k == 2 for request in engine.admitted)
    assert evaluator.concurrency == 16 and engine.loaded == [("b", 8, None)]
    printed = capsys.readouterr().out
    assert "t2v   class            model 0.500  low -\n" in printed
    bar = "t2v   class >= 0.9: 0.500 (margin -0.500 .. -, 8 samples) does what it does"
    assert bar in printed
    assert evaluator.about["files"] == {"decoder_step.onnx": "ab" * 32}


class Overwriting(Evaluator):
    def __call__(self, generate, *, overwrite=False, **options):
        self.overwrite = overwrite
        return super().__call__(generate, **options)


def test_an_evaluator_is_told_to_overwrite(engine, evaluator, monkeypatch):
    overwriting = Overwriting()
    monkeypatch.setattr(evaluate, "load_evaluator", lambda name: overwriting)
    for words in ([], ["--overwrite"]):
        assert run("evaluate", "b", "--tasks", "t2i", *words) == 0
        assert overwriting.overwrite == bool(words)


def test_evaluate_gives_every_task_what_it_takes(engine, evaluator, tmp_path):
    assert run("evaluate", "b", "--seed", 4, "--long", 2) == 0
    assert [str(each.task) for each in engine.admitted] == list(evaluator.results)
    assert set(evaluator.results) == {str(task) for task in engine.info.tasks}, "all by default"
    requests = {each.task: each for each in engine.admitted}
    assert requests[Task.TV2V].mask.sum() == 8 and len(requests[Task.TV2V].frames) == 10
    assert requests[Task.S2V].sketch.shape == (10, 8, 8) and requests[Task.S2V].prompt == "a 3"
    completed = evaluator.results["i2i"]
    known = ~np.eye(8, dtype=bool)
    np.testing.assert_array_equal(completed[0][known], clip(0, 1)[0][known])
    assert evaluator.long == 2 and evaluator.about["bundle_hash"] == "0" * 64


def test_evaluate_scores_the_best_of_several(engine, evaluator, capsys):
    # The first tokens of the four samples are 510, 511, 0, 1.
    words = ["--tasks", "t2i,i2i", "--seed", 510]
    assert run("evaluate", "b", *words, "--samples-per-prompt", 4, "--rank-by", "first") == 0
    np.testing.assert_array_equal(evaluator.results["t2i"], clip(511, 1))
    assert [each.task for each in engine.admitted].count(Task.I2I) == 1, "no prompt, no ranking"
    assert evaluator.ranking == {"samples": 4, "rank_by": "first"}
    assert run("evaluate", "b", "--tasks", "t2i") == 0
    assert evaluator.ranking is None


def test_evaluate_prints_json(engine, evaluator, capsys):
    assert run("evaluate", "b", "--json", "--tasks", "t2i,t2v") == 0
    assert set(json.loads(capsys.readouterr().out)["tasks"]) == {"t2i", "t2v"}
    assert evaluator.options == ("test", 1024, 0, "digits", None)


def test_evaluate_asks_a_task_that_is_named_twice_once(engine, evaluator):
    assert run("evaluate", "b", "--tasks", "t2v,t2i,t2v, t2i") == 0
    assert [str(each.task) for each in engine.admitted] == ["t2v", "t2i"]


def test_only_strict_evaluation_fails_where_a_bar_does_not_hold(engine, evaluator):
    assert run("evaluate", "b", "--tasks", "t2i") == 0
    assert run("evaluate", "b", "--tasks", "t2i", "--strict") == 1
    for evaluator.holds in (True, None):
        assert run("evaluate", "b", "--tasks", "t2i", "--strict") == 0


def test_seeds_may_go_up_to_the_largest(engine, evaluator):
    assert run("evaluate", "b", "--tasks", "t2i", "--samples", 2, "--seed", 2**63 - 2) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("b --set colour=red", "--set colour: evaluator 'sprites' has no option 'colour'; it has "),
        ("b --set samples=3", "has no option 'samples'; it has level"),
        ("b --set out=here", "has no option 'out'; it has level"),
        ("b --set long=3", "has no option 'long'; it has level"),
        ("b --seed -1", "--seed -1 with 1024 samples: seeds -1 to 1022 are not all in [0, "),
        (f"b --samples 2 --seed {2**63 - 1}", f"to {2**63} are not all in [0, {2**63 - 1}]"),
        (f"b --samples 2 --long 3 --seed {2**63 - 2}", "are not all in [0, "),
        ("b --set colour", "is not NAME=VALUE"),
        ("b --tasks t2i,t2w", "unknown task 't2w'"),
        ("b --tasks=", "unknown task ''; choose one of t2i, "),
        ("b --overwrite", "evaluator 'sprites' has no use for --overwrite"),
        ("b --samples 0", "0 is not at least 1"),
        ("b --samples-per-prompt 4", "--samples-per-prompt (above 1) and --rank-by go together"),
        ("b --rank-by first", "--samples-per-prompt (above 1) and --rank-by go together"),
        ("b --samples-per-prompt 4 --rank-by best", "'best' is not one of the bundle's rankers"),
        ("b --i3d-weights i3d.pt", "evaluator 'sprites' has no use for weight files"),
        ("b --samples many", "invalid whole number value: 'many'"),
    ],
)
def test_mistakes_of_evaluate(engine, evaluator, capsys, words, message):
    assert run("evaluate", *words.split()) == 2
    assert message in capsys.readouterr().err


def test_evaluators_that_are_not_there(capsys, engine, monkeypatch):
    assert run("evaluate", "b", "--evaluator", "nothing") == 2
    assert "there is no evaluator 'nothing'; installed: " in capsys.readouterr().err
    entry = importlib.metadata.EntryPoint("broken", "no_such_module:f", evaluate.GROUP)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [entry])
    assert run("evaluate", "b", "--evaluator", "broken") == 2
    assert "needs no_such_module; install it with: pip install" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*cli.BUILT_IN])
def test_every_command_explains_itself_with_examples(name, capsys):
    assert run(name, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: nuwa {name}") and "examples:" in text
    assert f"nuwa {name} " in text.split("examples:")[1]


def test_the_overview_names_every_command(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    for name in (*cli.BUILT_IN, "train", "export"):
        assert f"\n  {name} " in text
    assert run() == 2
    assert "usage: nuwa COMMAND" in capsys.readouterr().err


def test_unknown_commands(capsys):
    assert run("paint") == 2
    assert "nuwa paint: error: there is no such command; choose one of generate" in (
        capsys.readouterr().err
    )


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("nuwa-runtime ")


def entry_points(monkeypatch, value: str) -> None:
    entry = importlib.metadata.EntryPoint("train", value, cli.GROUP)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [entry])


def test_commands_of_other_folders(monkeypatch, capsys):
    module = types.ModuleType("elsewhere")

    def command(parser):
        parser.add_argument("--steps", type=int)

        def run(args):
            if args.steps == 0:
                import no_such_torch  # noqa: F401
            return args.steps

        return run

    module.command = command
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    entry_points(monkeypatch, "elsewhere:command")
    assert run("train", "--steps", 7) == 7
    assert run("train", "--steps", 0) == 2
    wanted = (
        "nuwa train: error: needs no_such_torch; install it with: pip install 'nuwa-runtime[train]'"
    )
    assert wanted in capsys.readouterr().err


def test_commands_whose_module_needs_what_is_missing(monkeypatch, capsys):
    entry_points(monkeypatch, "no_such_torch.cli:command")
    assert run("train") == 2
    assert "needs no_such_torch; install it with: pip install 'nuwa-runtime[train]'" in (
        capsys.readouterr().err
    )
    entry_points(monkeypatch, "nuwa.no_such_part:command")
    assert run("train") == 2
    assert "nuwa.no_such_part is missing from this installation" in capsys.readouterr().err


def test_python_m_is_the_command():
    command = [sys.executable, "-m", "nuwa.runtime", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("nuwa-runtime ")


SERVE = """
import sys, types
from tests.runtime.fake_engine import FakeEngine
module = types.ModuleType("nuwa.runtime.engine")
module.load_engine = lambda bundle, *, slots, threads, backend: FakeEngine(slots)
sys.modules["nuwa.runtime.engine"] = module
from nuwa.runtime.cli import main
sys.exit(main(["serve", "b", "--port", "0", "--slots", "3", "--queue-size", "5"]))
"""


@pytest.fixture
def serving(request):
    command = [sys.executable, "-c", SERVE]
    root = request.config.rootpath
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def test_serve_serves_until_told_to_stop(serving, tmp_path):
    line = serving.stdout.readline()
    assert line.startswith("nuwa: ready on 127.0.0.1:"), serving.stderr.read()
    out = tmp_path / "x.png"
    words = ["--task", "t2i", "--prompt", "a", "--out", out]
    assert run("generate", "--server", line.split()[3].rstrip(":"), *words) == 0
    serving.send_signal(signal.SIGTERM)
    assert serving.wait(20) == 0
    errors = serving.stderr.read()
    assert "t2i: 1 frames, 4 steps" in errors and "Traceback" not in errors
    assert out.exists()


SLOW_LOAD = SERVE.replace("FakeEngine(slots)\n", "time.sleep(60)\n").replace("sys, ", "sys, time, ")


def test_serve_ends_at_once_when_told_so_while_it_loads(request):
    root = request.config.rootpath
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_LOAD], cwd=root, stderr=subprocess.PIPE, text=True
    ) as process:
        started = time.monotonic()
        while time.monotonic() - started < 20:
            time.sleep(0.2)
            try:  # until its handler is there, the signal would just kill it
                caught = f"/proc/{process.pid}/status"
                bits = int(Path(caught).read_text().split("SigCgt:")[1].split()[0], 16)
            except (OSError, IndexError):
                break
            if bits >> (signal.SIGTERM - 1) & 1:
                break
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(20) == 0
        assert time.monotonic() - started < 10
        assert "ends while loading" in process.stderr.read()


def test_serve_tells_of_a_taken_port(engine, capsys):
    with Server(FakeEngine()) as server:
        assert run("serve", "b", "--port", server.address.rpartition(":")[2]) == 2
    assert "nuwa serve: error: cannot listen on 127.0.0.1:" in capsys.readouterr().err
