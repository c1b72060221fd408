"""First weights of a NÜWA model: random ones that suit the recipe, or another checkpoint's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .nuwa import NUWA
from .vqgan import VQGAN


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
def load_start(model: NUWA, vqgan: VQGAN, start: Checkpoint) -> None:
    """Takes over every weight of another checkpoint that has a place here.

    Codes may be others: a code's rows in the embedding and in the head are those of the nearest
    code of the checkpoint's VQ-GAN. ValueError if a weight that both have differs in shape.
    """
    theirs, ours = start.nuwa.state_dict(), model.state_dict()
    codebook = start.vqgan.quantize.embedding.weight
    distance_KJ = torch.cdist(vqgan.quantize.embedding.weight, codebook)
    nearest_K = distance_KJ.argmin(dim=1)
    by_code = (
        "embedding.codes.weight",
        "head.weight",
        "head.bias",
        "visual.embedding.codes.weight",
    )
    for name, value in theirs.items():
        if name not in ours or name == "visual.embedding.sketches.weight":
            continue
        taken = value[nearest_K] if name in by_code else value
        if taken.shape != ours[name].shape:
            raise ValueError(
                f"the checkpoint to start from has {name} of shape {list(taken.shape)}, this model "
                f"{list(ours[name].shape)}"
            )
        ours[name] = taken
    moved_KE = (vqgan.quantize.embedding.weight - codebook[nearest_K]) / codebook.std()
    ours["embedding.codes.weight"] = ours["embedding.codes.weight"] + moved_KE
    model.load_state_dict(ours)


def _unit(vqgan: VQGAN) -> Tensor:
    codes = vqgan.quantize.embedding.weight
    return codes / codes.std()
