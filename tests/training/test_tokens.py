"""Clips as tokens, and the pruning of background synonyms."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from nuwa.training.clips import FreshClips, store_clips
from nuwa.training.prune import prune_codebook
from nuwa.training.sources import Sprites
from nuwa.training.sprites.world import SpriteWorld
from nuwa.training.vqgan import VQGAN, one_hot, to_signed

from .tiny import TINY_VQGAN

CONFIG = dataclasses.replace(TINY_VQGAN, codebook_size=64)


@pytest.fixture(scope="module")
def vqgan() -> VQGAN:
    torch.manual_seed(0)
    model = VQGAN(CONFIG).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.3)
    return model


def test_clips_are_encoded_once_and_belong_to_their_tokenizer(vqgan, tmp_path):
    source, cache = Sprites("digits"), tmp_path / "clips.npy"
    clips = store_clips(vqgan, source, 3, cache, batch=2)
    assert clips.tokens.shape == (3, 10, 64)
    assert source.caption(2, video=True) == source.world.sample(2).video_caption
    assert source.caption(2, video=False) == source.world.sample(2).image_caption
    written = cache.stat().st_mtime_ns
    again = store_clips(vqgan, source, 3, cache)
    assert (again.tokens == clips.tokens).all()
    assert cache.stat().st_mtime_ns == written
    torch.nn.init.normal_(vqgan.quantize.embedding.weight, std=0.3)
    before = json.loads(cache.with_suffix(".json").read_text())
    store_clips(vqgan, source, 3, cache)
    assert json.loads(cache.with_suffix(".json").read_text()) != before


def test_fresh_clips_are_those_of_the_source_without_end(vqgan, tmp_path):
    source = Sprites("digits")
    fresh, stored = FreshClips(vqgan, source), store_clips(vqgan, source, 3, tmp_path / "c.npy")
    spans = [(2, range(3, 5)), (0, range(0, 2))]
    assert fresh.codes(spans).shape == (2, 2, 64)
    assert (fresh.codes(spans) == stored.codes(spans)).all()
    assert fresh.count > 1_000_000 and stored.count == 3
    assert fresh.codes([(fresh.count - 1, range(1))]).shape == (1, 1, 64)
    with pytest.raises(AssertionError, match="no sketches"):
        fresh.sketches(spans)


def test_pruning_a_vqgan_of_class_maps():
    torch.manual_seed(0)
    vqgan = VQGAN(dataclasses.replace(CONFIG, channels=21)).eval()
    torch.nn.init.normal_(vqgan.quantize.embedding.weight, std=0.3)
    world = SpriteWorld("digits", "train")
    samples = [world.sample(i) for i in range(6)]
    pruned = prune_codebook(vqgan, [(s.frames, s.segmentation) for s in samples], sketches=True)
    maps = np.concatenate([s.segmentation for s in samples])
    empty = ~maps.reshape(-1, 8, 8, 8, 8).any((2, 4))
    with torch.no_grad():
        codes = vqgan.encode(one_hot(torch.from_numpy(maps), 21)).codes.numpy()
    size = CONFIG.codebook_size
    plain, drawn = (np.bincount(codes[each], minlength=size) for each in (empty, ~empty))
    kept = (plain + drawn > 0) & (plain <= 0.9 * (plain + drawn))
    assert 0 < kept.sum() <= pruned.config.codebook_size <= kept.sum() + 1 < size
    old, new = vqgan.quantize.embedding.weight, pruned.quantize.embedding.weight
    assert (torch.cdist(old[kept], new).amin(1) == 0).all()


def test_pruning_drops_what_stands_for_background_alone(vqgan):
    world = SpriteWorld("digits", "train")
    samples = [world.sample(i) for i in range(6)]
    clips = [(s.frames, s.segmentation) for s in samples]
    pruned = prune_codebook(vqgan, clips)
    frames = np.concatenate([s.frames for s in samples])
    empty = ~np.concatenate([s.segmentation for s in samples]).reshape(-1, 8, 8, 8, 8).any((2, 4))
    with torch.no_grad():
        pixels = to_signed(torch.from_numpy(frames))
        before, after = vqgan.encode(pixels).codes, pruned.encode(pixels).codes
    old, new = vqgan.quantize.embedding.weight, pruned.quantize.embedding.weight
    assert pruned.config.codebook_size == len(new) < CONFIG.codebook_size
    # What is left are codes of the old book, and a cell whose code is left keeps it.
    place = torch.cdist(new, old).argmin(1)
    assert torch.equal(old[place], new)
    kept = torch.isin(before, place)
    assert torch.equal(place[after][kept], before[kept])
    used = np.bincount(before.numpy()[~empty], minlength=CONFIG.codebook_size)
    mostly_sprite = np.flatnonzero(used > 0.5 * np.bincount(before.flatten(), minlength=len(used)))
    assert set(mostly_sprite.tolist()) <= set(place.tolist())
    with pytest.raises(ValueError, match="threshold 1"):
        prune_codebook(vqgan, clips, threshold=1.0)
