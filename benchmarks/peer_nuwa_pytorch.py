"""Times the token loop of nuwa-pytorch 0.7.8, the one public re-implementation of NÜWA.

Run by decode.py in a process of its own, with the package on PYTHONPATH. It imports torchvision for
things that token generation never touches; empty stand-ins take its place. `vae.decode` is left
out, so that only the token loop is timed. Reversible layers are the only ones that run in 0.7.8.
Of a clip the last frame is timed, with random tokens before it: that is what a token costs at full
length, 64 tokens of 8x8. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import types

import torch


class _Anything(types.ModuleType):
    """A module whose every attribute is a class that does nothing."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def stand_in_for_torchvision() -> None:
    """Enough of torchvision for nuwa_pytorch to import."""
    root = _Anything("torchvision")
    for part in ("transforms", "models", "utils", "datasets"):
        module = _Anything(f"torchvision.{part}")
        setattr(root, part, module)
        sys.modules[module.__name__] = module
    sys.modules["torchvision"] = root

    class VGG(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())

    root.models.vgg16 = lambda **_: VGG()


class Continued(torch.nn.Module):
    """The embedding of tokens that follow some others."""

    def __init__(self, embedding: torch.nn.Module, earlier: torch.Tensor) -> None:
        super().__init__()
        self.embedding, self.earlier = embedding, earlier

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(torch.cat((self.earlier, tokens), dim=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--size", type=int, default=16, help="tokens per axis")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--codebook", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    stand_in_for_torchvision()
    from nuwa_pytorch import NUWA, VQGanVAE

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # Four levels: 0.7.8 computes the feature map as image_size // levels**2, right for 2 and 4
    # only, and needs dim * 2**(levels - 1) == 256, the width of its codebook.
    vae = VQGanVAE(
        dim=32,
        num_layers=4,
        image_size=16 * options.size,
        vq_codebook_size=options.codebook,
        vq_decay=0.8,
    )
    model = NUWA(
        vae=vae,
        dim=options.width,
        text_num_tokens=2000,
        text_enc_depth=2,
        text_enc_heads=8,
        text_max_seq_len=77,
        max_video_frames=options.frames,
        dec_depth=options.layers,
        dec_heads=options.heads,
        dec_reversible=True,
        enc_reversible=True,
        sparse_3dna_kernel_size=3,
        sparse_3dna_dilation=1,
        shift_video_tokens=False,
    ).eval()
    model.vae.decode = lambda codes: codes
    text = torch.randint(1, 2000, (1, 77))
    frame = options.size**2
    earlier = torch.randint(0, options.codebook, (1, (options.frames - 1) * frame))
    model.image_embedding = Continued(model.image_embedding, earlier)
    began = time.perf_counter()
    model.generate(text=text, num_frames=1, cond_scale=1.0)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "tokens": frame, "earlier": earlier.shape[1]}))


if __name__ == "__main__":
    main()
