"""A checkpoint folder: config.json, tokenizer.json, weights of the tokenizers and of the model.

Where the config has a sketch tokenizer there is one, and there may be a ranker (ranker.py). A
checkpoint rebuilds its model by itself and loads strictly. Weights are stored as fp16 by default
(half the size; every bundle figure is measured from the stored weights) and loaded as fp32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nuwa.spec.config import ModelConfig, VQGANConfig
from nuwa.spec.files import replacing, write_text
from nuwa.spec.sampling import Sampling, sampling_defaults
from nuwa.spec.tasks import Task
from nuwa.spec.text import TextTokenizer

from .nuwa import NUWA
from .ranker import Ranker, load_ranker, save_ranker
from .stored import read_object, write_object
from .vqgan import VQGAN

CONFIG = "config.json"
IMAGE_TOKENIZER = "image_tokenizer"  # .json and .safetensors
SKETCH_TOKENIZER = "sketch_tokenizer"
MODEL_WEIGHTS = "nuwa.safetensors"
TEXT_TOKENIZER = "tokenizer.json"
PROVENANCE = "training.json"
SAMPLING = "sampling.json"
PICTURE_CHANNELS = 3


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; models are in eval mode, fp32, on the CPU.

    sketch_vqgan: None where config.sketch is; ranker: None if the folder holds none; provenance:
    what training.json says (data, licence, command), {} if there is none; sampling: defaults by
    task from sampling.json (spec/sampling.py), {} if there is none.
    """

    config: ModelConfig
    vqgan: VQGAN
    nuwa: NUWA
    text_tokenizer: TextTokenizer
    provenance: dict
    sketch_vqgan: VQGAN | None = None
    ranker: Ranker | None = None
    sampling: dict[Task, Sampling] = field(default_factory=dict)


def save_tokenizer(
    model: VQGAN, folder: Path, dtype: torch.dtype = torch.float32, name: str = IMAGE_TOKENIZER
) -> None:
    """Writes NAME.json and NAME.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_object(folder / f"{name}.json", dataclasses.asdict(model.config))
    _save_weights(model, folder / f"{name}.safetensors", dtype)


def load_tokenizer(folder: Path, name: str = IMAGE_TOKENIZER) -> VQGAN:
    """The VQ-GAN of `save_tokenizer`, or of a whole checkpoint.

    ValueError or FileNotFoundError says which file is at fault and why.
    """
    model = VQGAN(_vqgan_config(folder / f"{name}.json"))
    _load_weights(model, folder / f"{name}.safetensors")
    return model.eval()


def _vqgan_config(path: Path) -> VQGANConfig:
    data = read_object(_existing(path))
    names = {field.name for field in dataclasses.fields(VQGANConfig)}
    for kind, wrong in (("unknown", data.keys() - names), ("missing", names - data.keys())):
        if wrong:
            raise ValueError(f"{path} describes no VQ-GAN: {kind} {', '.join(sorted(wrong))}")
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    try:
        return VQGANConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no VQ-GAN: {error}") from None


def tokenizer_name(folder: Path, *, sketches: bool) -> str:
    """Of the VQ-GAN in a folder; a whole checkpoint has one for pictures and one for sketches."""
    whole = any((folder / name).exists() for name in (CONFIG, f"{SKETCH_TOKENIZER}.json"))
    return SKETCH_TOKENIZER if sketches and whole else IMAGE_TOKENIZER


def load_tokenizer_of(folder: Path, channels: int, *, sketches: bool) -> VQGAN:
    """The VQ-GAN of pictures, or of class maps; ValueError if it is for others."""
    vqgan = load_tokenizer(folder, tokenizer_name(folder, sketches=sketches))
    check_channels(vqgan, channels, folder)
    return vqgan


def check_channels(vqgan: VQGAN, channels: int, folder: Path) -> None:
    """ValueError if a VQ-GAN from `folder` has another number of channels."""
    if vqgan.config.channels != channels:
        raise ValueError(
            f"the VQ-GAN in {folder} has {vqgan.config.channels} channels, where {channels} are"
            f" needed: pictures have {PICTURE_CHANNELS}, class maps one for each class"
        )


def save_checkpoint(
    folder: Path,
    config: ModelConfig,
    vqgan: VQGAN,
    nuwa: NUWA,
    text_tokenizer: TextTokenizer,
    provenance: dict | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    sketch_vqgan: VQGAN | None = None,
    ranker: Ranker | None = None,
    sampling: Mapping[Task, Sampling] | None = None,
) -> None:
    """Writes a whole checkpoint; config.json last, so that a folder with it is complete.

    What there is not of ranker and sampling a folder of before may still have.
    """
    if (sketch_vqgan is None) != (config.sketch is None):
        raise ValueError(
            "the config and the weights disagree on whether there is a sketch tokenizer"
        )
    (folder / CONFIG).unlink(missing_ok=True)
    save_tokenizer(vqgan, folder, dtype)
    if sketch_vqgan is not None:
        save_tokenizer(sketch_vqgan, folder, dtype, SKETCH_TOKENIZER)
    _save_weights(nuwa, folder / MODEL_WEIGHTS, dtype)
    text_tokenizer.save(folder / TEXT_TOKENIZER)
    if ranker is not None:
        save_ranker(ranker, folder, dtype)
    if sampling:
        defaults = {str(task): dataclasses.asdict(each) for task, each in sampling.items()}
        write_object(folder / SAMPLING, defaults)
    if provenance is not None:
        write_object(folder / PROVENANCE, provenance)
    write_text(folder / CONFIG, config.to_json() + "\n")


def load_checkpoint(folder: Path) -> Checkpoint:
    """Loads strictly. ValueError or FileNotFoundError says which file is at fault and why."""
    config = _config(_existing(folder / CONFIG))
    vqgan = _tokenizer(folder, IMAGE_TOKENIZER, config.image)
    sketch_vqgan = None
    if config.sketch is not None:
        sketch_vqgan = _tokenizer(folder, SKETCH_TOKENIZER, config.sketch)
    nuwa = NUWA(config)
    _load_weights(nuwa, folder / MODEL_WEIGHTS)
    provenance = folder / PROVENANCE
    return Checkpoint(
        config,
        vqgan,
        nuwa.eval(),
        TextTokenizer.from_file(folder / TEXT_TOKENIZER),
        read_object(provenance) if provenance.exists() else {},
        sketch_vqgan,
        load_ranker(folder),
        _sampling(folder / SAMPLING, config),
    )


def _config(path: Path) -> ModelConfig:
    try:
        return ModelConfig.from_json(path.read_text(encoding="utf-8"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no model: {error}") from None


def _sampling(path: Path, config: ModelConfig) -> dict[Task, Sampling]:
    if not path.exists():
        return {}
    defaults = read_object(path)
    try:
        return sampling_defaults(defaults, config.tasks)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _tokenizer(folder: Path, name: str, config: VQGANConfig) -> VQGAN:
    vqgan = load_tokenizer(folder, name)
    if vqgan.config != config:
        raise ValueError(f"{folder / name}.json describes another VQ-GAN than {folder / CONFIG}")
    return vqgan


def _save_weights(model: nn.Module, path: Path, dtype: torch.dtype) -> None:
    tensors = {name: value.detach().to(dtype).cpu() for name, value in model.state_dict().items()}
    with replacing(path) as partial:
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial)


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


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; a checkpoint folder has one")
    return path
