"""Clips as a model goes on with them far beyond its trained length, kept to train it on.

A model that is fed true frames alone never learns what to do with its own. Rollouts feed it those:
windows of clips that it went on with by itself, with what should have been there as the answer
(dataset aggregation: Ross, Gordon and Bagnell, 2011). Only windows in which the sprite is where it
should be are kept, as elsewhere the answer would not follow from what is fed.

Legend: R rollouts, F frames, C cells of a frame, W windows.
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
from .sources import Source
from .vqgan import VQGAN, to_bytes

GIVEN = 2  # true frames at the start
ASIDE = 3.0  # pixels by which a sprite may be beside its place: less than it moves in a frame
BATCH = 32  # clips at a time


@dataclass(frozen=True)
class Rollouts:
    """clip_R: int64, numbers of the source's clips; tokens_RFC: int16, from their first frame on.

    windows_W2: int64 (rollout, first frame) of the windows to train on, as many frames long as the
    source's clips; identity: says whose clips and tokens these are.
    """

    clip_R: npt.NDArray[np.int64]
    tokens_RFC: npt.NDArray[np.int16]
    windows_W2: npt.NDArray[np.int64]
    identity: dict[str, Any]

    def save(self, path: Path) -> None:
        """As .npz; a file that is there is complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez_compressed(
                file,
                clip=self.clip_R,
                tokens=self.tokens_RFC,
                windows=self.windows_W2,
                identity=json.dumps(self.identity),
            )
        partial.replace(path)


def load_rollouts(path: Path, source: Source, vqgan: VQGAN) -> Rollouts:
    """ValueError if the file is none of `save`, or of other clips or another VQ-GAN than these."""
    try:
        with np.load(path, allow_pickle=False) as file:
            identity = json.loads(str(file["identity"]))
            found = Rollouts(file["clip"], file["tokens"], file["windows"], identity)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as rollouts: {error}") from None
    wanted = identity_of(source, vqgan)
    differ = [name for name in wanted if found.identity.get(name) != wanted[name]]
    if differ:
        raise ValueError(
            f"{path} has rollouts of another {' and '.join(differ)} than this run trains on; make "
            "them anew with `nuwa train rollouts`"
        )
    return found


def identity_of(source: Source, vqgan: VQGAN) -> dict[str, Any]:
    return {"source": source.identity, "tokenizer": fingerprint(vqgan)}


def roll_out(
    checkpoint: Checkpoint,
    source: Source,
    *,
    clips: int,
    frames: int,
    captioned: float = 0.5,
    temperature: float = 0.1,
    seed: int = 0,
) -> Iterator[Rollouts]:
    """The model's rollouts of `clips` clips of `source`, BATCH at a time.

    frames: of each, the first GIVEN true; captioned: share with the caption of an image as their
    prompt. ValueError for a source of pictures, and for frames that the model cannot make.
    """
    if source.frames < 2:
        raise ValueError("pictures do not go on; rollouts need clips")
    if not source.frames < frames <= MAX_PREDICTED_FRAMES:
        raise ValueError(
            f"frames {frames} are not in [{source.frames + 1}, {MAX_PREDICTED_FRAMES}]"
        )
    for name, share in (("captioned", captioned), ("temperature", temperature)):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name} {share} is not in [0, 1]")
    draw = np.random.default_rng(seed)
    numbers = draw.integers(source.count or ENDLESS, size=clips)
    named = draw.random(clips) < captioned
    identity = identity_of(source, checkpoint.vqgan)
    for first in range(0, clips, BATCH):
        part = slice(first, first + BATCH)
        clip_R = numbers[part]
        pixels = [source.clip(int(index), range(frames))[0] for index in clip_R]
        seeds = [seed + first + r for r in range(len(clip_R))]
        tokens_RFC = _continued(checkpoint, source, clip_R, named[part], pixels, temperature, seeds)
        windows = [
            (r, start)
            for r, index in enumerate(clip_R.tolist())
            for start in _in_place(
                pixels[r], _decoded(checkpoint.vqgan, tokens_RFC[r]), source.frames
            )
            if source.may_show(index, start)
        ]
        yield Rollouts(clip_R, tokens_RFC, np.array(windows, np.int64).reshape(-1, 2), identity)


def joined(parts: list[Rollouts]) -> Rollouts:
    """One after the other."""
    before = np.cumsum([0, *(len(part.clip_R) for part in parts)])
    windows = [part.windows_W2 + (first, 0) for part, first in zip(parts, before, strict=False)]
    return Rollouts(
        np.concatenate([part.clip_R for part in parts]),
        np.concatenate([part.tokens_RFC for part in parts]),
        np.concatenate(windows),
        parts[0].identity,
    )


def _continued(
    checkpoint: Checkpoint,
    source: Source,
    clip_R: npt.NDArray[np.int64],
    named_R: npt.NDArray[np.bool_],
    pixels: list[npt.NDArray[np.uint8]],
    temperature: float,
    seeds: list[int],
) -> npt.NDArray[np.int16]:
    frames, (_, height, width) = len(pixels[0]), _shape(checkpoint)
    prompts = [
        source.caption(int(index), video=False) if named else UNCONDITIONAL_PROMPT
        for index, named in zip(clip_R, named_R, strict=True)
    ]
    text = np.stack([checkpoint.text_tokenizer.encode(prompt) for prompt in prompts])
    given = encode_frames(checkpoint.vqgan, np.concatenate([each[:GIVEN] for each in pixels]))
    tokens_RFC = np.zeros((len(clip_R), frames, height * width), np.int64)
    tokens_RFC[:, :GIVEN] = given.reshape(len(clip_R), GIVEN, -1)
    known_RFC = np.zeros(tokens_RFC.shape, bool)
    known_RFC[:, :GIVEN] = True
    made = generate(
        checkpoint.nuwa,
        torch.from_numpy(text.astype(np.int64)),
        Grid(frames, height, width),
        seeds=seeds,
        temperature=temperature,
        known_BN=torch.from_numpy(known_RFC.reshape(len(clip_R), -1)),
        known_tokens_BN=torch.from_numpy(tokens_RFC.reshape(len(clip_R), -1)),
    )
    return made.numpy().astype(np.int16).reshape(tokens_RFC.shape)


def _shape(checkpoint: Checkpoint) -> tuple[int, int, int]:
    grid = checkpoint.config.decoder.grid
    return grid.frames, grid.height, grid.width


@torch.no_grad()
def _decoded(vqgan: VQGAN, tokens_FC: npt.NDArray[np.int16]) -> npt.NDArray[np.uint8]:
    side = vqgan.config.grid_size
    codes = torch.from_numpy(tokens_FC.astype(np.int64)).view(-1, side, side)
    return to_bytes(vqgan.decode(codes)).numpy()


def _in_place(
    real: npt.NDArray[np.uint8], made: npt.NDArray[np.uint8], length: int
) -> Iterator[int]:
    """First frames of the windows of `made` in all of which the sprite is where it really is."""
    aside = np.abs(locate(made).track_F2 - locate(real).track_F2).max(1)  # NaN without a sprite
    right = (aside <= ASIDE).astype(int)
    run = np.convolve(right, np.ones(length, int), "valid")
    yield from np.flatnonzero(run == length).tolist()
