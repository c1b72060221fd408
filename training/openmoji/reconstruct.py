"""What a trained VQ-GAN makes of a picture folder: one PNG, and a figure over a whole split.

    python -m nuwa.training.openmoji.reconstruct --tokenizer runs/openmoji-tokenizer/checkpoint \\
        --data data/openmoji --out reconstruction.png

Rows of the PNG alternate: samples, then what the VQ-GAN made of the codes of the samples above.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from ..checkpoint import load_tokenizer
from ..metrics import mean_iou, psnr
from ..pictures import contact_sheet, paint_classes, save_png
from ..vqgan import VQGAN, class_maps, one_hot, to_bytes, to_signed
from .dataset import PictureFolder
from .names import SPLITS

COLUMNS = 12
BATCH = 16


@torch.no_grad()
def reconstruct(vqgan: VQGAN, samples: np.ndarray, *, sketches: bool) -> np.ndarray:
    """uint8 [B, H, W, 3] (or class maps [B, H, W]) through the codes and back, same shape."""
    results = []
    for first in range(0, len(samples), BATCH):
        some = torch.from_numpy(samples[first : first + BATCH])
        inputs = one_hot(some, vqgan.config.channels) if sketches else to_signed(some)
        output = vqgan.decode(vqgan.encode(inputs).codes)
        results.append((class_maps(output) if sketches else to_bytes(output)).numpy())
    return np.concatenate(results)


def score(samples: np.ndarray, made: np.ndarray, classes: int | None = None) -> dict[str, float]:
    """Mean over pictures of the PSNR in dB; of class maps, mean IoU and share of equal pixels."""
    pairs = list(zip(made, samples, strict=True))
    if classes is None:
        return {"psnr": float(np.mean([psnr(m, s) for m, s in pairs]))}
    miou = float(np.mean([mean_iou(m, s, classes) for m, s in pairs]))
    return {"miou": miou, "pixel_accuracy": float((samples == made).mean())}


def sheet(samples: np.ndarray, made: np.ndarray, *, scale: int) -> np.ndarray:
    """One picture: rows of samples over rows of what was made of them."""
    if samples.ndim == 3:
        samples, made = paint_classes(samples), paint_classes(made)
    count = len(samples) // COLUMNS * COLUMNS or len(samples)
    columns = min(COLUMNS, count)
    bands = [
        half[first : first + columns]
        for first in range(0, count, columns)
        for half in (samples, made)
    ]
    return contact_sheet(np.concatenate(bands), columns, scale=scale)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a trained VQ-GAN")
    parser.add_argument("--data", type=Path, required=True, help="picture folder")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--split", choices=SPLITS, default="test", help="(%(default)s)")
    parser.add_argument("--sketches", action="store_true", help="the VQ-GAN is one of class maps")
    parser.add_argument("--count", type=int, default=3 * COLUMNS, help="shown (%(default)s)")
    parser.add_argument("--scale", type=int, default=2, help="enlargement (%(default)s)")
    arguments = parser.parse_args(argv)
    vqgan = load_tokenizer(arguments.tokenizer)
    folder = PictureFolder(arguments.data, arguments.split)
    one = folder.sketch if arguments.sketches else folder.picture
    samples = np.stack([one(i) for i in range(len(folder))])
    made = reconstruct(vqgan, samples, sketches=arguments.sketches)
    classes = len(folder.classes) if arguments.sketches else None
    shown = np.linspace(0, len(samples) - 1, min(arguments.count, len(samples))).astype(int)
    save_png(arguments.out, sheet(samples[shown], made[shown], scale=arguments.scale))
    figures = {"split": arguments.split, "samples": len(samples), **score(samples, made, classes)}
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
