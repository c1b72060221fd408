"""A checkpoint folder: config.json, image_tokenizer.safetensors, nuwa.safetensors, tokenizer.json.

A checkpoint rebuilds its model by itself and loads strictly. Weights are stored as fp16 by default
(half the size; every bundle figure is measured from the stored weights) and loaded as fp32.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nuwa.spec.config import ModelConfig, VQGANConfig
from nuwa.spec.text import TextTokenizer

from .nuwa import NUWA
from .vqgan import VQGAN

CONFIG = "config.json"
TOKENIZER_CONFIG = "image_tokenizer.json"
TOKENIZER_WEIGHTS = "image_tokenizer.safetensors"
MODEL_WEIGHTS = "nuwa.safetensors"
TEXT_TOKENIZER = "tokenizer.json"
PROVENANCE = "training.json"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; models are in eval mode, fp32, on the CPU.

    provenance: what training.json says (data, licence, command), {} if there is none.
    """

    config: ModelConfig
    vqgan: VQGAN
    nuwa: NUWA
    text_tokenizer: TextTokenizer
    provenance: dict


def save_tokenizer(model: VQGAN, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes image_tokenizer.json and image_tokenizer.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(model.config), indent=2) + "\n"
    (folder / TOKENIZER_CONFIG).write_text(text)
    _save_weights(model, folder / TOKENIZER_WEIGHTS, dtype)


def load_tokenizer(folder: Path) -> VQGAN:
    """The VQ-GAN of `save_tokenizer`, or of a whole checkpoint."""
    path = folder / TOKENIZER_CONFIG
    data: dict[str, Any] = json.loads(_read(path))
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    config = VQGANConfig(**fields)
    model = VQGAN(config)
    _load_weights(model, folder / TOKENIZER_WEIGHTS)
    return model.eval()


def save_checkpoint(
    folder: Path,
    config: ModelConfig,
    vqgan: VQGAN,
    nuwa: NUWA,
    text_tokenizer: TextTokenizer,
    provenance: dict | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes a whole checkpoint; config.json last, so that a folder with it is complete."""
    save_tokenizer(vqgan, folder, dtype)
    _save_weights(nuwa, folder / MODEL_WEIGHTS, dtype)
    text_tokenizer.save(folder / TEXT_TOKENIZER)
    if provenance is not None:
        (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
    (folder / CONFIG).write_text(config.to_json() + "\n")


def load_checkpoint(folder: Path) -> Checkpoint:
    """Loads strictly. ValueError or FileNotFoundError says which file is at fault and why."""
    config = ModelConfig.from_json(_read(folder / CONFIG))
    vqgan = load_tokenizer(folder)
    if vqgan.config != config.image:
        raise ValueError(
            f"{folder / TOKENIZER_CONFIG} describes another VQ-GAN than {folder / CONFIG}"
        )
    nuwa = NUWA(config)
    _load_weights(nuwa, folder / MODEL_WEIGHTS)
    provenance = folder / PROVENANCE
    return Checkpoint(
        config,
        vqgan,
        nuwa.eval(),
        TextTokenizer.from_file(folder / TEXT_TOKENIZER),
        json.loads(provenance.read_text()) if provenance.exists() else {},
    )


def _save_weights(model: nn.Module, path: Path, dtype: torch.dtype) -> None:
    tensors = {name: value.detach().to(dtype).cpu() for name, value in model.state_dict().items()}
    partial = path.with_name(path.name + ".partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
    partial.replace(path)


def _load_weights(model: nn.Module, path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; the checkpoint is incomplete")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    try:
        model.load_state_dict({name: value.float() for name, value in tensors.items()})
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its config: {error}") from None


def _read(path: Path) -> str:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; a checkpoint folder has one")
    return path.read_text()
