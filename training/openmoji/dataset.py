"""Reads a picture folder (folder.py says what is in it), and deals its samples out to training.

Any folder of that form will do, whoever made it. Knows neither drawings nor models.

Legend: B samples, H = W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .folder import CAPTIONS, DATA, FORMAT, PICTURES, SKETCHES
from .names import SPLITS

Samples = Callable[[int, int], npt.NDArray[np.uint8]]


class PictureFolder:
    """The pictures of one split, by index from 0; `data` is the content of data.json.

    FileNotFoundError or ValueError says which file is missing or at fault.
    """

    def __init__(self, folder: Path, split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        self.folder, self.split = folder, split
        self.data = json.loads(_existing(folder / DATA).read_text(encoding="utf-8"))
        if self.data.get("format") != FORMAT:
            raise ValueError(f"{folder / DATA} has format {self.data.get('format')}, not {FORMAT}")
        self.resolution: int = self.data["resolution"]
        self.classes: tuple[str, ...] = tuple(self.data["classes"])
        rows = json.loads(_existing(folder / CAPTIONS).read_text(encoding="utf-8"))
        self._pictures = np.load(_existing(folder / PICTURES), mmap_mode="r")
        self._sketches = np.load(_existing(folder / SKETCHES), mmap_mode="r")
        shape = (len(rows), self.resolution, self.resolution)
        for name, array, wanted in (
            (PICTURES, self._pictures, (*shape, 3)),
            (SKETCHES, self._sketches, shape),
        ):
            if array.shape != wanted or array.dtype != np.uint8:
                raise ValueError(
                    f"{folder / name} is {array.dtype} {array.shape}, not uint8 {wanted}"
                )
        self._rows = np.array([i for i, row in enumerate(rows) if row["split"] == split])
        if not len(self._rows):
            raise ValueError(f"{folder} has no picture of split {split!r}")
        self._captions = [rows[i]["caption"] for i in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def picture(self, index: int) -> npt.NDArray[np.uint8]:
        """u8 [H, W, 3]."""
        return np.array(self._pictures[self._rows[index]])

    def sketch(self, index: int) -> npt.NDArray[np.uint8]:
        """u8 [H, W]: class ids; `classes` has their names."""
        return np.array(self._sketches[self._rows[index]])

    def caption(self, index: int) -> str:
        """A few words, no sentence."""
        return self._captions[index]

    def pictures(self, seed: int = 0) -> Samples:
        """What trains a tokenizer of pictures, see `_Dealt`."""
        return _Dealt(self, self.picture, self.data["background"], seed)

    def sketches(self, seed: int = 0) -> Samples:
        """What trains a tokenizer of class maps, see `_Dealt`."""
        return _Dealt(self, self.sketch, 0, seed)


class _Dealt:
    """(first, count) -> u8 [count, H, W, ...]: the split without end, in a new order each round.

    A sample is mirrored or not and moved by up to a sixteenth of its side, so that a tokenizer does
    not learn a small split by heart; what it moves in from is `blank`. Depends on seed and number
    alone: the same number is the same sample in every run.
    """

    def __init__(
        self,
        folder: PictureFolder,
        one: Callable[[int], np.ndarray],
        blank: npt.ArrayLike,
        seed: int,
    ) -> None:
        self.count, self.one, self.blank, self.seed = len(folder), one, blank, seed
        self.reach = folder.resolution // 16
        self._round, self._order = -1, np.empty(0, np.int64)

    def __call__(self, first: int, count: int) -> npt.NDArray[np.uint8]:
        return np.stack([self._sample(number) for number in range(first, first + count)])

    def _sample(self, number: int) -> npt.NDArray[np.uint8]:
        turn, place = divmod(number, self.count)
        if turn != self._round:
            self._round = turn
            self._order = np.random.default_rng((self.seed, turn)).permutation(self.count)
        sample = self.one(int(self._order[place]))
        draw = np.random.default_rng((self.seed, turn, place))
        if draw.random() < 0.5:
            sample = sample[:, ::-1]
        down, right = (int(d) for d in draw.integers(-self.reach, self.reach + 1, size=2))
        return moved(sample, down, right, self.blank)


def moved(
    sample: npt.NDArray[np.uint8], down: int, right: int, blank: npt.ArrayLike
) -> npt.NDArray[np.uint8]:
    """[H, W, ...] moved by whole pixels, negative is up or left; `blank` fills what is left."""
    height, width = sample.shape[:2]
    result = np.empty_like(sample)
    result[:] = blank
    rows, columns = height - abs(down), width - abs(right)
    top, left = max(down, 0), max(right, 0)
    from_top, from_left = max(-down, 0), max(-right, 0)
    result[top : top + rows, left : left + columns] = sample[
        from_top : from_top + rows, from_left : from_left + columns
    ]
    return result


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; `nuwa data openmoji --out {path.parent}` makes a picture folder"
        )
    return path
