"""Turns an evaluation report into a table, files and contact sheets.

Knows the shape of the report and how to draw; measures nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

NEAREST = Image.Resampling.NEAREST
CAPTION_HEIGHT = 14
GAP = 6
PAPER, RIGHT, WRONG = (72, 72, 72), (120, 220, 120), (240, 120, 120)

NOTES = """\
- real, VQ: what the judge makes of the same real clips, as they are and after a round trip
  through the image tokenizer; model / VQ is the share of that ceiling that the model reaches.
- fid_judge is a Fréchet distance on the judge's features of shape (lower is better): it is not
  FID, it does not see colour or place, and it depends on the number of samples.
- v2v is given four frames and no text. They do not tell whether the sprite will turn, so even a
  perfect predictor misses some motions (on digits/test it reaches 0.89); psnr_next is the PSNR of
  the first predicted frame, which on the digits level they do determine.
"""


@dataclass(frozen=True)
class Specimen:
    """A generated clip (or image) u8[F,H,W,3] beside the real one, for the contact sheet."""

    made: np.ndarray
    real: np.ndarray
    caption: str
    right: bool


def format_report(report: dict) -> str:
    """The report as a Markdown table with the notes that it needs to be read."""
    lines = [
        f"# Sprites: level {report['level']}, split {report['split']}, "
        f"{report['samples']} samples, seed {report['seed']}",
        "",
        "| task | score | model | 95 % interval | real | VQ | model / VQ |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for task, result in report["tasks"].items():
        for name, score in result["scores"].items():
            decimals = 1 if name.startswith("psnr") else 3
            model, low, high, real, ceiling = (
                _number(score[key], decimals)
                for key in ("model", "low", "high", "real", "reconstructed")
            )
            interval = f"{low} .. {high}" if low != "-" else "-"
            ratio = _number(score["ratio"], 3)
            lines.append(
                f"| {task} | {name} | {model} | {interval} | {real} | {ceiling} | {ratio} |"
            )
    return "\n".join(lines) + "\n\n" + NOTES


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def write_report(out: Path, report: dict, specimens: dict[str, list[Specimen]]) -> None:
    """Writes report.json, report.md and TASK.png for each task into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, allow_nan=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    (out / "report.md").write_text(format_report(report), encoding="utf-8")
    for task, rows in specimens.items():
        contact_sheet(rows).save(out / f"{task}.png")


def contact_sheet(specimens: list[Specimen]) -> Image.Image:
    """Each specimen's frames above the real ones, caption below: green if judged all right."""
    frame_count, height, width = specimens[0].made.shape[:3]
    scale, columns = (2, 6) if frame_count == 1 else (1, 2)
    step_x, step_y = width * scale + 1, height * scale + 1  # a line of paper between frames
    cell_width = max(frame_count * step_x, 200) + GAP
    cell_height = 2 * step_y + CAPTION_HEIGHT + GAP
    rows = -(-len(specimens) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, specimen in enumerate(specimens):
        left, top = i % columns * cell_width, i // columns * cell_height
        for line, clip in enumerate((specimen.made, specimen.real)):
            for f, frame in enumerate(clip):
                picture = Image.fromarray(frame).resize((width * scale, height * scale), NEAREST)
                sheet.paste(picture, (left + f * step_x, top + line * step_y))
        colour = RIGHT if specimen.right else WRONG
        draw.text((left + 2, top + 2 * step_y), specimen.caption, fill=colour)
    return sheet
