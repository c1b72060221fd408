"""Tokenizers and detokenizers as native code (runtime/native/convnet.cc): a frame on several cores.

ONNX Runtime makes a small frame no faster with a second core. The weights are those of the bundle's
graphs, by the names of training/vqgan.py, whose order of operations this is.

Legend: h x w tokens, E code width, C channels, S side.
"""

from __future__ import annotations

from ctypes import c_void_p
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nuwa.spec.config import VQGANConfig
from nuwa.spec.manifest import IMAGE_DETOKENIZER, SKETCH_TOKENIZER

from ..bundle import Bundle
from ..errors import UnavailableError
from .native_library import AbiOp
from .native_team import NativeTeam
from .native_weights import NativeWeights

_KINDS = (
    *("take_features", "take_pixels", "take_classes", "copy", "double", "normalize", "attend"),
    *("convolve", "give_pixels", "give_nearest"),
)  # NuwaOpKind
_X, _HIDDEN, _OTHER, _KEYS, _VALUES = range(5)  # buffers


class _Program:
    """The operations of an encoder or a decoder, in order.

    `_x` is the buffer that has the feature map, `_side` its side.
    """

    def __init__(self, config: VQGANConfig, weights: NativeWeights, part: str) -> None:
        self._config, self._weights, self._part = config, weights, f"vqgan.{part}."
        self._x, self._other = _X, _OTHER
        self._side = 0
        self.ops: list[AbiOp] = []

    def add(self, kind: str, source: int, inputs: int, outputs: int = 0, **more: int) -> None:
        own = {"kind": _KINDS.index(kind), "side": self._side, "source": source}
        self.ops.append(AbiOp(**own, inputs=inputs, outputs=outputs, **more))

    def convolve(
        self,
        name: str,
        to: int,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        adds: bool = False,
    ) -> None:
        full = f"{self._part}{name}"
        weight, bias = self._weights.pair(full, outputs, inputs, kernel, kernel)
        how = {"kernel": kernel, "stride": stride, "adds": adds, "weight": weight, "bias": bias}
        self.add("convolve", 0, inputs, outputs, to=to, **how)

    def normalize(self, name: str, source: int, width: int, *, silu: bool = True) -> None:
        weight, bias = self._weights.pair(f"{self._part}{name}", width)
        self.add("normalize", source, width, silu=silu, weight=weight, bias=bias)

    def block(self, name: str, inputs: int, outputs: int) -> None:
        self.normalize(f"{name}.norm1", self._x, inputs)
        self.convolve(f"{name}.conv1", _HIDDEN, inputs, outputs)
        if inputs != outputs:
            self.add("copy", self._x, inputs)
            self._x, self._other = self._other, self._x
            self.convolve(f"{name}.nin_shortcut", self._x, inputs, outputs, kernel=1)
        self.normalize(f"{name}.norm2", _HIDDEN, outputs)
        self.convolve(f"{name}.conv2", self._x, outputs, outputs, adds=True)

    def attend(self, name: str, width: int) -> None:
        self.normalize(f"{name}.norm", self._x, width, silu=False)
        for part, buffer in (("q", _HIDDEN), ("k", _KEYS), ("v", _VALUES)):
            self.convolve(f"{name}.{part}", buffer, width, width, kernel=1)
        self.add("attend", _HIDDEN, width, keys=_KEYS, values=_VALUES)
        self.convolve(f"{name}.proj_out", self._x, width, width, kernel=1, adds=True)

    def middle(self, width: int) -> None:
        self.block("mid.block_1", width, width)
        self.attend("mid.attn_1", width)
        self.block("mid.block_2", width, width)

    def blocks(self, level: str, inputs: int, outputs: int, count: int) -> None:
        attends = self._side in self._config.attention_resolutions
        for block in range(count):
            self.block(f"{level}.block.{block}", outputs if block else inputs, outputs)
            if attends:
                self.attend(f"{level}.attn.{block}", outputs)


class _Decoder(_Program):
    """Takes the features of codes (`features`), gives pixels."""

    def __init__(self, config: VQGANConfig, weights: NativeWeights) -> None:
        super().__init__(config, weights, "decoder")
        widths = [config.base_channels * each for each in config.channel_multipliers]
        self._side, width = config.grid_size, widths[-1]
        self.add("take_features", 0, config.z_channels)
        self.convolve("conv_in", self._x, config.z_channels, width)
        self.middle(width)
        for level in reversed(range(len(widths))):
            self.blocks(f"up.{level}", width, widths[level], config.res_blocks + 1)
            width = widths[level]
            if level > 0:
                self.add("double", self._x, width)
                self._side *= 2
                self.convolve(f"up.{level}.upsample.conv", self._x, width, width)
        self.normalize("norm_out", self._x, width)
        self.convolve("conv_out", _HIDDEN, width, config.channels)
        self.add("give_pixels", _HIDDEN, config.channels)


class _Encoder(_Program):
    """Takes pixels or a class map, gives codes."""

    def __init__(self, config: VQGANConfig, weights: NativeWeights, *, classes: bool) -> None:
        super().__init__(config, weights, "encoder")
        widths = [config.base_channels * each for each in config.channel_multipliers]
        self._side, width = config.resolution, config.base_channels
        self.add("take_classes" if classes else "take_pixels", 0, config.channels)
        self.convolve("conv_in", self._x, config.channels, width)
        for level, wide in enumerate(widths):
            self.blocks(f"down.{level}", width, wide, config.res_blocks)
            width = wide
            if level + 1 < len(widths):
                self.add("copy", self._x, width)
                self.convolve(f"down.{level}.downsample.conv", self._x, width, width, stride=2)
                self._side //= 2
        self.middle(width)
        self.normalize("norm_out", self._x, width)
        z, code = config.z_channels, config.embedding_dim
        self.convolve("conv_out", _HIDDEN, width, z)
        self.add("copy", _HIDDEN, z)
        self._part = "vqgan."
        self.convolve("quant_conv", self._x, z, code, kernel=1)
        size = config.codebook_size
        codes = weights.floats("vqgan.quantize.embedding.weight", size, code)
        self.add("give_nearest", self._x, code, size, weight=codes)


def _features(config: VQGANConfig, weights: NativeWeights) -> npt.NDArray[np.float32]:
    """f32 [K, C]: what the first convolution of a decoder is given for each code.

    Rounded once, so that hardly a bit depends on how numpy multiplies.
    """
    z, code = config.z_channels, config.embedding_dim
    codes = weights.array("vqgan.quantize.embedding.weight", config.codebook_size, code)
    matrix = weights.array("vqgan.post_quant_conv.weight", z, code)
    bias = weights.array("vqgan.post_quant_conv.bias", z)
    return (codes.astype(np.float64) @ matrix.astype(np.float64).T + bias).astype(np.float32)


class _Frame(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]


class NativeFrames:
    """A tokenizer or detokenizer of a bundle, as FrameGraph.

    narrow: its convolutions round to bf16, where that is faster. UnavailableError where the bundle
    does not name its weights, or there is no memory. What a frame becomes does not depend on the
    others, nor on how many cores there are.
    """

    def __init__(self, team: NativeTeam, bundle: Bundle, graph: str, *, narrow: bool) -> None:
        config, weights = bundle.manifest.config, NativeWeights(bundle.graph(graph))
        vqgan = config.sketch if graph == SKETCH_TOKENIZER else config.image
        assert vqgan is not None, "a bundle with this graph says what it is of"
        self._team = team
        self._table: npt.NDArray[np.float32] | None = None
        whole, byte = np.dtype(np.int32), np.dtype(np.uint8)
        tokens, sides = (vqgan.grid_size,) * 2, (vqgan.resolution,) * 2
        codes, pixels = _Frame(whole, tokens), _Frame(byte, (*sides, vqgan.channels))
        program: _Program
        if graph == IMAGE_DETOKENIZER:
            self._given, self._made = codes, pixels
            self._table = _features(vqgan, weights)
            program = _Decoder(vqgan, weights)
        else:
            classes = graph == SKETCH_TOKENIZER
            self._given, self._made = _Frame(byte, sides) if classes else pixels, codes
            program = _Encoder(vqgan, weights, classes=classes)
        ops = (AbiOp * len(program.ops))(*program.ops)
        address = team.library.nuwa_convnet_new(ops, len(ops), team.address, narrow)
        if not address:
            raise UnavailableError(f"there is no memory for {graph}")
        self._convnet = c_void_p(address)

    def __del__(self) -> None:
        if hasattr(self, "_convnet") and self._team.here:
            self._team.library.nuwa_convnet_free(self._convnet)

    def run(self, frames: npt.NDArray, *, busy: bool) -> npt.NDArray:
        """Frames [F, ...] as the graph takes them to what it makes of them; F >= 1.

        busy: others need cores too.
        """
        assert _Frame(frames.dtype, frames.shape[1:]) == self._given, frames.shape
        made = np.empty((len(frames), *self._made.shape), self._made.dtype)
        convolve = self._team.library.nuwa_convnet_run
        with self._team.turn(busy) as threads:
            for frame, to in zip(frames, made, strict=True):
                given = np.ascontiguousarray(frame if self._table is None else self._table[frame])
                if convolve(self._convnet, given.ctypes.data, threads, to.ctypes.data):
                    raise MemoryError("no memory for a frame")
        return made
