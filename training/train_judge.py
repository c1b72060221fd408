"""Trains the judge on real clips, measures it on held-out ones, and saves it.

    nuwa train judge --level digits --out runs/judge-digits

Knows the sprite world and the judge; nothing of generated clips, for which the judge is made
ready by turning, scaling, blurring and adding noise.

Shapes: B frames in a batch, C = CROP side.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .judge import CROP, Judge, ShapeNet, crop_ink
from .readers import locate
from .sprites import world
from .sprites.world import FRAMES, SpriteWorld


def train_judge(
    level: str,
    *,
    steps: int = 800,
    batch: int = 128,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> Judge:
    """Trains on single frames of the train split, blurred, bent and made noisy at random.

    progress: called with (step, steps, loss). ValueError for an unknown level.
    """
    source = SpriteWorld(level, "train", seed)
    torch.manual_seed(seed)
    network = ShapeNet(source.class_count).train()
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for step in range(steps):
        inks, labels = _training_batch(source, range(step * batch, (step + 1) * batch))
        _, logits = network(_augment(inks))
        loss = F.cross_entropy(logits, labels, label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps, loss.item())
    metadata = {"world_version": world.VERSION, "steps": steps, "batch": batch, "seed": seed}
    return Judge(level, network.to(memory_format=torch.contiguous_format), metadata)


def _training_batch(source: SpriteWorld, indices: range) -> tuple[Tensor, Tensor]:
    inks, labels = [], []
    for index in indices:
        frame, segmentation = source.frame(index, index % FRAMES)
        layout = locate(frame[None])
        inks.append(crop_ink(layout.ink_FSS[0], layout.track_F2[0]))
        labels.append(int(segmentation.max()) - 1)
    return torch.from_numpy(np.stack(inks))[:, None], torch.tensor(labels)


def _augment(ink_B1CC: Tensor) -> Tensor:
    """Turn, scale and shift a little, blur, add noise: a generated sprite is never crisp."""
    count = len(ink_B1CC)
    angle = torch.empty(count).uniform_(-0.2, 0.2)
    scale = torch.empty(count).uniform_(0.9, 1.1)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    shift_x, shift_y = (torch.empty(count).uniform_(-3, 3) * 2 / CROP for _ in range(2))
    rows = [torch.stack([cosine, -sine, shift_x], 1), torch.stack([sine, cosine, shift_y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(ink_B1CC.shape), align_corners=False)
    moved = F.grid_sample(ink_B1CC, grid, align_corners=False)
    sigma = float(torch.empty(1).uniform_(0.05, 1.3))
    taps = torch.exp(-0.5 * (torch.arange(-3, 4) / sigma) ** 2)
    taps = taps / taps.sum()
    blurred = F.conv2d(moved, taps.view(1, 1, 1, 7), padding=(0, 3))
    blurred = F.conv2d(blurred, taps.view(1, 1, 7, 1), padding=(3, 0))
    # Normalised as `locate` does: full ink stays near 1 however blurred the sprite is.
    strongest = blurred.flatten(1).topk(20).values[:, -1].clamp_min(0.2)
    noisy = blurred / strongest.view(-1, 1, 1, 1) + 0.08 * torch.randn_like(blurred)
    return torch.where(noisy < 0.3, 0.0, noisy.clamp(max=1.0))


def accuracy(judge: Judge, split: str, samples: int) -> dict[str, float]:
    """Share of the first `samples` real clips of a split that the judge reads right, by factor."""
    source = SpriteWorld(judge.level, split)
    right = {"class": 0, "colour": 0, "background": 0, "motion": 0, "joint": 0}
    for index in range(samples):
        sample = source.sample(index)
        verdict, factors = judge.read(sample.frames), sample.factors
        correct = {
            "class": verdict.class_index == factors.class_index,
            "colour": verdict.colour == factors.colour,
            "background": verdict.background == factors.background,
            "motion": verdict.motion == factors.motion,
        }
        for name, value in {**correct, "joint": all(correct.values())}.items():
            right[name] += value
    return {name: count / samples for name, count in right.items()}


def make_judge(level: str, out: Path, *, steps: int, seed: int, samples: int = 1000) -> Judge:
    """Trains a judge, measures it on `samples` clips of val and of test, and writes it to `out`."""

    def progress(step: int, steps: int, loss: float) -> None:
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps} loss {loss:.3f}", flush=True)

    judge = train_judge(level, steps=steps, seed=seed, progress=progress)
    judge.metadata["samples"] = samples
    judge.metadata["accuracy"] = {
        split: accuracy(judge, split, samples) for split in ("val", "test")
    }
    judge.save(out)
    return judge
