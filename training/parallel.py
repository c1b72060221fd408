"""Processes that train one model together: `torchrun` starts them, without it there is one.

Each draws rows of its own, gradients are summed, and every process then takes the same step. Knows
no model.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn


@dataclass(frozen=True)
class Team:
    """This process is number `rank` of `size`; device: what it trains on."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    def share(self, count: int, turn: int = 0) -> int:
        """This process' part of `count` rows; the odd ones go round with `turn`."""
        return count // self.size + ((self.rank + turn) % self.size < count % self.size)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes; `values` itself is changed."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sums the gradients of all processes, in one exchange; one without counts as zero."""
        if self.size == 1:
            return
        trained = [p for p in parameters if p.requires_grad]
        for p in trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in trained if p.grad is not None]
        flat = self.total(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The others run the body when the leader is through: it makes files, they find them."""
        if self.size > 1 and not self.leads:
            torch.distributed.barrier()
        yield
        if self.size > 1 and self.leads:
            torch.distributed.barrier()


def check_device(device: str) -> None:
    """ValueError if this machine has no such device, naming those it has."""
    there = ["cpu"]
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is not None:
        count = torch.accelerator.device_count()
        there += [found.type, *(f"{found.type}:{index}" for index in range(count))]
    if device not in there:
        raise ValueError(f"device {device!r} is not one of this machine's: {', '.join(there)}")


def join(device: str) -> Team:
    """The team that `torchrun` says this process is in, by its environment; else a team of one.

    device: "cpu", "cuda" (each process takes the GPU of its local rank) or one GPU.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Team(device=device)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        # Threads of a group that is still there abort the process, now and then, when it ends.
        atexit.register(torch.distributed.destroy_process_group)
    return Team(torch.distributed.get_rank(), size, device)
