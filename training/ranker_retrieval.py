"""How well a ranker tells a picture's caption from those that differ from it in one factor.

Legend: B pictures, F frames, S canvas side, T texts, E embedding width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .ranker import Ranker
from .ranker_batches import CLIP_FACTORS, IMAGE_FACTORS, Captions, Pixels, caption, one_changed
from .sprites.world import Factors, SpriteWorld


@torch.no_grad()
def retrieval(
    ranker: Ranker,
    captions: Captions,
    pictures: Pixels,
    factors: list[Factors],
    world: SpriteWorld,
    *,
    video: bool,
) -> dict[str, float]:
    """Share of pictures [B, F, S, S, 3] whose own caption scores above every one-factor change.

    By factor, and "joint": above all of them. A factor with a single value is left out.
    """
    picture_BE = embed(ranker, pictures, captions.device)
    names = CLIP_FACTORS if video else IMAGE_FACTORS
    rivals = [{name: one_changed(own, name, world) for name in names} for own in factors]
    texts = dict.fromkeys(
        caption(one, video=video)
        for own, groups in zip(factors, rivals, strict=True)
        for one in [own, *(rival for group in groups.values() for rival in group)]
    )
    embedded = dict(zip(texts, ranker.embed_texts(captions.ids(texts)), strict=True))
    right: dict[str, list[bool]] = {name: [] for name in names}
    for picture_E, own, groups in zip(picture_BE, factors, rivals, strict=True):
        score = picture_E @ embedded[caption(own, video=video)]
        for name, group in groups.items():
            if group:
                others_TE = torch.stack([embedded[caption(r, video=video)] for r in group])
                right[name].append(bool((others_TE @ picture_E).max() < score))
    told = {name: values for name, values in right.items() if values}
    rates = {name: float(np.mean(values)) for name, values in told.items()}
    return {**rates, "joint": float(np.mean(np.all(list(told.values()), axis=0)))}


@torch.no_grad()
def embed(ranker: Ranker, pictures: Pixels, device: torch.device, batch: int = 32) -> Tensor:
    """uint8 [B, F, S, S, 3] -> [B, E], a batch at a time."""
    parts = [
        ranker.embed_pictures(torch.from_numpy(np.array(pictures[i : i + batch])).to(device))
        for i in range(0, len(pictures), batch)
    ]
    return torch.cat(parts)
