"""First weights of a NÜWA model: random ones that suit the recipe, or another checkpoint's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .nuwa import NUWA
from .sources import Source
from .vqgan import VQGAN, one_hot, to_signed

SAMPLED = 3000  # pictures, and class maps, that two tokenizers are compared on
BATCH = 100
UNSEEN = 0.5  # cells that a code counts as having had if it had none


@torch.no_grad()
def initialise(
    model: NUWA, vqgan: VQGAN, sketch_vqgan: VQGAN | None, layer_scale: float | None
) -> None:
    """Linear layers with std 1/sqrt(fan in), code vectors from the codebooks."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.head.weight, std=0.02)
    model.embedding.codes.weight.copy_(_unit(vqgan))
    if model.visual is not None:
        embedding = model.visual.embedding
        embedding.codes.weight.copy_(_unit(vqgan))
        if embedding.sketches is not None and sketch_vqgan is not None:
            embedding.sketches.weight.copy_(_unit(sketch_vqgan))
    if layer_scale is None:
        return
    for block in model.blocks:
        for scale in (block.self_scale, block.cross_scale, block.ff_scale):
            scale.fill_(layer_scale)
    for block in [] if model.visual is None else model.visual.blocks:
        for scale in (block.self_scale, block.ff_scale):
            scale.fill_(layer_scale)


@torch.no_grad()
def load_start(
    model: NUWA, vqgan: VQGAN, sketch_vqgan: VQGAN | None, start: Checkpoint, source: Source
) -> None:
    """Takes over every weight of another checkpoint that has a place here.

    The tokenizers may be others: what belongs to a code is then that of the code which the
    checkpoint's own tokenizer gives most often to the same cells of `source`. ValueError if a
    weight that both have differs in shape.
    """
    theirs, ours = start.nuwa.state_dict(), model.state_dict()
    pictures = Translation.of(start.vqgan, vqgan, _pictures(source))
    translated = {
        "embedding.codes.weight": pictures.embedding,
        "visual.embedding.codes.weight": pictures.embedding,
        "head.weight": pictures.rows,
        "head.bias": pictures.logits,
    }
    sketches = "visual.embedding.sketches.weight"
    if start.sketch_vqgan is not None and sketch_vqgan is not None:
        maps = Translation.of(start.sketch_vqgan, sketch_vqgan, _maps(source, sketch_vqgan))
        translated[sketches] = maps.embedding
    else:
        theirs.pop(sketches, None)
    for name in ours.keys() & theirs.keys():
        taken = translated.get(name, _as_it_is)(theirs[name])
        if taken.shape != ours[name].shape:
            raise ValueError(
                f"the checkpoint to start from has {name} of shape {list(taken.shape)}, this model "
                f"{list(ours[name].shape)}"
            )
        ours[name] = taken
    model.load_state_dict(ours)


@dataclass(frozen=True)
class Translation:
    """From the codes of one tokenizer to those of another.

    code_K: for each of the K new codes an old one; log_share_K: log of the share of the old code's
    cells that get the new one; moved_KE: how far apart their vectors are, in units of the old
    codebook.
    """

    code_K: Tensor
    log_share_K: Tensor
    moved_KE: Tensor

    @classmethod
    def of(cls, old: VQGAN, new: VQGAN, batches: Iterable[Tensor]) -> Translation:
        """batches: inputs [B, C, H, W] of both; codes in none of them take the nearest vector."""
        before, after = (each.quantize.embedding.weight for each in (old, new))
        code_K = torch.cdist(after, before).argmin(dim=1)
        if before.shape == after.shape and torch.equal(before, after):
            return cls(code_K, torch.zeros(len(after)), torch.zeros_like(after))
        together_KJ = torch.zeros(len(after), len(before))
        for inputs in batches:
            pair = new.encode(inputs).codes.flatten(), old.encode(inputs).codes.flatten()
            together_KJ.index_put_(pair, torch.ones(()), accumulate=True)
        seen = together_KJ.any(dim=1)
        code_K[seen] = together_KJ[seen].argmax(dim=1)
        count_K = together_KJ.gather(1, code_K[:, None])[:, 0].clamp_min(UNSEEN)
        total_J = torch.zeros(len(before)).index_add_(0, code_K, count_K)
        log_share_K = (count_K / total_J[code_K]).log()
        return cls(code_K, log_share_K, (after - before[code_K]) / before.std())

    def rows(self, value: Tensor) -> Tensor:
        """Rows by old code [J, ...] -> by new code [K, ...]."""
        return value[self.code_K]

    def logits(self, value: Tensor) -> Tensor:
        """The same of biases of logits: new codes of one old code share its probability."""
        return self.rows(value) + self.log_share_K

    def embedding(self, value: Tensor) -> Tensor:
        """The same of code vectors: new codes of one old code stay apart as the codebooks have it.

        Only where embeddings begin as codebooks, as `initialise` makes them.
        """
        return self.rows(value) + self.moved_KE


def _as_it_is(value: Tensor) -> Tensor:
    return value


def _pictures(source: Source) -> Iterator[Tensor]:
    for first in range(0, SAMPLED, BATCH):
        yield to_signed(torch.from_numpy(source.pictures(first, BATCH)))


def _maps(source: Source, vqgan: VQGAN) -> Iterator[Tensor]:
    for first in range(0, SAMPLED, BATCH):
        yield one_hot(torch.from_numpy(source.maps(first, BATCH)), vqgan.config.channels)


def _unit(vqgan: VQGAN) -> Tensor:
    codes = vqgan.quantize.embedding.weight
    return codes / codes.std()
