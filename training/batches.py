"""Draws the batches of multi-task training: what is fed, what is predicted, what conditions it.

Every batch has rows with a visual condition first (sketches, then pictures with a hidden part),
then rows with text alone. A row's task follows from its conditions:

    sketch                S2I, S2V     every token is predicted
    hidden part           I2I, TI2I, TV2V   known tokens are given, hidden ones predicted
    caption               T2I, T2V     every token is predicted
    "none", a clip        V2V          at any time of a longer clip; all but its first frame; some
                                       tokens may be fed as the model itself draws them, or as one
                                       that looks almost the same, or all as it drew them in a
                                       rollout, and the prompt may say what is seen, though not how
                                       it moves; it may be of what no prompt ever names

Legend: B rows, V rows with a visual condition, N positions, F frames, h, w tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nuwa.spec.config import ModelConfig
from nuwa.spec.grid import Grid
from nuwa.spec.known import blank_hidden, hidden_edges, known_cells
from nuwa.spec.tasks import UNCONDITIONAL_PROMPT

from .clips import Clips, encode_frames
from .rollouts import Rollouts
from .vqgan import VQGAN

Draw = np.random.Generator
Bool = npt.NDArray[np.bool_]

# How often a box of whole patches around the object has 0, 1, 2 of them to spare on a side. People
# draw tight boxes, and in those a model that begins one patch too late has no room left.
SPARE = (0.6, 0.25, 0.15)
# Shares of an object that a half hides which cuts through it.
CUT = (0.1, 0.6)
NEAR = 8  # codes that a token may be mistaken for


@dataclass(frozen=True)
class Batch:
    """fed_BN: tokens that positions are fed; target_BN: what they predict; weight_BN: 1 where that
    counts; prompts: B texts; visual_VN: ids of the first V rows; time_B: first time positions;
    own_BN: where the model's own draws are to be fed instead.
    """

    grid: Grid
    fed_BN: Tensor
    target_BN: Tensor
    weight_BN: Tensor
    prompts: list[str]
    visual_VN: Tensor | None
    time_B: Tensor | None
    own_BN: Tensor | None


@dataclass(frozen=True)
class Rows:
    """How many rows of each kind a batch of images, or of clips, has; shares of captions dropped.

    captioned_sketches, captioned_hidden: shares of those rows whose prompt is the caption, not
    "none"; captioned_covered: the same where the mask leaves nothing of the object, so that only a
    caption tells what to draw; cut: share of the hidden rows in which a half hides a part of the
    object, and no caption says what it is: few masks of others do; none: share of the text rows
    whose prompt is "none". Of these, where they are clips: anywhere: share that is cut from
    anywhere in a longer clip; steady: share of all that is chosen from steady clips; own: the most
    of a row's tokens that the model draws; mistaken: the most that are fed as a code near to the
    true one; named: share of those from anywhere whose prompt is the caption of an image of them
    instead; rolled: share of those from anywhere that are windows of rollouts, which without a
    caption begin with the object as it was; strange: share of all but these that show what no
    caption names, so that the model looks at it instead of recalling one that it knows.
    """

    text: int
    sketches: int = 0
    hidden: int = 0
    captioned_sketches: float = 0.7
    captioned_hidden: float = 0.4
    captioned_covered: float = 0.9
    cut: float = 0.0
    none: float = 0.1
    anywhere: float = 0.5
    steady: float = 0.0
    own: float = 0.0
    mistaken: float = 0.0
    named: float = 0.0
    rolled: float = 0.0
    strange: float = 0.0


class Batches:
    """Batches of `clips` for a model with this config; vqgan tokenizes what is partly hidden."""

    def __init__(
        self,
        config: ModelConfig,
        clips: Clips,
        vqgan: VQGAN,
        rollouts: Rollouts | None = None,
    ) -> None:
        self.config, self.clips, self.vqgan, self.rollouts = config, clips, vqgan, rollouts

    @cached_property
    def _near_KJ(self) -> npt.NDArray[np.int64]:
        return near_codes(self.vqgan.quantize.embedding.weight, NEAR)

    def images(self, draw: Draw, rows: Rows) -> Batch:
        """Single frames."""
        return self._batch(draw, rows, video=False)

    def videos(self, draw: Draw, rows: Rows) -> Batch:
        """Whole clips."""
        return self._batch(draw, rows, video=True)

    def _batch(self, draw: Draw, rows: Rows, *, video: bool) -> Batch:
        frames = self.clips.source.frames
        total = rows.sketches + rows.hidden + rows.text
        text = slice(total - rows.text, total)
        index = draw.integers(self.clips.count, size=total)
        shares = np.concatenate(
            [
                np.full(rows.sketches, 1.0 - rows.captioned_sketches),
                np.full(rows.hidden, 1.0 - rows.captioned_hidden),
                np.full(rows.text, rows.none),
            ]
        )
        none = draw.random(total) < shares
        predicted = none & video
        predicted[: text.start] = False
        anywhere = predicted & (draw.random(total) < rows.anywhere)
        steady = predicted & (draw.random(total) < rows.steady)
        rolled = anywhere & (draw.random(total) < rows.rolled)
        named = anywhere & (draw.random(total) < rows.named)
        strange = predicted & ~rolled & ~named & (draw.random(total) < rows.strange)
        for row in np.flatnonzero(predicted & ~rolled).tolist():
            index[row] = self._predictable(draw, steady=bool(steady[row]))
        frame = draw.integers(frames, size=total)
        cut = np.zeros(total, bool)
        cut[rows.sketches : text.start] = draw.random(rows.hidden) < rows.cut
        none |= cut
        for row in np.flatnonzero(cut).tolist():
            index[row], frame[row] = self._cuttable(draw, video=video)
        parts = [range(frames) if video else range(f, f + 1) for f in frame.tolist()]
        spans = list(zip(index.tolist(), parts, strict=True))
        target = self.clips.codes(spans)
        fed, weight = target.copy(), np.ones(target.shape, np.float32)
        time, visual = np.zeros(total, np.int64), []
        if rows.sketches:
            codes = self.clips.sketches(spans[: rows.sketches])
            visual += list(codes + self.config.image.codebook_size)
        for row in range(rows.sketches, text.start):
            known, codes, edges, covered = self._hide(draw, *spans[row], cut=bool(cut[row]))
            if covered:
                none[row] = draw.random() >= rows.captioned_covered
            fed[row] = np.where(known, codes, target[row])
            weight[row] = ~known
            visual.append(np.where(known, codes, self.config.hidden + edges))
        for row in np.flatnonzero(anywhere | strange).tolist():
            if rolled[row]:
                index[row], fed[row], target[row] = self._rolled(draw, named=bool(named[row]))
            else:
                start = self._start(draw, int(index[row])) if anywhere[row] else 0
                fed[row] = target[row] = self._window(
                    int(index[row]), start, strange=bool(strange[row])
                )
        weight[anywhere | strange, 0] = 0.0  # nothing before it tells what it is
        time[anywhere] = draw.integers(self.config.decoder.grid.frames, size=int(anywhere.sum()))
        self._mistake(draw, fed, predicted * draw.random(total) * rows.mistaken, whole=anywhere)
        most = predicted * draw.random(total) * rows.own
        own = draw.random(target.shape) < most[:, None, None]
        own[:, 0] = False  # a given frame is true
        prompts = [
            UNCONDITIONAL_PROMPT
            if each_none and not each_named
            else self.clips.source.caption(int(i), video=video and not each_named)
            for i, each_none, each_named in zip(index, none, named, strict=True)
        ]
        grid = self.config.decoder.grid
        return Batch(
            Grid(len(parts[0]), grid.height, grid.width),
            torch.from_numpy(fed.reshape(total, -1)),
            torch.from_numpy(target.reshape(total, -1)),
            torch.from_numpy(weight.reshape(total, -1)),
            prompts,
            torch.from_numpy(np.stack(visual).reshape(len(visual), -1)) if visual else None,
            torch.from_numpy(time) if time.any() else None,
            torch.from_numpy(own.reshape(total, -1)) if own.any() else None,
        )

    def _predictable(self, draw: Draw, *, steady: bool) -> int:
        """A clip to predict from its start; ValueError if there hardly is one."""
        source = self.clips.source
        for _ in range(1000):
            index = int(draw.integers(self.clips.count))
            if source.may_show(index, 0) and (source.steady(index) or not steady):
                return index
        what = "goes on as it begins; train with --steady-clips 0" if steady else "may be predicted"
        raise ValueError(f"none of 1000 clips drawn from {self.clips.count} {what}")

    def _cuttable(self, draw: Draw, *, video: bool) -> tuple[int, int]:
        """(clip, frame) in which there is an object that a half can cut through; or ValueError."""
        frames = self.clips.source.frames
        for _ in range(1000):
            index, frame = int(draw.integers(self.clips.count)), int(draw.integers(frames))
            span = range(frames) if video else range(frame, frame + 1)
            if cutting_halves(self._shown(index, span)):
                return index, frame
        raise ValueError(
            f"in none of 1000 clips drawn from {self.clips.count} does a half of the canvas cut "
            f"through an object; train with --cut-images 0"
        )

    def _shown(self, index: int, span: range) -> Bool:
        """bool [H, W]: where there is an object in any of these frames."""
        return np.asarray(self.clips.source.clip(index, span)[1].any(axis=0))

    def _start(self, draw: Draw, index: int) -> int:
        """First frame of a window anywhere in a clip that goes on for ever."""
        source = self.clips.source
        start = int(draw.integers(4 * source.frames))
        while not source.may_show(index, start):
            start = int(draw.integers(4 * source.frames))
        return start

    def _window(self, index: int, start: int, *, strange: bool) -> np.ndarray:
        """Tokens [F, C] of as many frames as a clip has."""
        source = self.clips.source
        frames = range(start, start + source.frames)
        pixels = source.stranger(index, frames) if strange else source.clip(index, frames)[0]
        return encode_frames(self.vqgan, pixels).astype(np.int64)

    def _rolled(self, draw: Draw, *, named: bool) -> tuple[int, np.ndarray, np.ndarray]:
        """(clip, tokens [F, C] as the model went on with it, the true ones) of a rollout.

        Without a name of what it was, it still begins as that.
        """
        assert self.rollouts is not None, "without rollouts none is drawn"
        clip, made, pixels = self.rollouts.window(draw, faithful=not named)
        return clip, made, encode_frames(self.vqgan, pixels).astype(np.int64)

    def _mistake(self, draw: Draw, fed_BFC: np.ndarray, share_B: np.ndarray, whole: Bool) -> None:
        """Feeds codes near to the true ones for a share of each row's tokens, in place.

        whole: rows whose first frame need not be a given one, which is true.
        """
        if not share_B.any():
            return
        wrong = draw.random(fed_BFC.shape) < share_B[:, None, None]
        wrong[~whole, 0] = False
        true = fed_BFC[wrong]
        fed_BFC[wrong] = self._near_KJ[true, draw.integers(self._near_KJ.shape[1], size=len(true))]

    def _hide(
        self, draw: Draw, index: int, span: range, *, cut: bool
    ) -> tuple[Bool, np.ndarray, np.ndarray, bool]:
        """Which tokens of a clip stay known [F, C], the tokens once the rest is blanked.

        Also the hidden_edges of one frame [C], and whether nothing of the object is left.
        """
        pixels, shown = self.clips.source.clip(index, span)
        grid = self.config.decoder.grid
        if cut:
            mask = draw.choice(cutting_halves(np.asarray(shown.any(axis=0))))
        else:
            # For half of them room for the object wherever its clip takes it.
            whole = range(self.clips.source.frames) if draw.random() < 0.5 else span
            mask = draw_mask(draw, self._shown(index, whole), pixels.shape[1] // grid.height)
        known_hw = known_cells(mask, grid.height, grid.width)
        assert self.config.visual is not None, "without a visual encoder nothing is hidden"
        levels = self.config.visual.edge_levels
        edges = hidden_edges(mask, grid.height, grid.width, levels).reshape(-1)
        known = np.broadcast_to(known_hw, (len(span), grid.height, grid.width))
        codes = encode_frames(self.vqgan, blank_hidden(pixels, known)).astype(np.int64)
        covered = not (shown.astype(bool) & ~mask).any()
        return known.reshape(len(span), -1), codes, edges, covered


@torch.no_grad()
def near_codes(weight_KE: Tensor, count: int) -> npt.NDArray[np.int64]:
    """int64 [K, min(count, K - 1)]: of each code those nearest to it, without itself."""
    weight_KE = weight_KE.float()
    found, codes = [], torch.arange(len(weight_KE), device=weight_KE.device)
    for part in codes.split(1024):  # of a large codebook not all distances at once
        distance_PK = torch.cdist(weight_KE[part], weight_KE)
        distance_PK[codes[: len(part)], part] = torch.inf
        found.append(distance_PK.topk(min(count, len(codes) - 1), largest=False).indices)
    return torch.cat(found).cpu().numpy()


def halves(height: int, width: int) -> Bool:
    """bool [4, H, W]: the upper, the lower, the left and the right one."""
    masks = np.zeros((4, height, width), bool)
    masks[0, : height // 2] = masks[1, height // 2 :] = True
    masks[2, :, : width // 2] = masks[3, :, width // 2 :] = True
    return masks


def cutting_halves(inside_HW: Bool) -> list[Bool]:
    """Those that hide a share of the object within CUT."""
    low, high = CUT
    whole = max(int(inside_HW.sum()), 1)
    masks = halves(*inside_HW.shape)
    return [mask for mask in masks if low <= (mask & inside_HW).sum() / whole <= high]


def draw_mask(draw: Draw, inside_HW: Bool, patch: int) -> Bool:
    """bool [H, W], True = hidden: a half, a box anywhere, or a box around the object.

    inside_HW: where the object is. Half of the boxes begin and end at multiples of `patch` pixels.
    """
    height, width = inside_HW.shape
    mask = np.zeros((height, width), bool)
    kind, step = draw.random(), patch if draw.random() < 0.5 else 1
    if kind < 0.3:
        return halves(height, width)[draw.integers(4)]
    anywhere = kind < 0.45 or not inside_HW.any()
    spans = []
    for axis, size in ((1, height), (0, width)):
        if anywhere:
            low, high = np.sort(draw.integers(0, size // step, 2)) * step
            high += step
        else:
            where = np.flatnonzero(inside_HW.any(axis=axis)) // step
            spare = draw.choice(3, 2, p=SPARE) if step > 1 else draw.integers(1, patch, 2)
            low, high = (where[0] - spare[0]) * step, (where[-1] + 1 + spare[1]) * step
        spans.append((max(low, 0), min(high, size)))
    (top, bottom), (left, right) = spans
    mask[top:bottom, left:right] = True
    return mask
