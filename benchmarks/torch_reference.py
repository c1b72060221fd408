"""The same model in PyTorch, decoded one by one with a cache: what one would otherwise deploy.

Static caches and tables on the device, a step compiled by torch.compile and, on a GPU, recorded as
one CUDA graph that goes on to the next position by itself: between the first token and the last the
host does nothing but launch it. Draws the tokens of `nuwa.training.decode.generate`.

    python benchmarks/torch_reference.py --preset sprites --device cpu --dtype fp32 --frames 1
    python benchmarks/torch_reference.py --preset base --frames 1 10

Legend: B volumes side by side, N positions, n neighbours, M text, d width, h heads, K codes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from hardware import hardware
from torch import Tensor, nn

from nuwa.spec.config import PRESETS, preset
from nuwa.spec.grid import Grid, neighbours, predecessors
from nuwa.spec.philox import uniforms
from nuwa.training.nuwa import NUWA
from nuwa.training.sampling import sample, sort_width

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class RasterStep(nn.Module):
    """One position of B volumes of a text-conditioned model: its token, and on to the next."""

    place: Tensor
    fed: Tensor
    near: Tensor
    coordinates: Tensor

    def __init__(self, nuwa: NUWA, grid: Grid, batch: int, device: torch.device) -> None:
        super().__init__()
        config = nuwa.config.decoder
        self.nuwa, self.grid, self.heads = nuwa, grid, config.heads
        dtype = nuwa.head.weight.dtype
        size = grid.size
        fed = predecessors(grid, config.shift).astype(np.int64)
        extents = config.window_extents
        tables = [neighbours(grid, extent, causal=True) for extent in extents]
        widest = max(table.shape[1] for table in tables)
        near = [
            np.pad(table, ((0, 0), (0, widest - table.shape[1])), constant_values=-1)
            for table in tables
        ]
        self.window_of = [extents.index(config.layer_extent(n)) for n in range(config.layers)]
        self.columns = [tables[window].shape[1] for window in self.window_of]

        def constant(name: str, array: np.ndarray) -> None:
            self.register_buffer(name, torch.from_numpy(array).to(device), persistent=False)

        constant("fed", np.where(fed < 0, size, fed))
        constant("near", np.stack(near).astype(np.int64))
        constant("coordinates", grid.coordinates().astype(np.int64))
        constant("place", np.zeros(1, np.int64))
        # A tensor a layer: a write to a part of one tensor is compiled to a copy of all of it.
        self.keys, self.values = (
            [
                torch.zeros(batch, size, config.width, dtype=dtype, device=device)
                for _ in range(config.layers)
            ]
            for _ in "kv"
        )
        self.tokens = torch.full((batch, size + 1), nuwa.config.bos, device=device)
        self.uniform = torch.zeros((batch, size), device=device)
        self.temperature = torch.ones(batch, device=device)
        self.top_p = torch.ones(batch, device=device)
        self.top_k = torch.zeros(batch, dtype=torch.int32, device=device)
        self.ranks = torch.arange(1, device=device)
        self.memory: list[tuple[Tensor, Tensor]] = []
        self.mask: Tensor | None = None

    @torch.no_grad()
    def begin(self, text_BM: Tensor, seeds: list[int]) -> None:
        """Encodes the text and goes back to the first position."""
        memory = self.nuwa.text(text_BM)
        pairs = [block.cross_memory(memory) for block in self.nuwa.blocks]
        mask = self.nuwa.text.mask(text_BM)
        if self.memory:  # where a recorded step reads them
            for old, new in zip(self.memory, pairs, strict=True):
                for to, made in zip(old, new, strict=True):
                    to.copy_(made)
            if self.mask is not None and mask is not None:
                self.mask.copy_(mask)
        else:
            self.memory = [(key.contiguous(), value.contiguous()) for key, value in pairs]
            self.mask = mask
        draws = np.stack([uniforms(seed, 0, np.arange(self.grid.size)) for seed in seeds])
        self.uniform.copy_(torch.from_numpy(draws))
        self.place.zero_()

    @torch.no_grad()
    def forward(self) -> None:
        place = self.place
        fed_B = self.tokens.index_select(1, self.fed[place])[:, 0]
        coordinates_B3 = self.coordinates[place].expand(len(fed_B), 3)
        x_Bd = self.nuwa.embedding(fed_B, coordinates_B3)
        for layer, block in enumerate(self.nuwa.blocks):
            q, k, v = block.self_project(x_Bd)
            keys, values = self.keys[layer], self.values[layer]
            keys.index_copy_(1, place, k[:, None])
            values.index_copy_(1, place, v[:, None])
            near_n = self.near[self.window_of[layer]][place][0, : self.columns[layer]]
            seen_n = near_n.clamp_min(0)
            key, value = (cache.index_select(1, seen_n) for cache in (keys, values))
            hidden = near_n < 0
            bias = torch.zeros((), dtype=q.dtype, device=q.device)
            mask_hn = bias.expand(self.heads, len(near_n)) if block.bias is None else block.bias
            mask_hn = mask_hn.masked_fill(hidden, -torch.inf).to(q.dtype)
            attended = self._attend(q, key, value, mask_hn[None, :, None])
            x_Bd = block.after_self(x_Bd, attended)
            key, value = self.memory[layer]
            attended = self._attend(block.cross_query(x_Bd), key, value, self.mask)
            x_Bd = block.after_cross(x_Bd, attended)
        logits_BK = self.nuwa.logits(x_Bd).float()
        uniform_B = self.uniform.index_select(1, place)[:, 0]
        drawn_B = sample(logits_BK, self.temperature, self.top_k, self.top_p, uniform_B, self.ranks)
        self.tokens.index_copy_(1, place, drawn_B[:, None].long())
        place.add_(1)

    def _attend(self, q_Bd: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q_Bd[:, None], key, value)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(1)


class Reference:
    """Generates volumes of one size. compiled: by torch.compile; on a GPU also a CUDA graph."""

    def __init__(
        self,
        nuwa: NUWA,
        grid: Grid,
        *,
        batch: int = 1,
        device: str = "cuda",
        compiled: bool = True,
        temperature: float = 1.0,
        top_k: int = 0,
    ) -> None:
        self.device = torch.device(device)
        self.step = RasterStep(nuwa.to(self.device).eval(), grid, batch, self.device)
        self.step.temperature.fill_(temperature)
        self.step.top_k.fill_(top_k)
        width = sort_width([top_k], [1.0], nuwa.config.image.codebook_size)
        self.step.ranks = torch.arange(width, device=self.device)
        self._run: Callable[[], object] = self.step
        if compiled:
            self._run = torch.compile(self.step, fullgraph=True)
        self._graph: torch.cuda.CUDAGraph | None = None

    def generate(self, text_BM: Tensor, seeds: list[int]) -> Tensor:
        """Tokens int64 [B, N]."""
        self.step.begin(text_BM.to(self.device), seeds)
        if self.device.type == "cuda" and self._graph is None:
            self._record(text_BM, seeds)
        for _ in range(self.step.grid.size):
            if self._graph is None:
                self._run()
            else:
                self._graph.replay()
        return self.step.tokens[:, :-1].clone()

    def _record(self, text_BM: Tensor, seeds: list[int]) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # as CUDA graphs want it: first run, then recorded
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._run()
        self.step.begin(text_BM.to(self.device), seeds)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="base")
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = preset(args.preset)
    model = NUWA(config).to(DTYPES[args.dtype])
    text = torch.full((args.batch, config.text.length), config.text.vocabulary_size - 1)
    text[:, :8] = torch.arange(8)
    results = []
    for frames in args.frames:
        grid = Grid(frames, config.decoder.grid.height, config.decoder.grid.width)
        made = Reference(model, grid, batch=args.batch, device=args.device, compiled=not args.eager)
        seconds = []
        for turn in range(args.repeats + 1):
            began = time.perf_counter()
            made.generate(text, list(range(args.batch))).cpu()
            seconds.append(time.perf_counter() - began)
            print(
                f"{grid}: {'first' if turn == 0 else 'then'} {seconds[-1]:.3f} s", file=sys.stderr
            )
        results.append({"grid": str(grid), "seconds": statistics.median(seconds[1:])})
    print(
        json.dumps(
            {
                "hardware": hardware(torch.get_num_threads()),
                "torch": torch.__version__,
                "gpu": torch.cuda.get_device_name() if args.device.startswith("cuda") else None,
                "preset": args.preset,
                "dtype": args.dtype,
                "batch": args.batch,
                "compiled": not args.eager,
                "results": results,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
