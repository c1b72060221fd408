"""The text and the visual encoder as native code (runtime/native/encoder.cc).

Keys and values go straight into the condition slots, and of a text only what is no padding is
encoded. The weights are those of the bundle's graphs, by the names of training/nuwa.py and
training/visual.py.

Legend: T rows, w width, d width of the decoder, L its layers, E entries of a condition slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, byref, c_void_p

import numpy as np
import numpy.typing as npt

from nuwa.spec.config import ModelConfig
from nuwa.spec.grid import Int, window_offsets
from nuwa.spec.manifest import TEXT_ENCODER

from ..bundle import Bundle
from ..errors import UnavailableError
from .native_library import (
    AbiEncoderBlock,
    AbiEncoderShape,
    AbiEncoderWeights,
    AbiEncoding,
    AbiMatrix,
)
from .native_team import NativeTeam
from .native_weights import NativeWeights

_FEED_FORWARD_TEXT = 4  # TextBlock's hidden size over its width


class NativeEncoder:
    """An encoder of a bundle, TEXT_ENCODER or VISUAL_ENCODER.

    keys, values: L arrays f32 [C, E, d] each, which it writes. UnavailableError where the bundle
    does not name its weights, its sizes are no multiples of the library's vectors, or there is no
    memory.
    """

    def __init__(
        self,
        team: NativeTeam,
        bundle: Bundle,
        graph: str,
        keys: Sequence[npt.NDArray[np.float32]],
        values: Sequence[npt.NDArray[np.float32]],
    ) -> None:
        config, library = bundle.manifest.config, team.library
        self._team, self._kept = team, [*keys, *values]
        weights = NativeWeights(bundle.graph(graph))
        of = _text if graph == TEXT_ENCODER else _visual
        shape, told = of(config, weights)
        _check(shape, library.nuwa_lanes(), graph)
        address = library.nuwa_encoder_new(byref(shape), byref(told), team.address)
        if not address:
            raise UnavailableError(f"there is no memory for {graph}")
        self._encoder = c_void_p(address)
        self._memory = [
            (c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
            for arrays in (keys, values)
        ]

    def __del__(self) -> None:
        if hasattr(self, "_encoder") and self._team.here:
            self._team.library.nuwa_encoder_free(self._encoder)

    def run(
        self,
        ids: Int,
        entries: Int,
        coordinates: Int | None = None,
        neighbours: Int | None = None,
        *,
        busy: bool = False,
    ) -> None:
        """Encodes ids i32 [T]; row i's keys and values go to entries[i], counted over all slots.

        coordinates i32 [T, 3], None where a row's position is its number; neighbours i32 [T, n], -1
        masked, None where each row sees all; busy: others need cores too.
        """
        given = [
            None if array is None else np.ascontiguousarray(array, np.int32)
            for array in (ids, coordinates, neighbours, entries)
        ]
        addresses = (None if array is None else array.ctypes.data for array in given)
        keys, values = map(addressof, self._memory)
        told = AbiEncoding(*addresses, rows=len(ids), keys=keys, values=values)
        with self._team.turn(busy) as told.threads:
            if self._team.library.nuwa_encoder_run(self._encoder, byref(told)):
                raise MemoryError(f"no memory to encode {len(ids)} rows")


def _text(config: ModelConfig, weights: NativeWeights) -> tuple[AbiEncoderShape, AbiEncoderWeights]:
    text = config.text
    w, hidden = text.width, _FEED_FORWARD_TEXT * text.width
    shape = AbiEncoderShape(
        width=w,
        blocks=text.layers,
        heads=text.heads,
        hidden=hidden,
        gated=False,
        out=config.decoder.width,
        layers=config.decoder.layers,
        ids=text.vocabulary_size,
        positions=text.length,
    )
    blocks = (AbiEncoderBlock * text.layers)()
    for layer, block in enumerate(blocks):
        name = f"nuwa.text.blocks.{layer}"
        block.norm_weight, block.norm_bias = weights.pair(f"{name}.attention_norm", w)
        block.qkv = weights.matrix(f"{name}.qkv.weight", 3 * w, w)
        block.qkv_bias = weights.floats(f"{name}.qkv.bias", 3 * w)
        block.attended = weights.matrix(f"{name}.out.weight", w, w)
        block.attended_bias = weights.floats(f"{name}.out.bias", w)
        _feed_forward(block, weights, name, w, hidden, gated=False)
    tables = (
        weights.floats("nuwa.text.embedding.weight", text.vocabulary_size, w),
        weights.floats("nuwa.text.position", text.length, w),
    )
    return shape, AbiEncoderWeights(*tables, blocks, *_ends(weights, config, "nuwa.text", w))


def _visual(
    config: ModelConfig, weights: NativeWeights
) -> tuple[AbiEncoderShape, AbiEncoderWeights]:
    visual, grid, d = config.visual, config.decoder.grid, config.decoder.width
    assert visual is not None, "a bundle with this graph says what it is of"
    hidden = visual.ff_multiplier * d
    columns = len(window_offsets(visual.extent.resolve(grid), causal=False))
    ids = config.visual_ids
    positions = grid.frames + grid.height + grid.width
    shape = AbiEncoderShape(
        width=d,
        blocks=visual.layers,
        heads=visual.heads,
        hidden=hidden,
        gated=True,
        out=d,
        layers=config.decoder.layers,
        ids=ids,
        positions=positions,
        columns=columns,
        position_starts=(0, grid.frames, grid.frames + grid.height),
    )
    blocks = (AbiEncoderBlock * visual.layers)()
    for layer, block in enumerate(blocks):
        name = f"nuwa.visual.blocks.{layer}"
        block.norm_weight, block.norm_bias = weights.pair(f"{name}.self_norm", d)
        block.qkv = weights.matrix(f"{name}.self_qkv.weight", 3 * d, d)
        block.attended = weights.matrix(f"{name}.self_out.weight", d, d)
        block.attended_bias = weights.floats(f"{name}.self_out.bias", d)
        _feed_forward(block, weights, name, d, hidden, gated=True)
        if visual.relative_bias:
            block.bias = weights.floats(f"{name}.bias", visual.heads, columns)
    tables = (
        weights.floats("nuwa.visual.embedding.ids", ids, d),
        weights.floats("nuwa.visual.embedding.positions.table", positions, d),
    )
    return shape, AbiEncoderWeights(*tables, blocks, *_ends(weights, config, "nuwa.visual", d))


def _feed_forward(
    block: AbiEncoderBlock, weights: NativeWeights, name: str, w: int, hidden: int, *, gated: bool
) -> None:
    outputs = 2 * hidden if gated else hidden
    block.ff_norm_weight, block.ff_norm_bias = weights.pair(f"{name}.ff_norm", w)
    block.ff_in = weights.matrix(f"{name}.ff_in.weight", outputs, w)
    block.ff_in_bias = weights.floats(f"{name}.ff_in.bias", outputs)
    block.ff_out = weights.matrix(f"{name}.ff_out.weight", w, hidden)
    block.ff_out_bias = weights.floats(f"{name}.ff_out.bias", w)


def _ends(
    weights: NativeWeights, config: ModelConfig, name: str, width: int
) -> tuple[int, int, AbiMatrix, int, object]:
    """What comes after the blocks: a norm, a projection, and keys and values of all layers."""
    d = config.decoder.width
    memory = [
        weights.matrix(f"nuwa.blocks.{layer}.cross_kv.weight", 2 * d, d)
        for layer in range(config.decoder.layers)
    ]
    project = weights.matrix(f"{name}.project.weight", d, width)
    bias = weights.floats(f"{name}.project.bias", d)
    return *weights.pair(f"{name}.norm", width), project, bias, (AbiMatrix * len(memory))(*memory)


def _check(shape: AbiEncoderShape, lanes: int, graph: str) -> None:
    """UnavailableError if an encoder's sizes are no multiples of what the library needs."""
    sizes = {
        "width": (shape.width, 2 * lanes),
        "output's width": (shape.out, 2 * lanes),
        "feed-forward's hidden size": (shape.hidden, lanes if shape.gated else 2 * lanes),
        "width of a head": (shape.width // shape.heads, lanes),
    }
    for what, (size, multiple) in sizes.items():
        if size % multiple:
            raise UnavailableError(
                f"the {what} of {graph}, {size}, is not a multiple of {multiple}"
            )
