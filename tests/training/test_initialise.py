"""A model that begins at another one's weights, with other tokenizers."""

from __future__ import annotations

import torch
from torch import Tensor

from nuwa.training.initialise import Translation
from nuwa.training.vqgan import VQGAN

from .tiny import TINY_VQGAN


def make() -> VQGAN:
    torch.manual_seed(0)
    model = VQGAN(TINY_VQGAN).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.3)
    return model


def inputs() -> list[Tensor]:
    side = TINY_VQGAN.resolution
    return [torch.randn(2, TINY_VQGAN.channels, side, side) for _ in range(3)]


@torch.no_grad()
def test_codes_that_only_changed_places_are_found_again():
    old, new = make(), make()
    order = torch.randperm(TINY_VQGAN.codebook_size)
    new.quantize.embedding.weight.copy_(old.quantize.embedding.weight[order])
    found = Translation.of(old, new, inputs())
    assert torch.equal(found.code_K, order)
    assert torch.equal(found.moved_KE, torch.zeros_like(found.moved_KE))
    assert torch.equal(found.log_share_K, torch.zeros_like(found.log_share_K))
    rows = torch.arange(TINY_VQGAN.codebook_size)
    assert torch.equal(found.rows(rows), order)


@torch.no_grad()
def test_an_encoder_that_turned_its_features_round_does_not_mislead():
    """What counts is which cells get a code, not where its vector lies."""
    old, new = make(), make()
    new.quantize.embedding.weight.neg_()
    new.quant_conv.weight.neg_()
    if new.quant_conv.bias is not None:
        new.quant_conv.bias.neg_()
    batches = inputs()
    found = Translation.of(old, new, batches)
    seen = torch.cat([old.encode(batch).codes.flatten() for batch in batches]).unique()
    assert len(seen) > 3
    assert torch.equal(found.code_K[seen], seen)


@torch.no_grad()
def test_new_codes_of_one_old_code_stay_apart():
    old, new = make(), make()
    new.quantize.embedding.weight[:2] = old.quantize.embedding.weight[5] + torch.tensor(
        [[0.0], [1e-3]]
    )
    found = Translation.of(old, new, [])
    assert found.code_K[:2].tolist() == [5, 5]
    value = torch.randn_like(old.quantize.embedding.weight)
    logits = found.logits(torch.zeros(TINY_VQGAN.codebook_size))
    shares = logits.exp()[found.code_K == 5]
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0))
    rows = found.embedding(value)
    torch.testing.assert_close(rows[0], value[5])
    assert (rows[1] - rows[0]).abs().min() > 0
