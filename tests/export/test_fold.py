"""Folding changes nothing but the amount of work."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from nuwa.export.cases import random_steps, text_ids, visual_volumes  # noqa: E402
from nuwa.export.fold import fold  # noqa: E402
from nuwa.spec.conditions import ConditionLayout, visual_columns  # noqa: E402
from nuwa.spec.manifest import STEP_ROW_INPUTS, layer_names  # noqa: E402
from nuwa.training.checkpoint import load_checkpoint  # noqa: E402
from nuwa.training.decode import DecoderStep, TextConditions, VisualConditions  # noqa: E402


@pytest.fixture(scope="module", params=["tiny_checkpoint", "plain_checkpoint"])
def checkpoint(request):
    """With LayerScales that are not 1, as training leaves them."""
    loaded = load_checkpoint(request.getfixturevalue(request.param))
    torch.manual_seed(1)
    for name, parameter in loaded.nuwa.named_parameters():
        if name.endswith("_scale"):
            parameter.data.uniform_(-2.0, 2.0)
    return loaded


@torch.no_grad()
def test_decoder_step_is_the_same(checkpoint):
    plain, folded = DecoderStep(checkpoint.nuwa), DecoderStep(fold(checkpoint.nuwa))
    layers = checkpoint.config.decoder.layers
    kinds = ("key_cache", "value_cache", "cross_key", "cross_value")
    for feeds in random_steps(checkpoint.config):
        tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
        lists = [[tensors[name] for name in layer_names(kind, layers)] for kind in kinds]
        rows = [tensors[name] for name in (*STEP_ROW_INPUTS, "ranks")]
        rows.append(tensors.get("cross_columns"))
        wanted, got = plain(*rows, *lists), folded(*rows, *lists)
        scale = wanted[1].abs().max()
        assert (got[1] - wanted[1]).abs().max() < 2e-6 * scale
        assert (got[0] != wanted[0]).sum() == 0
        for one, other in zip([*got[2], *got[3]], [*wanted[2], *wanted[3]], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_conditions_are_identical(checkpoint):
    ids = torch.from_numpy(text_ids(checkpoint.text_tokenizer))
    plain, folded = TextConditions(checkpoint.nuwa)(ids), TextConditions(fold(checkpoint.nuwa))(ids)
    for one, other in zip([*plain[0], *plain[1]], [*folded[0], *folded[1]], strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_visual_conditions_are_the_same(checkpoint):
    if checkpoint.config.visual is None:
        assert fold(checkpoint.nuwa).visual is None
        return
    plain, folded = VisualConditions(checkpoint.nuwa), VisualConditions(fold(checkpoint.nuwa))
    for feeds in visual_volumes(checkpoint.config):
        tensors = [torch.from_numpy(array) for array in feeds.values()]
        wanted, got = plain(*tensors), folded(*tensors)
        for one, other in zip([*got[0], *got[1]], [*wanted[0], *wanted[1]], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_text_has_no_cross_bias(checkpoint):
    for block in fold(checkpoint.nuwa).blocks:
        table = block.cross_bias_table()
        if checkpoint.config.visual is None:
            assert table is None
        else:
            assert table.shape[1] == visual_columns(checkpoint.config) + 1
            assert (table[:, -1] == 0).all() and (table[:, :-1] != 0).all()


@torch.no_grad()
def test_bos_has_no_position_and_every_other_token_has_its_own(checkpoint):
    nuwa, grid = checkpoint.nuwa, checkpoint.config.decoder.grid
    folded = fold(nuwa).embedding
    coordinates = torch.from_numpy(grid.coordinates())
    bos = torch.full((grid.size,), checkpoint.config.bos, dtype=torch.int32)
    assert torch.equal(folded(bos, coordinates), nuwa.embedding.bos.expand(grid.size, -1))
    tokens = torch.arange(grid.size, dtype=torch.int32) % checkpoint.config.bos
    torch.testing.assert_close(folded(tokens, coordinates), nuwa.embedding(tokens, coordinates))


@torch.no_grad()
def test_model_is_left_as_it_was(checkpoint):
    before = {name: value.clone() for name, value in checkpoint.nuwa.state_dict().items()}
    folded = fold(checkpoint.nuwa)
    for parameter in folded.parameters():
        parameter.zero_()
    after = checkpoint.nuwa.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in checkpoint.nuwa.parameters())


def test_random_steps_reach_the_edges(checkpoint):
    """What the parity figures rest on: the cases cover what serving can ask for."""
    cases = list(random_steps(checkpoint.config))
    rows = [case["tokens"].size for case in cases]
    assert min(rows) == 1 and max(rows) > 30
    assert {case["ranks"].size for case in cases} >= {1, checkpoint.config.image.codebook_size}
    assert any((case["write_index"] < 0).all() for case in cases)
    assert any((case["write_index"] < 0).any() != (case["write_index"] < 0).all() for case in cases)
    joined = {name: np.concatenate([c[name].reshape(-1) for c in cases]) for name in cases[0]}
    assert {0.0, 1.0} <= set(joined["temperature"].tolist())
    assert joined["tokens"].max() == checkpoint.config.bos
    assert len(set(joined["slot"].tolist())) > 2
    for name in ("neighbours", "cross_neighbours"):
        assert any((case[name] < 0).all(axis=1).any() for case in cases)
    for name in ("top_k", "top_p", "guidance"):
        assert len(set(joined[name].tolist())) > 2
    assert joined["cross_neighbours"].max() >= ConditionLayout.of(checkpoint.config).none


def test_random_steps_have_rows_with_and_without_a_visual_condition(checkpoint):
    cases = list(random_steps(checkpoint.config))
    count = visual_columns(checkpoint.config)
    if not count:
        assert not any("cross_columns" in case for case in cases)
        return
    seen = [case for case in cases if case["cross_columns"][0] == 0]
    assert 0 < len(seen) < len(cases)
    for case in cases:
        text = case["cross_columns"][count:] if case["cross_columns"][0] == 0 else []
        assert (np.asarray(text) == count).all()
    without = [(case["cross_neighbours"][:, :count] < 0).all(axis=1) for case in seen]
    assert any(rows.any() and not rows.all() for rows in without)


def test_visual_volumes_reach_the_edges(tiny_checkpoint):
    config = load_checkpoint(tiny_checkpoint).config
    cases = list(visual_volumes(config))
    cell = config.decoder.grid.height * config.decoder.grid.width
    sizes = [cell, config.decoder.grid.size, config.decoder.grid.size + 2 * cell]
    assert [len(case["tokens"]) for case in cases] == sizes
    ids = np.concatenate([case["tokens"] for case in cases])
    assert (ids < config.image.codebook_size).any() and (ids == config.hidden).any()
    assert ((ids >= config.image.codebook_size) & (ids < config.hidden)).any()
    for case in cases:
        own = np.arange(len(case["tokens"]))
        # Every position sees itself, in the middle of its window, and nothing outside the volumes.
        assert (case["neighbours"][:, case["neighbours"].shape[1] // 2] == own).all()
        assert case["neighbours"].max() == own[-1]
    last = cases[-1]["neighbours"][-cell:]
    assert last[last >= 0].min() == len(cases[-1]["tokens"]) - cell
