"""FID, IS, CLIPSIM and FVD, from weight files that the user brings, through the field's libraries.

A metric with a published name means one network with one set of weights. None of them is shipped
or downloaded: without its file a metric is not computed, and a file with another SHA-256 is
refused before it is read. The arithmetic of FID and IS is torch-fidelity's, too. FVD is not
computed of less than ten frames, so not of what V2V predicts. FID-vid is left out: the papers that
report it do not name one network.

Legend: B pictures or clips, F frames, H, W pixels; N, M pictures or clips in all, D features, C
classes.
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

BATCH = 32
IS_PARTS = 10
I3D_FRAMES = 10  # I3D halves time three times, then averages pairs: 8 are too few


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
    """Features of what is judged of answers and of real clips, and what they sum up to.

    Distances are to a reference: real answers to other questions than those that were asked.
    """

    networks: Networks
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)
    is_video: bool = False

    def add(self, kind: str, clips: Sequence[np.ndarray], prompts: Sequence[str]) -> None:
        """kind: "model" or "real"; clips u8[F,H,W,3], beside their prompts, or ""."""
        self._add_shapes(kind, clips)
        if self.networks.clip is not None:
            for clip, prompt in zip(clips, prompts, strict=True):
                if prompt:
                    near = self.networks.clip(clip, [prompt] * len(clip))
                    self._keep(f"clip/{kind}", near.mean(keepdims=True))

    def add_reference(self, clips: Sequence[np.ndarray]) -> None:
        """Real clips u8[F,H,W,3]."""
        self._add_shapes("reference", clips)

    def scores(self) -> dict[str, dict[str, Any]]:
        """{metric: {model, real, samples, note, ...}}"""
        scores = {}
        if "inception/model" in self.features:
            # On clips it is the FID of their frames.
            scores["FID-img" if self.is_video else "FID"] = self._distance("inception", fid)
            scores["IS"] = self._score(lambda kind: inception_score(self._all(f"logits/{kind}")))
        if "i3d/model" in self.features:
            scores["FVD"] = self._distance("i3d", metrics.frechet_distance)
        if "clip/model" in self.features:
            scores["CLIPSIM"] = self._score(lambda kind: float(self._all(f"clip/{kind}").mean()))
        return scores

    def _add_shapes(self, kind: str, clips: Sequence[np.ndarray]) -> None:
        self.is_video = len(clips[0]) > 1
        if self.networks.inception is not None:
            for batch in _batches(np.concatenate(clips)):
                pooled, logits = self.networks.inception(batch)
                self._keep(f"inception/{kind}", pooled)
                self._keep(f"logits/{kind}", logits)
        if self.networks.i3d is not None and len(clips[0]) >= I3D_FRAMES:
            for batch in _batches(np.stack(clips)):
                self._keep(f"i3d/{kind}", self.networks.i3d(batch))

    def _keep(self, name: str, values: np.ndarray) -> None:
        self.features.setdefault(name, []).append(values)

    def _all(self, name: str) -> np.ndarray:
        return np.concatenate(self.features[name])

    def _distance(self, network: str, of: Callable[[np.ndarray, np.ndarray], float]) -> dict:
        model, real, reference = (
            self._all(f"{network}/{kind}") for kind in ("model", "real", "reference")
        )
        (samples, width), note = model.shape, None
        if samples < width:
            note = (
                f"{samples} samples do not determine a covariance of {width} features: the value "
                "is far above what more samples would give"
            )
        return _row(of(model, reference), of(real, reference), samples, note)

    def _score(self, of: Callable[[str], float]) -> dict[str, Any]:
        return _row(of("model"), of("real"), None, None)


def fid(features_ND: np.ndarray, reference_MD: np.ndarray) -> float:
    """torch-fidelity's own Fréchet distance of two sets of Inception features."""
    from torch_fidelity import metric_fid

    each = [
        metric_fid.fid_features_to_statistics(torch.from_numpy(features))
        for features in (features_ND, reference_MD)
    ]
    return metric_fid.fid_statistics_to_metric(*each, False)[metric_fid.KEY_METRIC_FID]


def inception_score(logits_NC: np.ndarray) -> float:
    """torch-fidelity's own Inception score: shuffled, the mean of ten parts."""
    from torch_fidelity import metric_isc

    parts = min(IS_PARTS, len(logits_NC))
    scores = metric_isc.isc_features_to_metric(torch.from_numpy(logits_NC), parts, shuffle=True)
    return scores[metric_isc.KEY_METRIC_ISC_MEAN]


def _row(model: float, real: float | None, samples: int | None, note: str | None) -> dict[str, Any]:
    unknown = dict.fromkeys(("low", "high", "reconstructed", "ratio"))
    row = {"model": model, "real": real, "samples": samples, "intervals": {}} | unknown
    return row | ({"note": note} if note else {})


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
