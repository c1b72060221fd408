"""FID, IS, CLIPSIM and FVD, from weight files that the user brings, through the field's libraries.

A metric with a published name means one network with one set of weights. None of them is shipped
or downloaded: without its file a metric is not computed, and a file with another SHA-256 is
refused before it is read. FID-vid is left out: the papers that report it do not name one network.

Legend: B pictures or clips, F frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nuwa.spec.manifest import file_hash

from . import metrics
from .evaluation.question import Question

BATCH = 32


@dataclass(frozen=True)
class Weights:
    """A file as it is published, and the metrics that it is for."""

    file: str
    sha256: str
    metrics: str


WEIGHTS = {
    "inception": Weights(
        "pt_inception-2015-12-05-6726825d.pth (pytorch-fid, torch-fidelity)",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "FID, IS",
    ),
    "clip": Weights(
        "ViT-B-32.pt (OpenAI)",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        "CLIPSIM",
    ),
    "i3d": Weights(
        "i3d_torchscript.pt (StyleGAN-V)",
        "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
        "FVD",
    ),
}


@dataclass(frozen=True)
class Networks:
    """What the weights become; None without them.

    inception: u8[B,H,W,3] -> features f[B,2048], logits f[B,1008]; clip: u8[B,H,W,3] and B
    prompts -> cosine similarities f[B]; i3d: u8[B,F,H,W,3] -> features f[B,400].
    """

    inception: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None
    clip: Callable[[np.ndarray, Sequence[str]], np.ndarray] | None = None
    i3d: Callable[[np.ndarray], np.ndarray] | None = None


class Published:
    """weights: {"inception" | "clip" | "i3d": file}. ValueError for an unknown name, a file that
    is not the published one, and a library that is missing or does not load."""

    def __init__(self, weights: Mapping[str, Path]) -> None:
        for name in weights:
            if name not in WEIGHTS:
                raise ValueError(f"unknown weights {name!r}; choose from {', '.join(WEIGHTS)}")
        self.files = {name: _checked(name, Path(path)) for name, path in weights.items()}
        loaders = {"inception": _inception, "clip": _clip, "i3d": _i3d}
        self.networks = Networks(**{n: _loaded(n, p, loaders[n]) for n, p in weights.items()})

    def collector(self) -> Collector:
        """Of one part's answers."""
        return Collector(self.networks)


@dataclass
class Collector:
    """Features of answers and of real clips, and what they sum up to."""

    networks: Networks
    is_video: bool = False
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, made: Sequence[np.ndarray], questions: Sequence[Question]) -> None:
        """Whole clips u8[F,H,W,3], given frames included, beside those of the questions."""
        self.is_video = len(made[0]) > 1
        for kind, clips in (("made", made), ("real", [each.real for each in questions])):
            if self.networks.inception is not None:
                for batch in _batches(np.concatenate(clips)):
                    for name, values in zip(
                        ("inception", "logits"), self.networks.inception(batch), strict=True
                    ):
                        self._keep(f"{name}/{kind}", values)
            if self.networks.i3d is not None and self.is_video:
                for batch in _batches(np.stack(clips)):
                    self._keep(f"i3d/{kind}", self.networks.i3d(batch))
            if self.networks.clip is not None:
                for clip, question in zip(clips, questions, strict=True):
                    if question.prompt:
                        near = self.networks.clip(clip, [question.prompt] * len(clip))
                        self._keep(f"clip/{kind}", near.mean(keepdims=True))

    def scores(self) -> dict[str, dict[str, Any]]:
        """{metric: {model, real, samples, ...}}; real: of real clips, where that is not zero."""
        scores = {}
        if "inception/made" in self.features:
            # On clips it is the FID of their frames.
            name = "FID-img" if self.is_video else "FID"
            scores[name] = self._distance("inception")
            scores["IS"] = self._score(lambda kind: inception_score(self._all(f"logits/{kind}")))
        if "i3d/made" in self.features:
            scores["FVD"] = self._distance("i3d")
        if "clip/made" in self.features:
            scores["CLIPSIM"] = self._score(lambda kind: float(self._all(f"clip/{kind}").mean()))
        return scores

    def _keep(self, name: str, values: np.ndarray) -> None:
        self.features.setdefault(name, []).append(np.asarray(values, np.float64))

    def _all(self, name: str) -> np.ndarray:
        return np.concatenate(self.features[name])

    def _distance(self, network: str) -> dict[str, Any]:
        made, real = self._all(f"{network}/made"), self._all(f"{network}/real")
        return _row(metrics.frechet_distance(made, real), None, len(made))

    def _score(self, of: Callable[[str], float]) -> dict[str, Any]:
        return _row(of("made"), of("real"), None)


def inception_score(logits_BC: np.ndarray, splits: int = 10) -> float:
    """exp of the mean KL divergence from the classes of one picture to those of all (Salimans et
    al. 2016), averaged over `splits` consecutive parts of the pictures."""
    log_BC = logits_BC - logits_BC.max(1, keepdims=True)
    log_BC = log_BC - np.log(np.exp(log_BC).sum(1, keepdims=True))
    scores = []
    count = len(log_BC)
    splits = min(splits, count)
    edges = [i * count // splits for i in range(splits + 1)]
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        part = log_BC[low:high]
        marginal = np.log(np.exp(part).mean(0, keepdims=True))
        scores.append(np.exp((np.exp(part) * (part - marginal)).sum(1).mean()))
    return float(np.mean(scores))


def _row(model: float, real: float | None, samples: int | None) -> dict[str, Any]:
    unknown = dict.fromkeys(("low", "high", "reconstructed", "ratio"))
    return {"model": model, "real": real, "samples": samples} | unknown


def _batches(pictures: np.ndarray) -> list[np.ndarray]:
    return [pictures[i : i + BATCH] for i in range(0, len(pictures), BATCH)]


def _checked(name: str, path: Path) -> str:
    """The file's SHA-256; ValueError if it is not the one that the metric is defined by."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; the {name} weights are {WEIGHTS[name].file}")
    digest = file_hash(path)
    if digest != WEIGHTS[name].sha256:
        raise ValueError(
            f"{path} is not {WEIGHTS[name].file}: its SHA-256 is {digest}, not "
            f"{WEIGHTS[name].sha256}; {WEIGHTS[name].metrics} would not be what their name says"
        )
    return digest


def _loaded(name: str, path: Path, load: Callable[[Path], Any]) -> Any:
    try:
        return load(path)
    except (ImportError, RuntimeError) as error:
        # torchvision, which the libraries import, fails with RuntimeError beside another torch.
        raise ValueError(
            f"{WEIGHTS[name].metrics} cannot be computed: {error}. Install "
            "'nuwa-runtime[metrics]' and the torchvision that belongs to your torch "
            f"({torch.__version__})"
        ) from error


def _inception(path: Path) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        feature_extractor_weights_path=str(path),
    )

    @torch.inference_mode()
    def features(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pooled, logits = network(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        return pooled.numpy(), logits.numpy()

    return features


def _clip(path: Path) -> Callable[[np.ndarray, Sequence[str]], np.ndarray]:
    import open_clip
    from PIL import Image

    network = open_clip.load_openai_model(str(path), precision="fp32", device="cpu").eval()
    prepare = open_clip.image_transform(
        network.visual.image_size,
        is_train=False,
        mean=network.visual.image_mean,
        std=network.visual.image_std,
    )
    tokenize = open_clip.get_tokenizer("ViT-B-32")

    @torch.inference_mode()
    def similarity(pictures: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        images = torch.stack([prepare(Image.fromarray(each)) for each in pictures])
        image = network.encode_image(images, normalize=True)
        text = network.encode_text(tokenize(list(prompts)), normalize=True)
        return (image * text).sum(-1).numpy()

    return similarity


def _i3d(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    network = torch.jit.load(str(path), map_location="cpu").eval()

    @torch.inference_mode()
    def features(clips: np.ndarray) -> np.ndarray:
        volume = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float()
        return network(volume, rescale=True, resize=True, return_features=True).numpy()

    return features
