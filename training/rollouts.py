"""Clips as a model goes on with them far beyond its trained length, kept to train it on.

A model that is fed true frames alone never learns what to do with its own. Rollouts feed it those:
windows of clips that it went on with by itself, with what should have been there as the answer
(dataset aggregation: Ross, Gordon and Bagnell, 2011): the sprite as it was at the start, in the
places where the model moved it. Only windows in which it moves as sprites do have such an answer.

And only where something tells what that sprite was: where a seven has become a one, and the window
begins after that, nothing that is seen says that the answer is a seven, and who is told so learns
that what it sees may change at any time. Such windows are kept for rows whose prompt says what the
sprite is. A window that begins with the seven is for all: whoever sees what went wrong in it after
that, also see what it should have been, and learn to bring it back.

Legend: R rollouts, F frames, C cells of a frame, W windows, S canvas side.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nuwa.spec.files import make_writable, replacing
from nuwa.spec.plan import MAX_PREDICTED_FRAMES

from .clips import ENDLESS
from .readers import locate
from .sources import Source, Sprites, may_predict
from .sprites.world import FRAMES, REACH, Plan, SpriteWorld, render_at, shown_motion

U8 = npt.NDArray[np.uint8]

FILE = "rollouts.npz"
GIVEN = 2  # true frames at the start
SLACK = 0.9  # steps by which a sprite's ink may be beside its place; the next is two steps away
MOST_ASTRAY = 3  # frames in a row in which it is nowhere that it could have come to
MOST_TURNS = 4  # in a window; of the world's own sprites two, and two more to come back
CHUNK = 32  # clips between two states of the file
# dB of SNR from which a frame counts as one that shows its sprite as it was: a VQ-GAN's round trip
# leaves 12 to 16.
FAITHFUL = 9.0
SHOWN = 4  # frames at the start of a window that have to be such
ALIKE = 0.95  # share of the true frames' tokens on which two copies of a VQ-GAN agree


@dataclass(frozen=True)
class Rollouts:
    """clip_R: int64, numbers of the world's clips; tokens_RFC: int16, from their first frame on.

    corners_RF2: int16 (row, column), where the sprite's tile is by then, or should be where it is
    nowhere that it could have come to; -1 where that is not known; windows_W2: int64 (rollout,
    first frame) of the windows to train on, as many frames long as the world's clips;
    snr_RF: f16, dB, by how much the sprite outweighs what is wrong about it, -inf where it is not
    known where it should be; settings: how they were made.
    """

    world: SpriteWorld
    clip_R: npt.NDArray[np.int64]
    tokens_RFC: npt.NDArray[np.int16]
    corners_RF2: npt.NDArray[np.int16]
    windows_W2: npt.NDArray[np.int64]
    snr_RF: npt.NDArray[np.float16]
    settings: dict[str, Any]

    @cached_property
    def faithful_W2(self) -> npt.NDArray[np.int64]:
        """Those of the windows that begin with the sprite as it was."""
        return self.windows_W2[self._shows_WF[:, :SHOWN].all(axis=1)]

    @cached_property
    def mending_W2(self) -> npt.NDArray[np.int64]:
        """Those of the faithful that do not go on with it as it was."""
        return self.windows_W2[self._shows_WF[:, :SHOWN].all(1) & ~self._shows_WF.all(1)]

    @cached_property
    def _shows_WF(self) -> npt.NDArray[np.bool_]:
        frames_WF = self.windows_W2[:, 1:] + np.arange(FRAMES)
        return np.asarray(self.snr_RF[self.windows_W2[:, :1], frames_WF] >= FAITHFUL)

    def window(
        self, draw: np.random.Generator, *, faithful: bool
    ) -> tuple[int, npt.NDArray[np.int64], U8]:
        """(clip, tokens [F, C] as they were made, u8 [F, S, S, 3] as they should have looked).

        faithful: one of the faithful, every other time one to mend, if there is any.
        """
        windows = self.windows_W2
        if faithful:
            mend = len(self.mending_W2) > 0 and draw.random() < 0.5
            windows = self.mending_W2 if mend else self.faithful_W2
        rollout, start = windows[draw.integers(len(windows))].tolist()
        frames = slice(start, start + FRAMES)
        clip = int(self.clip_R[rollout])
        corners = [(row, column) for row, column in self.corners_RF2[rollout, frames].tolist()]
        pixels, _ = render_at(self.world.plan(clip), corners)
        return clip, self.tokens_RFC[rollout, frames].astype(np.int64), pixels

    def save(self, path: Path) -> None:
        """As .npz; a file that is there is whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(
                file,
                clip=self.clip_R,
                tokens=self.tokens_RFC,
                corners=self.corners_RF2,
                windows=self.windows_W2,
                snr=self.snr_RF,
                settings=json.dumps(self.settings),
            )


def load_rollouts(
    path: Path, source: Source, encode: Callable[[U8], npt.NDArray[np.int16]]
) -> Rollouts:
    """encode: u8 [F, S, S, 3] -> tokens [F, C] of the VQ-GAN that is trained with.

    ValueError if the file is none of `save`, or has other clips or tokens than these.
    """
    found = _read(path)
    if found.settings["source"] != source.identity:
        raise ValueError(
            f"{path} has rollouts of {found.settings['source']}; this run trains on "
            f"{source.identity}"
        )
    some = range(min(CHUNK, len(found.clip_R)))
    true = [source.clip(int(found.clip_R[r]), range(GIVEN))[0] for r in some]
    same = encode(np.concatenate(true)) == np.concatenate(
        [found.tokens_RFC[r, :GIVEN] for r in some]
    )
    if same.mean() < ALIKE:
        raise ValueError(
            f"{path} has tokens of another VQ-GAN: of the true frames' tokens, {same.mean():.0%} "
            "are those of this run's"
        )
    return found


def collect(
    generate: Callable[..., tuple[U8, npt.NDArray[np.int32]]],
    *,
    tasks: Sequence[str],
    split: str,
    samples: int,
    seed: int,
    out: Path | None,
    progress: Callable[[int, int], None],
    concurrency: int,
    about: Mapping[str, Any],
    reconstruct: Any = None,
    ranking: Any = None,
    level: str = "digits",
    frames: str = "60",
    captioned: str = "0.5",
) -> dict[str, Any]:
    """Rollouts of `samples` clips into out/rollouts.npz: `nuwa evaluate --evaluator rollouts`.

    frames: of each, the first GIVEN true; captioned: share with the caption of an image as their
    prompt. Clip i is the same whatever `samples` is; the same call goes on with a file that holds
    fewer. ValueError for what is out of range, and for a file of other settings; OSError if nothing
    can be written to `out`.
    """
    length, share = _number("frames", frames, int), _number("captioned", captioned, float)
    if not FRAMES < length <= MAX_PREDICTED_FRAMES:
        raise ValueError(f"frames {frames} is not in [{FRAMES + 1}, {MAX_PREDICTED_FRAMES}]")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"captioned {captioned} is not in [0, 1]")
    if split != "train":
        raise ValueError(f"rollouts are to train on: give --split train, not {split!r}")
    if "v2v" not in tasks or out is None or ranking:
        raise ValueError("rollouts need task v2v, a folder (--out), and no ranking")
    source = Sprites(level)
    settings = {
        "source": source.identity,
        "frames": length,
        "captioned": share,
        "seed": seed,
        "bundle": about["bundle_hash"],
        "sampling": about["sampling"]["v2v"],
    }
    path = make_writable(out) / FILE
    parts = [_read(path)] if path.exists() else []
    if parts and parts[0].settings != settings:
        raise ValueError(f"{path} has rollouts of other settings; give another folder")
    done = len(parts[0].clip_R) if parts else 0

    def one(number: int) -> tuple[int, U8, npt.NDArray[np.int32]]:
        draw = np.random.default_rng((seed, number))
        index, named = int(draw.integers(ENDLESS)), draw.random() < share
        pixels, tokens = generate(
            task="v2v",
            prompt=source.caption(index, video=False) if named else "",
            frame_count=length,
            seed=seed + number,
            frames=source.clip(index, range(GIVEN))[0],
            tokens=True,
        )
        return index, pixels, tokens

    with ThreadPoolExecutor(concurrency) as pool:
        for first in range(done, samples, CHUNK):
            made = list(pool.map(one, range(first, min(first + CHUNK, samples))))
            parts = [joined([*parts, _rollouts(source.world, made, settings)])]
            parts[0].save(path)
            progress(first + len(made), samples)
    windows = {"windows": len(parts[0].windows_W2), "faithful": len(parts[0].faithful_W2)}
    scores = {"rollouts": len(parts[0].clip_R)} | windows
    return {"tasks": {"v2v": {"scores": scores}}}


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
        np.concatenate([part.snr_RF for part in parts]),
        parts[0].settings,
    )


def _read(path: Path) -> Rollouts:
    try:
        with np.load(path, allow_pickle=False) as file:
            settings = json.loads(str(file["settings"]))
            clip, tokens = file["clip"], file["tokens"]
            corners, windows, snr = file["corners"], file["windows"], file["snr"]
        world = Sprites(settings["source"]["level"]).world
        return Rollouts(world, clip, tokens, corners, windows, snr, settings)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as rollouts: {error}") from None


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} {text!r} is not a number") from None


def _rollouts(
    world: SpriteWorld,
    made: list[tuple[int, U8, npt.NDArray[np.int32]]],
    settings: dict[str, Any],
) -> Rollouts:
    plans = [world.plan(index) for index, _, _ in made]
    frames = [pixels for _, pixels, _ in made]
    corners = [_own_corners(*each) for each in zip(plans, frames, strict=True)]
    windows = [
        (r, start)
        for r, (plan, corners_F2) in enumerate(zip(plans, corners, strict=True))
        for start in _windows(plan, corners_F2)
    ]
    return Rollouts(
        world,
        np.array([index for index, _, _ in made], np.int64),
        np.stack([tokens.reshape(len(tokens), -1) for _, _, tokens in made]).astype(np.int16),
        np.stack(corners),
        np.array(windows, np.int64).reshape(-1, 2),
        np.stack([_snr(*each) for each in zip(plans, corners, frames, strict=True)]),
        settings,
    )


def _snr(plan: Plan, corners_F2: npt.NDArray[np.int16], made: U8) -> npt.NDArray[np.float16]:
    """f16 [F]: Rollouts.snr_RF, the sprite's difference from the background over what is wrong."""
    corners = [(int(row), int(column)) for row, column in np.maximum(corners_F2, 0)]
    real = render_at(plan, corners)[0].astype(np.float64)
    signal_F = np.square(real - np.median(real, axis=(1, 2), keepdims=True)).sum((1, 2, 3))
    noise_F = np.square(real - made).sum((1, 2, 3))
    snr_F = 10.0 * np.log10(signal_F / np.maximum(noise_F, 1.0))
    return np.where((corners_F2 >= 0).all(1), snr_F, -np.inf).astype(np.float16)


def _own_corners(plan: Plan, made: U8) -> npt.NDArray[np.int16]:
    """int16 [F, 2]: Rollouts.corners_RF2, by the centre of the ink, as its shape may have changed.

    A sprite moves by its speed in every frame, so that the places it can be at in a frame are two
    steps apart; the nearest one counts if the ink is no more than SLACK steps aside. Where it is
    nowhere that it could have come to, as beyond the canvas' end, the answer is where it should
    have gone, for up to MOST_ASTRAY frames.
    """
    track, (drawn, _) = plan.track, render_at(plan, [(0, 0)])
    offset_F2 = locate(made).track_F2 - locate(drawn).track_F2[0]
    axis = 0 if track.direction[0] else 1
    first, speed = track.corner(0)[axis], track.speed
    phase_F = (first + speed * (np.arange(len(made)) % 2)) % (2 * speed)
    turns_F = np.round((offset_F2[:, axis] - phase_F) / (2 * speed))
    corner_F2 = np.full_like(offset_F2, track.across)
    corner_F2[:, axis] = phase_F + 2 * speed * turns_F
    near_F = (np.abs(offset_F2 - corner_F2) <= SLACK * speed).all(1)  # no ink: NaN, not near
    inside_F = ((corner_F2 >= 0) & (corner_F2 <= REACH)).all(1)
    seen_F = np.where(near_F & inside_F, corner_F2[:, axis], -1).astype(int)
    corner_F2[:, axis] = _path(seen_F.tolist(), speed)
    return np.where(corner_F2[:, axis, None] < 0, -1, corner_F2).astype(np.int16)


def _path(seen_F: list[int], speed: int) -> list[int]:
    """Coordinates along the way: those seen, -1 for none, and in small gaps those that follow.

    In a gap a sprite goes on as before, and turns at the canvas' ends.
    """
    path: list[int] = []
    astray = 0
    for seen in seen_F:
        before = path[-1] if path else -1
        if before < 0 or (seen >= 0 and abs(seen - before) == speed):
            path.append(seen)
            astray = 0
            continue
        astray += 1
        way = before - path[-2] if len(path) > 1 and path[-2] >= 0 else 0
        there = [each for each in (before + way, before - way) if 0 <= each <= REACH]
        path.append(there[0] if way and there and astray <= MOST_ASTRAY else -1)
    return path


def _windows(plan: Plan, corners_F2: npt.NDArray[np.int16]) -> Iterator[int]:
    """First frames of the windows in which a sprite moves as it may."""
    ways_F2 = np.diff(corners_F2.astype(int), axis=0)
    moves_F = np.abs(ways_F2).sum(1) == plan.track.speed
    turns_F = np.any(ways_F2[1:] != ways_F2[:-1], axis=1)
    there_F = np.all(corners_F2 >= 0, axis=1)
    for start in range(len(corners_F2) - FRAMES + 1):
        end = start + FRAMES
        goes_on = there_F[start:end].all() and moves_F[start : end - 1].all()
        if goes_on and turns_F[start : end - 2].sum() <= MOST_TURNS:
            corners = [(int(row), int(column)) for row, column in corners_F2[start:end]]
            if may_predict(plan.factors.class_index, shown_motion(corners)):
                yield start
