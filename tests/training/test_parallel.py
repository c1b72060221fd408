"""Several processes take the step that one would take on all their rows."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from nuwa.training.parallel import Team, join

from . import team_member


@pytest.mark.slow
def test_gradients_are_those_of_all_rows_together(tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*words, team_member.__file__, tmp_path], check=True, capture_output=True)
    leader, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (leader["before"], other["before"]) == ([], ["made"]), "the leader goes first"
    assert leader["gradients"] == other["gradients"]
    alone = team_member.gradients(Team(), slice(None))
    for got, wanted in zip(leader["gradients"], alone, strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted))


def test_rows_are_shared_out_and_none_is_lost():
    for size in (1, 2, 3, 5):
        for count in range(12):
            for turn in range(4):
                shares = [Team(rank, size).share(count, turn) for rank in range(size)]
                assert sum(shares) == count and max(shares) - min(shares) <= 1
    assert [Team(r, 2).share(3) for r in (0, 1)] == [2, 1]
    assert [Team(r, 2).share(3, turn=1) for r in (0, 1)] == [1, 2]


def test_alone_without_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    team = join("cpu")
    assert (team, team.leads) == (Team(0, 1, "cpu"), True)
    with team.leader_first():
        pass
