"""Captioned moving sprites: a deterministic, random-access world of short clips.

A sample is a pure function of (VERSION, seed, level, split, index), drawn and rendered with
integers only, so it is bit-identical on every machine and in every worker. Knows nothing of
tokens, batches or models, and needs numpy alone.

Shapes: F = 10 frames, S = 64 canvas side, T = 24 tile side.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from .bank import ANIMALS, DIGITS, TILE, load_bank

VERSION = 1  # part of every sample's identity: raise it when a sample's content changes
FRAMES = 10
SIDE = 64
STEPS = FRAMES - 1
SHORTEST_WAY = 2  # frames of a way out, or back, for it to count as one
REACH = SIDE - TILE  # largest coordinate of a tile's top left corner
LATTICE = 4  # positions and speed of the digits level are multiples of this

LEVELS = ("digits", "full")
SPLITS = ("train", "val", "test", "novel")
CLASSES = DIGITS + ANIMALS
COLOURS = {  # the digits level uses the first four
    "red": (230, 30, 30),
    "green": (30, 200, 60),
    "blue": (40, 70, 255),
    "yellow": (255, 240, 40),
    "orange": (255, 130, 0),
    "purple": (150, 40, 230),
    "cyan": (0, 220, 230),
    "pink": (255, 120, 190),
}
BACKGROUNDS = {  # the digits level uses the first; every colour contrasts with every one
    "black": (0, 0, 0),
    "gray": (112, 112, 112),
    "white": (255, 255, 255),
    "brown": (72, 40, 16),
}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (row, column)
MOTIONS = (
    *DIRECTIONS,
    "left then right",
    "right then left",
    "up then down",
    "down then up",
)


@dataclass(frozen=True)
class Factors:
    """What a caption says. `class_index` counts from 0 in CLASSES (segmentation adds 1)."""

    class_index: int
    colour: str
    background: str
    motion: str

    @property
    def image_caption(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        name = CLASSES[self.class_index]
        return f"{article} {self.colour} {name} on a {self.background} background ."

    @property
    def video_caption(self) -> str:
        return f"{self.image_caption[:-2]} moving {self.motion} ."


@dataclass(frozen=True)
class SpriteSample:
    """One clip with its class map (0 background, 1..20 the class), captions and factors."""

    frames: np.ndarray  # u8[F,S,S,3]
    segmentation: np.ndarray  # u8[F,S,S]
    video_caption: str
    image_caption: str
    factors: Factors


@dataclass(frozen=True)
class Plan:
    """Everything a clip is drawn from: the glyph and its top left corner in every frame."""

    factors: Factors
    glyph_TT: np.ndarray
    track: Track

    def shown_motion(self, start: int) -> str | None:
        """`shown_motion` of the ten frames from `start` on."""
        return shown_motion([self.track.corner(f) for f in range(start, start + FRAMES)])


@dataclass(frozen=True)
class Track:
    """A tile's way: out from `start` in `direction`, `speed` pixels a frame, turning for ever.

    The first leg is `first` frames long, all later ones `leg`; across: the other axis' coordinate.
    """

    direction: tuple[int, int]
    speed: int
    start: int
    across: int
    first: int
    leg: int

    def corner(self, frame: int) -> tuple[int, int]:
        """Top left (row, column) of the tile in a frame."""
        steps = frame
        if frame > self.first:
            round_trip = (frame - self.first) % (2 * self.leg)
            steps = self.first - min(round_trip, 2 * self.leg - round_trip)
        along = self.start + self.speed * steps
        if sum(self.direction) < 0:
            along = REACH - along
        return (along, self.across) if self.direction[0] else (self.across, along)


class SpriteWorld:
    """Clips of one level and split; `novel` holds class-motion pairs the other splits never show.

    level: "digits" (10 digits, 4 colours, black, 4-pixel lattice) or "full" (20 classes, 8
    colours, 4 backgrounds, any position). ValueError for any other level or split.
    """

    def __init__(self, level: str, split: str, seed: int = 0) -> None:
        _check("level", level, LEVELS)
        _check("split", split, SPLITS)
        self.level, self.split, self.seed = level, split, seed
        small = level == "digits"
        self.class_count = len(DIGITS) if small else len(CLASSES)
        self.colours = tuple(COLOURS)[:4] if small else tuple(COLOURS)
        self.backgrounds = tuple(BACKGROUNDS)[:1] if small else tuple(BACKGROUNDS)
        novel = novel_pairs()
        self.pairs = tuple(
            (class_index, motion)
            for class_index in range(self.class_count)
            for motion in MOTIONS
            if ((class_index, motion) in novel) == (split == "novel")
        )
        glyph_split = "test" if split == "novel" else split
        banks = ("digits",) if small else ("digits", "animals")
        self.glyphs = [glyphs for bank in banks for glyphs in load_bank(bank)[glyph_split]]

    def sample(self, index: int) -> SpriteSample:
        """Clip `index` >= 0; there is no last one."""
        plan = self.plan(index)
        frames, segmentation = render(plan, range(FRAMES))
        factors = plan.factors
        return SpriteSample(
            frames, segmentation, factors.video_caption, factors.image_caption, factors
        )

    def long_clip(self, index: int, frames: range) -> tuple[np.ndarray, np.ndarray]:
        """(u8[F,S,S,3], u8[F,S,S]) of any `frames` >= 0 of clip `index` as it goes on for ever.

        A sprite that moves one way turns where the canvas ends; one that moves out and back keeps
        on doing so. The first ten frames are those of `sample`.
        """
        return render(self.plan(index), frames)

    def frame(self, index: int, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """(u8[S,S,3], u8[S,S]): one frame of clip `index` and its class map, drawn alone."""
        frames, segmentation = render(self.plan(index), [frame])
        return frames[0], segmentation[0]

    def factors(self, index: int) -> Factors:
        """The factors (and by them the captions) of clip `index`, without rendering it."""
        return self.plan(index).factors

    def plan(self, index: int) -> Plan:
        """What clip `index` is drawn from. ValueError for a negative one."""
        index = operator.index(index)
        if index < 0:
            raise ValueError(f"sample index is {index}; it must not be negative")
        draw = _Draw(f"{VERSION}/{self.seed}/{self.level}/{self.split}/{index}")
        class_index, motion = draw.choice(self.pairs)
        factors = Factors(
            class_index, draw.choice(self.colours), draw.choice(self.backgrounds), motion
        )
        glyph_TT = draw.choice(self.glyphs[class_index])
        return Plan(factors, glyph_TT, self._track(motion, draw))

    def _track(self, motion: str, draw: _Draw) -> Track:
        """Drawn so that the clip's frames are all inside and the turn, if any, happens in them."""
        if self.level == "digits":
            grid, speed, turn = LATTICE, LATTICE, draw.between(4, 5)
        else:
            grid, speed, turn = 1, draw.between(2, 4), draw.between(3, 6)
        one_way = " then " not in motion
        if one_way:
            turn = STEPS
        travel = [speed * (min(f, turn) - max(f - turn, 0)) for f in range(FRAMES)]
        start = grid * draw.between(-min(travel) // grid, (REACH - max(travel)) // grid)
        across = grid * draw.between(0, REACH // grid)
        if one_way:  # to the canvas' end, and from there to the other one
            turn = (REACH - start) // speed
            leg = start // speed + turn
        else:
            leg = max(turn, STEPS - turn)
        return Track(DIRECTIONS[motion.split()[0]], speed, start, across, turn, leg)


@functools.cache
def novel_pairs() -> frozenset[tuple[int, str]]:
    """The (class index, motion) pairs kept for `novel`: one a class, motions dealt out evenly."""
    pairs = set()
    for bank in (DIGITS, ANIMALS):
        shuffled = sorted(bank, key=lambda name: hashlib.sha256(f"novel/{name}".encode()).digest())
        pairs |= {(CLASSES.index(n), MOTIONS[i % len(MOTIONS)]) for i, n in enumerate(shuffled)}
    return frozenset(pairs)


def shown_motion(corners: Sequence[tuple[int, int]]) -> str | None:
    """What a tile does whose top left corners (row, column) these are, as a caption says it.

    None if it turns twice. A leg of less than SHORTEST_WAY frames at either end goes unnoticed.
    """
    ways = [
        (np.sign(after[0] - before[0]), np.sign(after[1] - before[1]))
        for before, after in itertools.pairwise(corners)
    ]
    names = {way: name for name, way in DIRECTIONS.items()}
    legs = [(names[way], len(list(steps))) for way, steps in itertools.groupby(ways)]
    motion = " then ".join(name for name, steps in legs if steps >= SHORTEST_WAY)
    return motion if motion in MOTIONS else None


class _Draw:
    """A stream of integers (splitmix64) started by the SHA-256 of a name."""

    MASK = (1 << 64) - 1

    def __init__(self, name: str) -> None:
        self.state = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")

    def below(self, count: int) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & self.MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & self.MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & self.MASK
        return ((z ^ (z >> 31)) * count) >> 64

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low + 1)

    def choice(self, options):
        return options[self.below(len(options))]


def render(plan: Plan, frame_indices: Collection[int]) -> tuple[np.ndarray, np.ndarray]:
    """(u8[F,S,S,3], u8[F,S,S]): these frames of a clip and their class maps."""
    return render_at(plan, [plan.track.corner(frame) for frame in frame_indices])


def render_at(plan: Plan, corners: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(u8[F,S,S,3], u8[F,S,S]): a clip's glyph with its tile at these corners, and class maps."""
    factors = plan.factors
    background = np.array(BACKGROUNDS[factors.background], np.int32)
    ink = np.array(COLOURS[factors.colour], np.int32)
    alpha = plan.glyph_TT.astype(np.int32)[:, :, None]
    tile_TT3 = ((background * (255 - alpha) + ink * alpha + 127) // 255).astype(np.uint8)
    # A pixel belongs to the class when at least half of it is ink.
    class_TT = np.where(plan.glyph_TT >= 128, factors.class_index + 1, 0).astype(np.uint8)

    frames = np.empty((len(corners), SIDE, SIDE, 3), np.uint8)
    frames[:] = background
    segmentation = np.zeros((len(corners), SIDE, SIDE), np.uint8)
    for i, (row, column) in enumerate(corners):
        frames[i, row : row + TILE, column : column + TILE] = tile_TT3
        segmentation[i, row : row + TILE, column : column + TILE] = class_TT
    return frames, segmentation


def _check(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}; choose one of {', '.join(choices)}")
