"""Scheduled sampling: some tokens are fed as the model draws them where all before is true."""

import torch

from nuwa.spec.grid import Grid
from nuwa.training import train_nuwa
from nuwa.training.train_nuwa import with_own_draws

from .test_nuwa import SMALL, model

GRID, ROWS, TEXT = Grid(4, 4, 4), 5, 6


def example():
    torch.manual_seed(1)
    fed = torch.randint(0, SMALL.image.codebook_size, (ROWS, GRID.size))
    own = torch.rand(ROWS, GRID.size) < 0.4
    own[[0, 3]] = False
    return fed, own, torch.randint(0, SMALL.text.vocabulary_size - 1, (ROWS, TEXT))


def test_marked_tokens_are_the_models_and_the_rest_stays(monkeypatch):
    monkeypatch.setattr(train_nuwa, "OWN_TEMPERATURE", 1e-6)
    nuwa, (fed, own, text), time = model(SMALL), example(), torch.tensor([0, 1, 2, 0, 3])
    for time_B in (None, time):
        before = fed.clone()
        mixed = with_own_draws(nuwa, own, fed, text, nuwa.volume(GRID), time_B)
        with torch.no_grad():
            likeliest = nuwa(fed, text, GRID, time_B=time_B).argmax(-1)
        assert torch.equal(mixed, torch.where(own, likeliest, fed))
        assert torch.equal(fed, before) and not torch.equal(mixed, fed)


def test_draws_follow_the_steps_seed_and_hold_no_gradient():
    nuwa, (fed, own, text) = model(SMALL), example()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(with_own_draws(nuwa, own, fed, text, nuwa.volume(GRID), None))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert all(parameter.grad is None for parameter in nuwa.parameters())
