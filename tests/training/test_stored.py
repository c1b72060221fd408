"""Files that training finds again: whole or as before, made anew where they are of others."""

import json
import os

import numpy as np
import pytest
import torch

from nuwa.training import checkpoint, judge, pictures, ranker, stored
from nuwa.training.checkpoint import load_checkpoint, load_tokenizer, save_checkpoint
from nuwa.training.judge import Judge, ShapeNet
from nuwa.training.ranker import Ranker, RankerConfig, save_ranker
from nuwa.training.vqgan import VQGAN

from ..conftest import make_tiny_checkpoint
from .tiny import TINY_VQGAN


class Killed(BaseException):
    """What no writer expects."""


def half(*arguments, **more):
    """A library's writer that comes half way; its file is among what it gets."""
    target = next(each for each in arguments if isinstance(each, os.PathLike))
    with open(target, "wb") as file:
        file.write(b"half")
    raise Killed


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff", '"run"'])
def test_what_is_no_object_is_told_by_name(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=f"{path} "):
        stored.read_object(path)


def test_an_array_is_made_once_for_each_identity(tmp_path):
    path, made = tmp_path / "deep" / "clips.npy", []

    def make(value: int):
        def array():
            made.append(value)
            return np.full(3, value)

        return stored.stored(path, {"value": value}, array)

    assert make(1).tolist() == make(1).tolist() == [1, 1, 1] and made == [1]
    kept = make(1)
    assert make(2).tolist() == [2, 2, 2] and made == [1, 2]
    assert kept.tolist() == [1, 1, 1], "whoever maps the old file keeps it"
    path.with_suffix(".json").write_text("{")
    assert make(2).tolist() == [2, 2, 2] and made == [1, 2, 2]
    assert sorted(contents(path.parent)) == ["clips.json", "clips.npy"]


@pytest.mark.parametrize("writer", ["save", "write_object"])
def test_no_array_is_taken_for_another_after_a_kill(tmp_path, monkeypatch, writer):
    """Whether it comes while the array is written, or between it and what says of what it is."""

    def killed(*arguments, **more):
        raise Killed

    path = tmp_path / "clips.npy"
    stored.stored(path, {"of": "a"}, lambda: np.zeros(2))
    with monkeypatch.context() as patched:
        patched.setattr(np if writer == "save" else stored, writer, killed)
        with pytest.raises(Killed):
            stored.stored(path, {"of": "b"}, lambda: np.ones(2))
    assert sorted(contents(tmp_path)) == ["clips.npy"]
    assert stored.stored(path, {"of": "a"}, lambda: np.full(2, 7)).tolist() == [7, 7]


@pytest.mark.parametrize("kind", ["tokenizer", "ranker", "judge"])
def test_weights_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch, kind):
    torch.manual_seed(0)
    vqgan, scorer = VQGAN(TINY_VQGAN), Ranker(RankerConfig())
    module, write = {
        "tokenizer": (checkpoint, lambda: checkpoint.save_tokenizer(vqgan, tmp_path)),
        "ranker": (ranker, lambda: save_ranker(scorer, tmp_path)),
        "judge": (judge, lambda: Judge("digits", ShapeNet(10), {}).save(tmp_path)),
    }[kind]
    write()
    before = contents(tmp_path)
    monkeypatch.setattr(module, "save_file", half)
    with pytest.raises(Killed):
        write()
    after = contents(tmp_path)
    if kind == "ranker":  # the one that may be missing: without its .json there is none
        assert before.pop("ranker.json") and ranker.load_ranker(tmp_path) is None
    assert after == before


def test_a_picture_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "sheets" / "picture.png"
    pictures.save_png(path, np.zeros((4, 4, 3), np.uint8))
    before = contents(path.parent)
    monkeypatch.setattr("PIL.Image.Image.save", half)
    with pytest.raises(Killed):
        pictures.save_png(path, np.ones((4, 4, 3), np.uint8))
    assert contents(path.parent) == before


@pytest.mark.parametrize("failing", ["save_tokenizer", "_save_weights", "save_ranker"])
def test_a_checkpoint_that_is_half_replaced_is_not_taken_for_a_whole_one(
    tmp_path, monkeypatch, failing
):
    made = load_checkpoint(make_tiny_checkpoint(tmp_path))

    def killed(*arguments, **more):
        raise Killed

    monkeypatch.setattr(checkpoint, failing, killed)
    with pytest.raises(Killed):
        save_checkpoint(
            tmp_path,
            made.config,
            made.vqgan,
            made.nuwa,
            made.text_tokenizer,
            sketch_vqgan=made.sketch_vqgan,
            ranker=made.ranker,
        )
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load_checkpoint(tmp_path)


def test_a_text_tokenizer_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    made = load_checkpoint(make_tiny_checkpoint(tmp_path / "first"))
    path = tmp_path / "first" / "tokenizer.json"
    before = contents(path.parent)
    monkeypatch.setattr("pathlib.Path.write_text", half)
    with pytest.raises(Killed):
        made.text_tokenizer.save(path)
    assert contents(path.parent) == before


@pytest.mark.parametrize("name", ["image_tokenizer", "sketch_tokenizer"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": 3, "sizes": 4}, "unknown codes, sizes"),
        ({"channels": None, "resolution": None}, "missing channels, resolution"),
        ({"base_channels": 33}, "base_channels 33 is not a multiple of 32"),
        ({"resolution": "large"}, "describes no VQ-GAN: "),
    ],
)
def test_a_vqgans_config_is_told_by_file_and_field(tmp_path, name, change, message):
    make_tiny_checkpoint(tmp_path)
    path = tmp_path / f"{name}.json"
    data = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    for load in (lambda: load_tokenizer(tmp_path, name), lambda: load_checkpoint(tmp_path)):
        with pytest.raises(ValueError, match=f"{path} .*{message}"):
            load()


@pytest.mark.parametrize("name", ["config", "image_tokenizer", "sampling", "training"])
def test_a_json_of_a_checkpoint_that_cannot_be_read_is_told_by_name(tmp_path, name):
    path = make_tiny_checkpoint(tmp_path) / f"{name}.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=str(path)):
        load_checkpoint(tmp_path)
