"""The ranker: shapes, its graph, its files, its loss worked out by hand, and that it learns."""

import dataclasses
import json

import numpy as np
import onnxruntime
import pytest
import torch
from torch.export import Dim

from nuwa.spec.config import TextConfig
from nuwa.training.ranker import (
    CONFIG,
    WEIGHTS,
    Ranker,
    RankerConfig,
    load_ranker,
    save_ranker,
    tokenizer_digest,
)
from nuwa.training.ranker_batches import (
    CLIP_FACTORS,
    Captions,
    damage,
    one_changed,
    reconstructions,
)
from nuwa.training.ranker_retrieval import retrieval
from nuwa.training.sprites.world import Factors, SpriteWorld
from nuwa.training.text import train_text_tokenizer
from nuwa.training.train_ranker import RankerOptions, RankerRecipe, contrast
from nuwa.training.trainer import TrainerOptions, train
from nuwa.training.vqgan import VQGAN

from .tiny import TINY_VQGAN

SENTENCE = "a red 3 on a black background moving left then right ."


@pytest.fixture(scope="module")
def tokenizer():
    return train_text_tokenizer([SENTENCE], 300, length=32)


@pytest.fixture(scope="module")
def config(tokenizer):
    text = TextConfig(
        vocabulary_size=tokenizer.vocabulary_size,
        length=tokenizer.length,
        width=32,
        layers=1,
        heads=2,
        mask_padding=True,
    )
    return RankerConfig(
        text=text,
        widths=(8, 16, 24),
        blocks=1,
        places=2,
        width=24,
        embedding=16,
        tokenizer=tokenizer_digest(tokenizer),
    )


@pytest.fixture
def ranker(config):
    torch.manual_seed(0)
    return Ranker(config).eval()


def ids(tokenizer, text=SENTENCE) -> torch.Tensor:
    return torch.from_numpy(tokenizer.encode(text))


def noise(*shape) -> torch.Tensor:
    return torch.randint(256, (*shape, 64, 64, 3), dtype=torch.uint8)


def options(**changed) -> RankerOptions:
    small = RankerOptions(images=12, clips=4, reconstructed=0, validate_every=1000, bf16=False)
    return dataclasses.replace(small, **changed)


@pytest.mark.parametrize("frames", [1, 2, 10, 40])
@torch.no_grad()
def test_one_pair_scores_as_in_a_batch(ranker, tokenizer, frames):
    captions = [SENTENCE, "a blue 5 .", ""]
    texts = torch.stack([ids(tokenizer, caption) for caption in captions])
    pictures = noise(3, frames)
    together = ranker.embed_texts(texts) @ ranker.embed_pictures(pictures).t()
    assert together.shape == (3, 3)
    for t in range(3):
        for p in range(3):
            score = ranker(texts[t], pictures[p])
            assert score.shape == () and score.dtype == torch.float32
            assert -1.0001 <= float(score) <= 1.0001
            torch.testing.assert_close(score, together[t, p], atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_does_not_change_a_text(ranker, tokenizer):
    row = ids(tokenizer)
    cut = row[: tokenizer.used(row.numpy())]
    assert len(cut) < len(row)
    whole, short = ranker.embed_texts(row[None]), ranker.embed_texts(cut[None])
    torch.testing.assert_close(whole, short, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_order_of_words_counts_from_the_start(ranker, tokenizer):
    swapped = SENTENCE.replace("left then right", "right then left")
    first, second = ranker.embed_texts(
        torch.stack([ids(tokenizer, t) for t in (SENTENCE, swapped)])
    )
    assert float(first @ second) < 0.999


@torch.no_grad()
def test_the_order_of_frames_counts(ranker, tokenizer):
    clip = noise(10)
    forward, backward = ranker(ids(tokenizer), clip), ranker(ids(tokenizer), clip.flip(0))
    assert abs(float(forward - backward)) > 1e-5


def test_onnx_with_any_number_of_frames(ranker, tokenizer, tmp_path):
    path = tmp_path / "ranker.onnx"
    torch.onnx.export(
        ranker,
        (ids(tokenizer), noise(3)),
        path,
        dynamo=True,
        opset_version=20,
        input_names=["tokens", "frames"],
        output_names=["score"],
        dynamic_shapes=({}, {0: Dim("F", min=1)}),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(i.name, i.type) for i in session.get_inputs()] == [
        ("tokens", "tensor(int32)"),
        ("frames", "tensor(uint8)"),
    ]
    for count in (1, 2, 10, 100):
        frames = noise(count)
        feeds = {"tokens": ids(tokenizer).numpy(), "frames": frames.numpy()}
        (score,) = session.run(["score"], feeds)
        with torch.no_grad():
            expected = float(ranker(ids(tokenizer), frames))
        assert score.shape == () and score.dtype == np.float32
        assert float(score) == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_saved_and_loaded(ranker, tokenizer, tmp_path):
    assert load_ranker(tmp_path) is None
    ranker.training_record = {"steps": 7}
    tokenizer.save(tmp_path / "tokenizer.json")
    save_ranker(ranker, tmp_path)
    loaded = load_ranker(tmp_path)
    assert loaded.config == ranker.config
    assert loaded.training_record == {"steps": 7}
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    clip = noise(4)
    score, again = ranker(ids(tokenizer), clip), loaded(ids(tokenizer), clip)
    torch.testing.assert_close(score, again, atol=5e-3, rtol=0)  # stored as fp16


def test_broken_folders_are_named(ranker, tmp_path):
    save_ranker(ranker, tmp_path)
    weights, config = tmp_path / WEIGHTS, tmp_path / CONFIG
    whole = config.read_text()
    train_text_tokenizer(["other words"], 300, length=24).save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="trained on another text tokenizer"):
        load_ranker(tmp_path)
    (tmp_path / "tokenizer.json").unlink()

    data = json.loads(whole)
    data["config"]["embedding"] = 8
    config.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"ranker\.safetensors does not fit"):
        load_ranker(tmp_path)
    for text in ("[", "{}", '{"format": "nuwa-ranker/9"}', whole.replace('"blocks"', '"bricks"')):
        config.write_text(text)
        with pytest.raises(ValueError, match=r"ranker\.json describes no ranker"):
            load_ranker(tmp_path)
    config.write_text(whole)
    weights.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_ranker(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"ranker\.safetensors is missing"):
        load_ranker(tmp_path)


def test_impossible_settings_are_refused(config, ranker):
    with pytest.raises(ValueError, match="resolution 60 is not a multiple of 8"):
        dataclasses.replace(config, resolution=60)
    with pytest.raises(ValueError, match="widths is empty"):
        dataclasses.replace(config, widths=())
    with pytest.raises(ValueError, match="places 0"):
        dataclasses.replace(config, places=0)
    with pytest.raises(ValueError, match="mask_padding"):
        dataclasses.replace(config, text=TextConfig())
    for name, value in (("images", 1), ("negatives", -1), ("damage", 1.5), ("validate_every", 0)):
        with pytest.raises(ValueError, match=f"{name} {value}"):
            options(**{name: value})
    with pytest.raises(ValueError, match=r"\(32, 32, 3\).*\(64, 64, 3\)"):
        ranker.embed_pictures(torch.zeros(1, 2, 32, 32, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="factor 'size' is not one of class, colour"):
        one_changed(SpriteWorld("full", "train").factors(0), "size", SpriteWorld("full", "train"))


def test_changed_captions_differ_in_one_factor():
    world = SpriteWorld("full", "train")
    counts = {"class": 19, "colour": 7, "background": 3, "motion": 7}
    for own in (world.factors(i) for i in range(20)):
        for name in CLIP_FACTORS:
            changed = one_changed(own, name, world)
            assert len({c.video_caption for c in changed}) == counts[name]
            field = "class_index" if name == "class" else name
            for one in changed:
                assert getattr(one, field) != getattr(own, field)
                assert dataclasses.replace(one, **{field: getattr(own, field)}) == own


def test_training_never_calls_a_novel_caption_wrong():
    world = SpriteWorld("full", "train")
    novel = set(SpriteWorld("full", "novel").pairs)
    met = 0
    for own in (world.factors(i) for i in range(60)):
        for name in ("class", "motion"):
            everything = one_changed(own, name, world)
            kept = one_changed(own, name, world, trained=True)
            dropped = [one for one in everything if one not in kept]
            assert all((one.class_index, one.motion) in novel for one in dropped)
            assert not any((one.class_index, one.motion) in novel for one in kept)
            met += len(dropped)
    assert met > 0


def test_the_loss_by_hand():
    # Rows 0 and 1 share caption 0, row 2 has caption 1; column 2 fits no row.
    logits = torch.tensor([[2.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    share = logits.exp() / logits.exp().sum(1, keepdim=True)
    rows = -(share[0, 0].log() + share[1, 0].log() + share[2, 1].log()) / 3
    share = logits.exp() / logits.exp().sum(0, keepdim=True)
    columns = -((share[0, 0].log() + share[1, 0].log()) / 2 + share[2, 1].log()) / 2
    loss = contrast(logits, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(loss, (rows + columns) / 2)


def test_damage_leaves_the_original_alone():
    frames = SpriteWorld("digits", "train").sample(0).frames
    before = frames.copy()
    draw = np.random.default_rng(0)
    damaged = [damage(frames, draw, 1.0) for _ in range(8)]
    assert (frames == before).all()
    assert all(d.shape == frames.shape and d.dtype == np.uint8 for d in damaged)
    assert any((d != frames).any() for d in damaged)
    untouched = [damage(frames, draw, 0.0) for _ in range(8)]
    assert any((d == frames).all() for d in untouched)  # half have no noise either


def test_retrieval_counts_what_scores_highest(tokenizer):
    world = SpriteWorld("full", "val")
    colours = list(world.colours)

    class ColourBlindToAllElse:
        """Knows the colour of its one picture, the first pixel, and nothing more."""

        def embed_texts(self, tokens):
            rows = [tokenizer.bpe.decode(row.tolist()) for row in tokens]
            which = [next(i for i, c in enumerate(colours) if f" {c} " in text) for text in rows]
            return torch.eye(len(colours))[which]

        def embed_pictures(self, frames):
            return torch.eye(len(colours))[frames[:, 0, 0, 0, 0].long()]

    factors = [Factors(3, colour, "black", "left") for colour in colours]
    pictures = np.zeros((len(colours), 10, 64, 64, 3), np.uint8)
    pictures[:, 0, 0, 0, 0] = np.arange(len(colours))
    pictures[0, 0, 0, 0, 0] = 1  # the first picture shows another colour than its caption says
    captions = Captions(tokenizer, torch.device("cpu"))
    rates = retrieval(ColourBlindToAllElse(), captions, pictures, factors, world, video=True)
    assert rates == {"class": 0, "colour": 7 / 8, "background": 0, "motion": 0, "joint": 0}


def test_training_lowers_the_loss_and_exports(config, tokenizer, tmp_path):
    torch.manual_seed(0)
    recipe = RankerRecipe(config, options(lr=5e-3), tokenizer, "digits")
    recipe.accuracy = lambda world, seen=None: {"image_class": 0.5}  # measured in its own test
    train(recipe, tmp_path, TrainerOptions(steps=30, sample_every=30, checkpoint_every=30))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    assert list((tmp_path / "samples").glob("*.png"))
    shipped = load_ranker(tmp_path / "checkpoint")
    assert shipped.training_record["level"] == "digits"
    assert set(shipped.training_record["accuracy"]) == {"val", "novel"}


def test_paused_and_resumed_equals_unbroken(config, tokenizer, tmp_path):
    seen = np.stack([SpriteWorld("full", "train").sample(i).frames for i in range(3)])

    def run(folder, **changed):
        recipe = RankerRecipe(config, options(), tokenizer, "full", train_seen=seen)
        recipe.accuracy = lambda world, seen=None: {}
        train(recipe, folder, TrainerOptions(steps=4, **changed))
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    whole = run(tmp_path / "whole")
    run(tmp_path / "broken", stop_after=2)
    assert run(tmp_path / "broken") == whole


def test_reconstructions_are_kept_and_belong_to_one_tokenizer(tmp_path):
    world, cache = SpriteWorld("digits", "train"), tmp_path / "train.npy"
    torch.manual_seed(0)
    first = VQGAN(TINY_VQGAN).eval()
    pictures = reconstructions(first, world, 2, cache, bf16=True)
    assert pictures.shape == (2, 10, 64, 64, 3) and pictures.dtype == np.uint8
    written = cache.stat().st_mtime_ns
    assert (reconstructions(first, world, 2, cache, bf16=True) == pictures).all()
    assert cache.stat().st_mtime_ns == written
    other = reconstructions(VQGAN(TINY_VQGAN).eval(), world, 2, cache, bf16=False)
    assert (other != pictures).any()
