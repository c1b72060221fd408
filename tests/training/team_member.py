"""One process of test_parallel.py: `torchrun team_member.py FOLDER`; writes FOLDER/RANK.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from nuwa.training.parallel import Team, join

ROWS = {0: slice(0, 2), 1: slice(2, 5)}


def make() -> tuple[nn.Module, Tensor, Tensor]:
    """A model, five rows f32 [5, 3] and their weights f32 [5]; the same in every process."""
    draw = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 4)
    nn.init.normal_(model.weight, generator=draw)
    nn.init.zeros_(model.bias)
    return model, torch.randn(5, 3, generator=draw), torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5])


def gradients(team: Team, rows: slice) -> list[list]:
    """Of the weighted mean over all rows of the team, of which these are this process'."""
    model, all_rows, all_weights = make()
    error = (model(all_rows[rows]) ** 2).sum(1) * all_weights[rows]
    (error.sum() / team.total(all_weights[rows].sum())).backward()
    team.sum_gradients(model.parameters())
    return [p.grad.tolist() for p in model.parameters() if p.grad is not None]


def main(folder: Path) -> None:
    team = join("cpu")
    with team.leader_first():
        before = [path.name for path in folder.iterdir()]
        (folder / "made").touch()
    result = {"before": before, "gradients": gradients(team, ROWS[team.rank])}
    (folder / f"{team.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
