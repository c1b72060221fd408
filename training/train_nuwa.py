"""Recipe that trains NÜWA on all its tasks together (paper, equation 16, and section 3.3).

A step sees a batch of images and one of clips; batches.py says what conditions their rows. T2I, T2V
and V2V are the paper's pre-training, S2I and S2V its fine-tuning; pictures with a hidden part are
ours: the paper leaves completion and manipulation to zero-shot.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nuwa.spec.config import ModelConfig
from nuwa.spec.grid import Grid
from nuwa.spec.tasks import UNCONDITIONAL_PROMPT, Task
from nuwa.spec.text import TextTokenizer

from .averaging import WeightAverage
from .batches import Batch, Batches, Rows
from .checkpoint import Checkpoint, save_checkpoint
from .clips import Clips
from .decode import generate
from .initialise import initialise, load_start
from .muon import Muon
from .nuwa import NUWA, Volume
from .parallel import Team
from .pictures import contact_sheet, save_png
from .rollouts import Rollouts
from .vqgan import VQGAN, to_bytes

OWN_TEMPERATURE = 0.5  # between the 0.1 at which clips are predicted and the model's true spread


@dataclass(frozen=True)
class NUWAOptions:
    """images and clips: rows per step of T2I and of T2V + V2V; only images before `clips_from`.

    sketch_images, sketch_clips, hidden_images, hidden_clips: further rows, for S2I, S2V, for I2I
    and TI2I, for TV2V; they join at `visual_from`. optimizer: "adam" as in the paper, or "muon"
    (orthogonalised momentum for the blocks' matrices, Adam for the rest), which learns more from
    few steps; cut_images: share of the images with a hidden part in which a half hides a part of
    the object and no caption says what it is, as completion has it and other masks seldom do;
    none_images and none_clips: share of captions replaced by "none"; average: decay of the weight
    average that is shipped.

    Of the clips without a caption: anywhere_clips: the share that is cut from anywhere in a longer
    clip; steady_clips: the share of all that is chosen from clips that end as they begin;
    own_tokens: up to which share of a clip's tokens is fed as the model draws them where all before
    is true, so that it learns to go on from what it made itself (scheduled sampling in two passes,
    Mihaylova and Martins, 2019); mistaken_tokens: up to which share is fed as a code near to the
    true one instead, so that what is slightly wrong does not grow from frame to frame; named_clips:
    of those from anywhere, the share whose prompt is the caption of an image of them after all,
    which says what stays for ever, and not how it moves; rolled_clips: of those from anywhere, the
    share that is fed what a model made in rollouts (rollouts.py); strange_clips: of all but the
    named and the rolled, the share that shows what no caption names, which can be gone on with only
    by looking at it.
    """

    images: int = 96
    clips: int = 8
    clips_from: int = 0
    sketch_images: int = 0
    sketch_clips: int = 0
    hidden_images: int = 0
    hidden_clips: int = 0
    visual_from: int = 0
    optimizer: str = "muon"
    lr: float = 2e-3
    adam_lr: float = 1e-3
    cut_images: float = 0.0
    none_images: float = 0.1
    none_clips: float = 0.25
    anywhere_clips: float = 0.5
    steady_clips: float = 0.0
    own_tokens: float = 0.0
    mistaken_tokens: float = 0.0
    named_clips: float = 0.0
    rolled_clips: float = 0.0
    strange_clips: float = 0.0
    average: float = 0.998
    layer_scale: float | None = 0.5
    bf16: bool = True

    def __post_init__(self) -> None:
        if self.optimizer not in ("adam", "muon"):
            raise ValueError(f"optimizer {self.optimizer!r} is not one of 'adam', 'muon'")
        for name in (
            "cut_images",
            "none_images",
            "none_clips",
            "anywhere_clips",
            "steady_clips",
            "own_tokens",
            "mistaken_tokens",
            "named_clips",
            "rolled_clips",
            "strange_clips",
        ):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} {getattr(self, name)} is not in [0, 1]")

    def trains(self, task: Task) -> bool:
        """Whether rows of a step are of this task."""
        rows = {
            Task.T2I: self.images,
            Task.S2I: self.sketch_images,
            Task.I2I: self.hidden_images,
            Task.TI2I: self.hidden_images,
            Task.T2V: self.clips,
            Task.S2V: self.sketch_clips,
            Task.V2V: self.clips,
            Task.TV2V: self.hidden_clips,
        }
        return rows[task] > 0


class NUWARecipe:
    """See trainer.Recipe."""

    def __init__(
        self,
        config: ModelConfig,
        options: NUWAOptions,
        vqgan: VQGAN,
        text_tokenizer: TextTokenizer,
        clips: Clips,
        *,
        sketch_vqgan: VQGAN | None = None,
        start: Checkpoint | None = None,
        rollouts: Rollouts | None = None,
        provenance: dict | None = None,
        team: Team | None = None,
        seed: int = 0,
    ) -> None:
        """team: whose device the model is on, and with whom it is trained; the CPU alone if None.

        start: weights to begin at; rollouts: where rolled_clips come from; provenance: what the
        checkpoint says of its training. ValueError if rollouts and rolled_clips do not go together.
        """
        torch.manual_seed(seed)
        self.config, self.options, self.seed = config, options, seed
        self.team = team or Team()
        self.vqgan, self.text_tokenizer, self.clips = vqgan, text_tokenizer, clips
        self.sketch_vqgan = sketch_vqgan
        self.provenance = provenance
        self.device = torch.device(self.team.device)
        _check_shares(options, self.team)
        _check_rollouts(options, rollouts)
        self.model = NUWA(config).to(self.device)
        self.batches = Batches(config, clips, copy.deepcopy(vqgan).to(self.device), rollouts)
        initialise(self.model, vqgan, sketch_vqgan, options.layer_scale)
        if start is not None:
            load_start(self.model, vqgan, sketch_vqgan, start, clips.source)
        self.average = WeightAverage(self.model, options.average)
        self.optimizers = _optimizers(self.model, options)
        self._length = max(len(self._ids(text)) for text in clips.source.captions()) + 2
        self._start = start

    def step(self, step: int, lr_factor: float) -> dict[str, float]:
        options = self.options
        for optimizer, lr in zip(self.optimizers, self._rates(), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_factor
            optimizer.zero_grad(set_to_none=True)
        # Alone, a run is the same with and without torchrun.
        member = (self.team.rank,) if self.team.size > 1 else ()
        draw = np.random.default_rng((self.seed, step, *member))
        rows = self._image_rows(step)
        sums = self._backward(self.batches.images(draw, rows), rows, "i")
        if step >= options.clips_from and options.clips:
            rows = self._clip_rows(step)
            sums |= self._backward(self.batches.videos(draw, rows), rows, "v")
        self.team.sum_gradients(self.model.parameters())
        metrics = self._means(sums)
        loss = metrics["loss_i"] + metrics.get("loss_v", 0.0)
        metrics["grad"] = float(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.update(step)
        return {"loss": loss, **metrics}

    def _rates(self) -> list[float]:
        options = self.options
        return [options.adam_lr, options.lr][: len(self.optimizers)]

    def _image_rows(self, step: int) -> Rows:
        options, share = self.options, self.team.share
        joined = step >= options.visual_from
        return Rows(
            share(options.images),
            share(options.sketch_images) * joined,
            share(options.hidden_images) * joined,
            cut=options.cut_images,
            none=options.none_images,
        )

    def _clip_rows(self, step: int) -> Rows:
        """Where rows do not divide evenly, each kind gives its odd ones to another process."""
        options, share = self.options, self.team.share
        joined = step >= options.visual_from
        return Rows(
            share(options.clips),
            share(options.sketch_clips, turn=1) * joined,
            share(options.hidden_clips, turn=2) * joined,
            captioned_hidden=0.9,
            none=options.none_clips,
            anywhere=options.anywhere_clips,
            steady=options.steady_clips,
            own=options.own_tokens,
            mistaken=options.mistaken_tokens,
            named=options.named_clips,
            rolled=options.rolled_clips,
            strange=options.strange_clips,
        )

    def _backward(self, batch: Batch, rows: Rows, kind: str) -> dict[str, Tensor]:
        """Adds the gradients of a batch's loss, a mean over the whole team's batch.

        Returns f32 [2] by kind of rows: summed errors of this process' rows, and summed weights.
        """
        device = self.device
        text = self.encode(batch.prompts)[:, : self._length].to(device)
        visual = None if batch.visual_VN is None else batch.visual_VN.to(device)
        time = None if batch.time_B is None else batch.time_B.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.options.bf16):
            volume = self.model.volume(batch.grid, device)
            fed_BN = batch.fed_BN.to(device)
            if batch.own_BN is not None:
                own_BN = batch.own_BN.to(device)
                fed_BN = with_own_draws(self.model, own_BN, fed_BN, text, volume, time)
            logits = self.model.volume_logits(fed_BN, text, volume, visual, time)
        target_BN, weight_BN = batch.target_BN.to(device), batch.weight_BN.to(device)
        error_BN = F.cross_entropy(
            logits.float().flatten(0, 1), target_BN.flatten(), reduction="none"
        ).view_as(target_BN)
        error_BN = error_BN * weight_BN
        weight = self.team.total(weight_BN.sum())
        (error_BN.sum() / weight).backward()
        both_2BN = torch.stack([error_BN.detach(), weight_BN])
        sums, first = {f"loss_{kind}": both_2BN.sum((1, 2))}, 0
        parts = (("s2", rows.sketches), ("hidden2", rows.hidden), ("t2", rows.text))
        for name, count in parts:
            sums[f"{name}{kind}"] = both_2BN[:, first : first + count].sum((1, 2))
            first += count
        return sums

    def _means(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Mean errors over the whole team, of those kinds of rows that there were."""
        totals = self.team.total(torch.stack(list(sums.values()))).tolist()
        pairs = zip(sums, totals, strict=True)
        return {name: error / weight for name, (error, weight) in pairs if weight}

    def encode(self, captions: list[str]) -> Tensor:
        """int64 [B, M]."""
        rows = np.stack([self.text_tokenizer.encode(caption) for caption in captions])
        return torch.from_numpy(rows.astype(np.int64))

    def _ids(self, caption: str) -> np.ndarray:
        row = self.text_tokenizer.encode(caption)
        return row[: self.text_tokenizer.used(row)]

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def sample(self, path: Path) -> None:
        """Captioned images, two rows, above four clips if there are any; guided."""
        grid, length = self.config.decoder.grid, self.clips.source.frames
        columns = length if length > 1 else 8
        model = copy.deepcopy(self.average.model).cpu()  # as `generate` and the tokenizers are
        sheets = []
        for count, frames in ((2 * columns, 1), *([(4, length)] if length > 1 else [])):
            volume = Grid(frames, grid.height, grid.width)
            captions = [self.clips.source.caption(i, video=frames > 1) for i in range(count)]
            tokens = generate(
                model,
                self.encode(captions),
                volume,
                seeds=list(range(count)),
                guidance=2.0,
                unconditional_1M=self.encode([UNCONDITIONAL_PROMPT]),
            )
            codes = tokens.reshape(count * frames, grid.height, grid.width)
            with torch.no_grad():
                sheets.append(to_bytes(self.vqgan.decode(codes)).numpy())
        pictures = np.concatenate(sheets)
        save_png(path, contact_sheet(pictures, columns, scale=2))

    def export(self, folder: Path) -> None:
        """With the sampling defaults, and the ranker, of the checkpoint that it began at."""
        ranker, sampling = None, {}
        if self._start is not None:
            tasks = self.config.tasks
            sampling = {t: each for t, each in self._start.sampling.items() if t in tasks}
            ranker = self._start.ranker
        if ranker is not None and not ranker.reads(self.text_tokenizer):
            ranker = None
        save_checkpoint(
            folder,
            self.config,
            self.vqgan,
            self.average.model,
            self.text_tokenizer,
            self.provenance,
            sketch_vqgan=self.sketch_vqgan,
            ranker=ranker,
            sampling=sampling,
        )


@torch.no_grad()
def with_own_draws(
    model: NUWA,
    own_BN: Tensor,
    fed_BN: Tensor,
    text_BM: Tensor,
    volume: Volume,
    time_B: Tensor | None,
) -> Tensor:
    """fed_BN with the model's draws where own_BN says so; only in rows without visual condition."""
    rows = own_BN.any(1).nonzero()[:, 0]
    time_R = None if time_B is None else time_B[rows]
    logits_RNK = model.volume_logits(fed_BN[rows], text_BM[rows], volume, None, time_R)
    weights = (logits_RNK.float() / OWN_TEMPERATURE).softmax(-1)
    drawn_RN = torch.multinomial(weights.flatten(0, 1), 1).view(len(rows), -1)
    mixed_BN = fed_BN.clone()
    mixed_BN[rows] = torch.where(own_BN[rows], drawn_RN, fed_BN[rows])
    return mixed_BN


def _check_shares(options: NUWAOptions, team: Team) -> None:
    for name in ("images", "clips"):
        count = getattr(options, name)
        if (name == "images" or count) and count < team.size:
            raise ValueError(
                f"{name} {count} is not at least one for each of {team.size} processes"
            )


def _check_rollouts(options: NUWAOptions, rollouts: Rollouts | None) -> None:
    if (options.rolled_clips > 0) != (rollouts is not None):
        raise ValueError("rolled_clips (above 0) and rollouts go together")
    if rollouts is not None and not len(rollouts.faithful_W2):
        raise ValueError("there is no window to train on in these rollouts; make more of them")


def _optimizers(model: NUWA, options: NUWAOptions) -> list[torch.optim.Optimizer]:
    """Adam for everything, or Adam for what is not a matrix of a block and Muon for those."""
    matrices = [
        p for p in [*model.blocks.parameters(), *model.text.blocks.parameters()] if p.dim() == 2
    ]
    biases = {id(bias) for block in model.blocks for bias in (block.bias, block.cross_bias)}
    if model.visual is not None:
        matrices += [p for p in model.visual.blocks.parameters() if p.dim() == 2]
        biases |= {id(block.bias) for block in model.visual.blocks}
    matrices = [p for p in matrices if id(p) not in biases]
    if options.optimizer == "adam":
        return [torch.optim.AdamW(model.parameters(), options.adam_lr, (0.9, 0.98))]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.AdamW(rest, options.adam_lr, (0.9, 0.98), weight_decay=0.0),
        Muon(matrices, options.lr, weight_decay=0.01),
    ]
