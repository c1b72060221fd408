"""Contact sheets of an evaluation: what was given, what came out, and a real answer.

Knows how to draw questions and answers; reads no report.

Shapes: F frames, H = W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .evaluation.question import Question
from .pictures import paint_classes

NEAREST = Image.Resampling.NEAREST
CAPTION_HEIGHT = 14
GAP = 6
PAPER, RIGHT, WRONG = (72, 72, 72), (120, 220, 120), (240, 120, 120)
HIDDEN = (150, 110, 150)
LONG_ROWS, LONG_EVERY = 8, 4  # clips on the sheet of long clips, and which frames of each


@dataclass(frozen=True)
class Specimen:
    """An answer u8[F,H,W,3] to a question, and whether it is judged right."""

    question: Question
    made: np.ndarray
    right: bool

    @property
    def lines(self) -> list[np.ndarray]:
        """u8[F,H,W,3] each: what was given (if pixels were), what was made, a real answer."""
        given = given_picture(self.question)
        return ([] if given is None else [given]) + [self.made, self.question.real]


@dataclass(frozen=True)
class LongSpecimen:
    """A long clip u8[F,H,W,3] beside the real one."""

    made: np.ndarray
    real: np.ndarray


def given_picture(question: Question) -> np.ndarray | None:
    """u8[F,H,W,3]: the sketch in colours, or the given frames, tinted where hidden."""
    if question.sketch is not None:
        return paint_classes(question.sketch)
    if question.frames is None:
        return None
    shown = np.empty_like(question.real)
    shown[:] = HIDDEN
    given = question.frames
    tinted = given // 2 + np.array(HIDDEN, np.uint8) // 2
    known = question.known[: len(given), ..., None]
    shown[: len(given)] = np.where(known, given, tinted)
    return shown


def contact_sheet(specimens: list[Specimen]) -> Image.Image:
    """Each specimen's lines of frames, then its caption: green if judged right, red if not."""
    frame_count, height, width = specimens[0].made.shape[:3]
    scale, columns = (2, 6) if frame_count == 1 else (1, 2)
    step_x, step_y = width * scale + 1, height * scale + 1  # a line of paper between frames
    cell_width = max(frame_count * step_x, 200) + GAP
    line_count = len(specimens[0].lines)
    cell_height = line_count * step_y + CAPTION_HEIGHT + GAP
    rows = -(-len(specimens) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, specimen in enumerate(specimens):
        left, top = i % columns * cell_width, i // columns * cell_height
        for line, clip in enumerate(specimen.lines):
            _paste(sheet, clip, left, top + line * step_y, scale)
        caption = specimen.question.prompt or "(no prompt)"
        colour = RIGHT if specimen.right else WRONG
        draw.text((left + 2, top + line_count * step_y), caption, fill=colour)
    return sheet


def long_sheet(specimens: list[LongSpecimen]) -> Image.Image:
    """Every fourth frame of the first clips, each above the real one."""
    pairs = specimens[:LONG_ROWS]
    frames, height, width = pairs[0].made[::LONG_EVERY].shape[:3]
    row_height = 2 * (height + 1) + GAP
    sheet = Image.new("RGB", (frames * (width + 1), len(pairs) * row_height), PAPER)
    for row, pair in enumerate(pairs):
        for line, clip in enumerate((pair.made, pair.real)):
            _paste(sheet, clip[::LONG_EVERY], 0, row * row_height + line * (height + 1), 1)
    return sheet


def _paste(sheet: Image.Image, clip: np.ndarray, left: int, top: int, scale: int) -> None:
    for f, frame in enumerate(clip):
        height, width = frame.shape[0] * scale, frame.shape[1] * scale
        picture = Image.fromarray(frame).resize((width, height), NEAREST)
        sheet.paste(picture, (left + f * (width + 1), top))
