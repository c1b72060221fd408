"""Clips as a model goes on with them far beyond its trained length, kept to train it on.

A model that is fed true frames alone never learns what to do with its own. Rollouts feed it those:
windows of clips that it went on with by itself, with what should have been there as the answer
(dataset aggregation: Ross, Gordon and Bagnell, 2011): the sprite as it was at the start, in the
places where the model moved it. Only windows in which it moves as sprites do have such an answer.

Legend: R rollouts, F frames, C cells of a frame, W windows, S canvas side.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nuwa.spec.grid import Grid
from nuwa.spec.plan import MAX_PREDICTED_FRAMES
from nuwa.spec.tasks import UNCONDITIONAL_PROMPT

from .checkpoint import Checkpoint
from .clips import ENDLESS, encode_frames, fingerprint
from .decode import generate
from .readers import locate
from .sources import Source, Sprites, may_predict
from .sprites.world import FRAMES, REACH, Plan, SpriteWorld, render_at, shown_motion
from .vqgan import VQGAN, to_bytes

U8 = npt.NDArray[np.uint8]

GIVEN = 2  # true frames at the start
SLACK = 0.9  # steps by which a sprite's ink may be beside its place; the next is two steps away
MOST_TURNS = 2  # in a window; a sprite of the world never turns more often
BATCH = 32  # clips at a time


@dataclass(frozen=True)
class Rollouts:
    """clip_R: int64, numbers of the world's clips; tokens_RFC: int16, from their first frame on.

    corners_RF2: int16 (row, column), where the sprite's tile is by then, -1 where it is no place
    that it could have come to; windows_W2: int64 (rollout, first frame) of the windows to train on;
    identity: says whose clips and tokens these are.
    """

    world: SpriteWorld
    clip_R: npt.NDArray[np.int64]
    tokens_RFC: npt.NDArray[np.int16]
    corners_RF2: npt.NDArray[np.int16]
    windows_W2: npt.NDArray[np.int64]
    identity: dict[str, Any]

    def window(self, draw: np.random.Generator) -> tuple[int, npt.NDArray[np.int64], U8]:
        """(clip, tokens [F, C] as they were made, u8 [F, S, S, 3] as they should have looked)."""
        rollout, start = self.windows_W2[draw.integers(len(self.windows_W2))].tolist()
        frames = slice(start, start + FRAMES)
        clip = int(self.clip_R[rollout])
        corners = [(row, column) for row, column in self.corners_RF2[rollout, frames].tolist()]
        pixels, _ = render_at(self.world.plan(clip), corners)
        return clip, self.tokens_RFC[rollout, frames].astype(np.int64), pixels

    def save(self, path: Path) -> None:
        """As .npz; a file that is there is complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez_compressed(
                file,
                clip=self.clip_R,
                tokens=self.tokens_RFC,
                corners=self.corners_RF2,
                windows=self.windows_W2,
                identity=json.dumps(self.identity),
            )
        partial.replace(path)


def load_rollouts(path: Path, source: Source, vqgan: VQGAN) -> Rollouts:
    """ValueError if the file is none of `save`, or of other clips or another VQ-GAN than these."""
    try:
        with np.load(path, allow_pickle=False) as file:
            identity = json.loads(str(file["identity"]))
            arrays = [file[name] for name in ("clip", "tokens", "corners", "windows")]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as rollouts: {error}") from None
    wanted = _identity(source, vqgan)
    differ = [name for name in wanted if identity.get(name) != wanted[name]]
    if differ:
        raise ValueError(
            f"{path} has rollouts of another {' and '.join(differ)} than this run trains on; make "
            "them anew with `nuwa train rollouts`"
        )
    assert isinstance(source, Sprites), "its identity is that of sprites"
    return Rollouts(source.world, *arrays, identity)


def _identity(source: Source, vqgan: VQGAN) -> dict[str, Any]:
    return {"source": source.identity, "tokenizer": fingerprint(vqgan)}


def roll_out(
    checkpoint: Checkpoint,
    source: Sprites,
    *,
    clips: int,
    frames: int,
    captioned: float = 0.5,
    temperature: float = 0.1,
    seed: int = 0,
) -> Iterator[Rollouts]:
    """The model's rollouts of `clips` clips of `source`, BATCH at a time.

    frames: of each, the first GIVEN true; captioned: share with the caption of an image as their
    prompt. ValueError for what is out of range.
    """
    if not FRAMES < frames <= MAX_PREDICTED_FRAMES:
        raise ValueError(f"frames {frames} are not in [{FRAMES + 1}, {MAX_PREDICTED_FRAMES}]")
    for name, share in (("captioned", captioned), ("temperature", temperature)):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name} {share} is not in [0, 1]")
    draw = np.random.default_rng(seed)
    numbers = draw.integers(ENDLESS, size=clips)
    named = draw.random(clips) < captioned
    identity = _identity(source, checkpoint.vqgan)
    for first in range(0, clips, BATCH):
        part = slice(first, first + BATCH)
        clip_R = numbers[part]
        seeds = [seed + first + r for r in range(len(clip_R))]
        tokens_RFC = _continued(checkpoint, source, clip_R, named[part], frames, temperature, seeds)
        plans = [source.world.plan(index) for index in clip_R.tolist()]
        corners_RF2 = np.stack(
            [
                _own_corners(plan, _decoded(checkpoint.vqgan, tokens_FC))
                for plan, tokens_FC in zip(plans, tokens_RFC, strict=True)
            ]
        )
        windows = [
            (r, start)
            for r, (plan, corners_F2) in enumerate(zip(plans, corners_RF2, strict=True))
            for start in _windows(plan, corners_F2)
        ]
        windows_W2 = np.array(windows, np.int64).reshape(-1, 2)
        yield Rollouts(source.world, clip_R, tokens_RFC, corners_RF2, windows_W2, identity)


def joined(parts: list[Rollouts]) -> Rollouts:
    """One after the other."""
    before = np.cumsum([0, *(len(part.clip_R) for part in parts)])
    windows = [part.windows_W2 + (first, 0) for part, first in zip(parts, before, strict=False)]
    return Rollouts(
        parts[0].world,
        np.concatenate([part.clip_R for part in parts]),
        np.concatenate([part.tokens_RFC for part in parts]),
        np.concatenate([part.corners_RF2 for part in parts]),
        np.concatenate(windows),
        parts[0].identity,
    )


def _continued(
    checkpoint: Checkpoint,
    source: Sprites,
    clip_R: npt.NDArray[np.int64],
    named_R: npt.NDArray[np.bool_],
    frames: int,
    temperature: float,
    seeds: list[int],
) -> npt.NDArray[np.int16]:
    shape = checkpoint.config.decoder.grid
    prompts = [
        source.caption(int(index), video=False) if named else UNCONDITIONAL_PROMPT
        for index, named in zip(clip_R, named_R, strict=True)
    ]
    text = np.stack([checkpoint.text_tokenizer.encode(prompt) for prompt in prompts])
    pixels = [source.clip(index, range(GIVEN))[0] for index in clip_R.tolist()]
    given = encode_frames(checkpoint.vqgan, np.concatenate(pixels))
    tokens_RFC = np.zeros((len(clip_R), frames, shape.height * shape.width), np.int64)
    tokens_RFC[:, :GIVEN] = given.reshape(len(clip_R), GIVEN, -1)
    known_RFC = np.zeros(tokens_RFC.shape, bool)
    known_RFC[:, :GIVEN] = True
    made = generate(
        checkpoint.nuwa,
        torch.from_numpy(text.astype(np.int64)),
        Grid(frames, shape.height, shape.width),
        seeds=seeds,
        temperature=temperature,
        known_BN=torch.from_numpy(known_RFC.reshape(len(clip_R), -1)),
        known_tokens_BN=torch.from_numpy(tokens_RFC.reshape(len(clip_R), -1)),
    )
    return made.numpy().astype(np.int16).reshape(tokens_RFC.shape)


@torch.no_grad()
def _decoded(vqgan: VQGAN, tokens_FC: npt.NDArray[np.int16]) -> U8:
    side = vqgan.config.grid_size
    codes = torch.from_numpy(tokens_FC.astype(np.int64)).view(-1, side, side)
    return to_bytes(vqgan.decode(codes)).numpy()


def _own_corners(plan: Plan, made: U8) -> npt.NDArray[np.int16]:
    """int16 [F, 2]: Rollouts.corners_RF2, by the centre of the ink, as its shape may have changed.

    A sprite moves by its speed in every frame, so that the places it can be at in a frame are two
    steps apart; the nearest one counts if the ink is no more than SLACK steps aside.
    """
    track, (drawn, _) = plan.track, render_at(plan, [(0, 0)])
    offset_F2 = locate(made).track_F2 - locate(drawn).track_F2[0]
    axis = 0 if track.direction[0] else 1
    first = track.corner(0)[axis]
    steps = np.arange(len(made)) % 2
    phase_F = (first + track.speed * steps) % (2 * track.speed)
    turns_F = np.round((offset_F2[:, axis] - phase_F) / (2 * track.speed))
    corner_F2 = np.full_like(offset_F2, track.across)
    corner_F2[:, axis] = phase_F + 2 * track.speed * turns_F
    near_F = (np.abs(offset_F2 - corner_F2) <= SLACK * track.speed).all(1)  # no ink: NaN, not near
    inside_F = ((corner_F2 >= 0) & (corner_F2 <= REACH)).all(1)
    return np.where((near_F & inside_F)[:, None], corner_F2, -1).astype(np.int16)


def _windows(plan: Plan, corners_F2: npt.NDArray[np.int16]) -> Iterator[int]:
    """First frames of the windows in which a sprite moves as it may."""
    ways_F2 = np.diff(corners_F2.astype(int), axis=0)
    moves_F = np.abs(ways_F2).sum(1) == plan.track.speed
    turns_F = (ways_F2[1:] != ways_F2[:-1]).any(1)
    there_F = (corners_F2 >= 0).all(1)
    for start in range(len(corners_F2) - FRAMES + 1):
        end = start + FRAMES
        goes_on = there_F[start:end].all() and moves_F[start : end - 1].all()
        if goes_on and turns_F[start : end - 2].sum() <= MOST_TURNS:
            corners = [(int(row), int(column)) for row, column in corners_F2[start:end]]
            if may_predict(plan.factors.class_index, shown_motion(corners)):
                yield start
