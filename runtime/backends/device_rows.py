"""Rows of a decoder step put together on the device, by the kernels of plugins_trt/rows.h.

A stream's tokens and staged rows lie there; a step sends up which rows are next, some hundred bytes
a lane, and brings back a number a part. In between nothing waits for the device, nor do calls that
follow each other; and what is done there depends on the sizes of a call alone, so that it can be
recorded once (a CUDA graph).

Legend: T rows of a call, n neighbour columns, v columns of the visual window, m columns of cross
attention, K staged rows, W candidates to sort.
"""

from __future__ import annotations

import ctypes
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int32, c_void_p
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nuwa.spec.conditions import visual_columns
from nuwa.spec.config import ModelConfig
from nuwa.spec.grid import Int
from nuwa.spec.sampling import Sampling, sort_width

from ..core import Until
from ..errors import DeviceLostError, UnavailableError
from .base import CallDone, Lane, Part, Rows, Stream
from .device_memory import DeviceMemory
from .step_batch import CrossColumns

log = logging.getLogger("nuwa.runtime")

ABI = 1  # kRowsAbi of rows.h
MOST_RECORDINGS = 128  # sizes of calls: those of a few kinds of requests, in batches of any size

_LANE = np.dtype(
    [
        ("records", np.uint64),
        ("tokens", np.uint64),
        *((name, np.int32) for name in ("row", "count", "record", "part")),
        *((name, np.int32) for name in ("cache_slot", "condition_slot")),
        *((name, np.int32) for name in ("text_length", "text_first", "sees_visual")),
        *((name, np.int32) for name in ("to_unconditional", "top_k")),
        *((name, np.float32) for name in ("temperature", "top_p", "guidance")),
    ]
)
_NOBODY = np.array((0, 0, 2**31 - 1, *[0] * 10, 1.0, 1.0, 1.0), _LANE)  # a lane past all rows


class _Call(ctypes.Structure):
    """RowCall."""

    _fields_ = [
        ("lanes", c_void_p),
        *((name, c_int32) for name in ("lane_count", "part_count", "rows", "n", "v", "m")),
        *((name, c_int32) for name in ("first_visual", "bos")),
        ("text_place", c_void_p),
        *((name, c_void_p) for name in ("tokens", "coordinates", "slot", "write_index")),
        *((name, c_void_p) for name in ("neighbours", "condition_slot", "cross_neighbours")),
        *((name, c_void_p) for name in ("top_k", "unconditional_row", "temperature", "top_p")),
        *((name, c_void_p) for name in ("uniform", "guidance", "drawn", "finite")),
    ]


@dataclass(frozen=True)
class Tensor:
    """An input or output of decoder_step on the device."""

    address: int
    dtype: type[np.generic]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(eq=False)
class _Held:
    """Of a stream on the device: its tokens, and its staged records [K, record]."""

    tokens: int
    records: int = 0
    capacity: int = 0  # bytes
    record: int = 0  # columns
    lanes: list[tuple] = field(default_factory=list)


class DeviceRows:
    """The part of Backend that concerns streams. A call: begin, gather, the graph, commit, finish;
    of several, `steps` finishes all together.

    generation: changes when the memory of calls does, and what was recorded is of no use any more;
    capacity: rows that there is room for.
    library: libnuwa_rows.so, built for the device that `memory` is of. UnavailableError if it is
    of another version. rows, lanes: of usual calls, for which room is made at once; widest: the
    most candidates that the graph can sort, None for all codes.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        library: Path,
        config: ModelConfig,
        rows: int = 0,
        lanes: int = 0,
        widest: int | None = None,
    ) -> None:
        self.memory = memory
        self._library = _load(library)
        if reason := self._library.nuwa_rows_unusable(memory.index):
            raise UnavailableError(f"{library} cannot run on this GPU: {reason.decode()}")
        self._config, self._columns = config, CrossColumns(config)
        self._codebook_size = config.image.codebook_size
        self._widest = min(widest or self._codebook_size, self._codebook_size)
        self._streams: dict[Stream, _Held] = {}
        self._spare: dict[int, list[int]] = {}  # memory of closed streams by its size
        self._call = _Call(
            n=config.decoder.neighbour_count,
            v=visual_columns(config),
            first_visual=self._columns.first_visual,
            bos=config.bos,
        )
        self._call.text_place = self._constant(self._columns.place)
        self._ranks = self._constant(np.arange(self._codebook_size, dtype=np.int32))
        self._bias = None if self._columns.bias is None else self._constant(self._columns.bias)
        self.capacity = self._lane_capacity = self._parts = self.generation = 0
        self._answers = self._answers_size = 0  # what calls answer that are not finished, in bytes
        self._pace: dict[int, float] = {}  # seconds that a call took of late, by its padded rows
        self._make_room(max(rows, 16), max(lanes, 4))

    def open(self, stream: Stream) -> None:
        """ValueError if it would have more candidates sorted than can be."""
        self._width([stream.sampling])
        held = _Held(self._take(4 * stream.held))
        held.lanes = [_constants(stream, lane) for lane in stream.lanes]
        self._streams[stream] = held
        try:
            self.memory.upload(np.zeros(stream.held, np.int32), held.tokens)
            self.stage(stream)
        except Exception:
            self.close(stream)
            raise

    def stage(self, stream: Stream) -> None:
        held, records = self._streams[stream], _records(stream.rows)
        if records.nbytes > held.capacity:
            larger, before = self._take(records.nbytes), (held.records, held.capacity)
            held.records, held.capacity = larger, _rounded(records.nbytes)
            if before[1]:
                self._give(*before)
        held.record = records.shape[1]
        self.memory.upload(records, held.records)

    def tokens(self, stream: Stream, first: int, count: int) -> Int:
        found = np.empty(count, np.int32)
        self.memory.download(self._streams[stream].tokens + 4 * first, found)
        return found

    def close(self, stream: Stream) -> None:
        held = self._streams.pop(stream, None)
        if held is not None:
            self._give(held.tokens, _rounded(4 * stream.held))
            if held.capacity:
                self._give(held.records, held.capacity)

    def begin(self, parts: Sequence[Part], rows: int | None = None) -> dict[str, Tensor]:
        """The inputs of decoder_step by name, and `next_tokens` for its output.

        They are filled by `gather`, and of this call until the next begins. rows: pads the call to
        so many.
        """
        pairs = [(part, lane) for part in parts for lane in part.stream.lanes]
        needed = sum(part.count for part, _ in pairs)
        total = needed if rows is None else rows
        assert total >= needed, "a call cannot be padded to less than it has"
        if total > self.capacity or len(pairs) > self._lane_capacity:
            self._make_room(total, len(pairs))
        call, columns = self._call, self._columns.count(pairs)
        call.rows, call.m = total, columns
        self._parts = len(parts)
        self.memory.upload(self._told(parts), call.lanes)
        width = self._width([part.stream.sampling for part in parts])
        tensors = {
            name: Tensor(getattr(call, name), dtype, (total, *wide))
            for name, dtype, wide in self._arrays(columns)
        }
        tensors["ranks"] = Tensor(self._ranks, np.int32, (width,))
        if self._bias is not None:
            tensors["cross_columns"] = Tensor(self._bias, np.int32, (columns,))
        tensors["next_tokens"] = Tensor(call.drawn, np.int32, (total,))
        return tensors

    def gather(self) -> None:
        """Fills the inputs, in the device's stream."""
        self._run("gather")

    def commit(self) -> None:
        """Puts what was drawn into its place, in the device's stream."""
        self._run("commit")

    def finish(self) -> list[bool]:
        """Waits for the call: what `Backend.step` returns."""
        finite = np.empty(self._parts, np.int32)
        self.memory.download(self._call.finite, finite)
        return finite.astype(bool).tolist()

    def steps(
        self,
        launch: Callable[[Sequence[Part]], object],
        calls: Sequence[Sequence[Part]],
        until: Until,
    ) -> list[CallDone]:
        """`Backend.steps`, where `launch` begins a call and does not finish it.

        How many of them are made goes by how long such calls took of late, one of which nothing is
        known: the host does not see when one of several is done. seconds: of each as much.
        """
        began, parts = time.perf_counter(), len(calls[0])
        size, launched = 4 * parts, 0
        if size * len(calls) > self._answers_size:
            self._make_answers(size * len(calls))
        rows = padded(max(sum(p.count * len(p.stream.lanes) for p in call) for call in calls))
        most = max(1, int(until.seconds / self._pace.get(rows, math.inf)))
        for call in calls[:most]:
            try:
                launch(call)
            except Exception:
                if not launched:
                    raise
                log.warning("a call that follows %d others failed", launched, exc_info=True)
                break  # it is asked for again, and then comes first
            launched += 1
            with _answering(launched):
                to = self._answers + (launched - 1) * size
                self.memory.copy(self._call.finite, to, size)
            if until.ended:
                break
        finite = np.empty((launched, parts), np.int32)
        with _answering(launched):
            self.memory.download(self._answers, finite)
        pace = self._pace[rows] = (time.perf_counter() - began) / launched
        return [CallDone(each, pace) for each in finite.astype(bool).tolist()]

    def _make_answers(self, size: int) -> None:
        self.memory.wait()
        made = self.memory.allocate(size)
        if self._answers:
            self.memory.free(self._answers)
        self._answers, self._answers_size = made, size

    def _width(self, sampling: Sequence[Sampling]) -> int:
        """W, rounded up to a power of two: every other is a call of a size of its own."""
        top_ks, top_ps = [each.top_k for each in sampling], [each.top_p for each in sampling]
        needed = sort_width(top_ks, top_ps, self._codebook_size)
        if needed > self._widest:
            raise ValueError(
                f"the engines sort at most {self._widest} of {self._codebook_size} candidates: "
                f"give a top_k of 1 to {self._widest}, or neither top_k nor top_p"
            )
        return min(1 << (needed - 1).bit_length(), self._widest)

    def _told(self, parts: Sequence[Part]) -> npt.NDArray[np.void]:
        """The lanes of a call, in order of their rows, as many as there is room for."""
        told = np.full(self._lane_capacity, _NOBODY)
        lanes, row = [], 0
        for index, part in enumerate(parts):
            held = self._streams[part.stream]
            records = held.records + 4 * held.record * part.first
            for number, constants in enumerate(held.lanes):
                drawn = index if number == 0 else -1
                partner = part.count if number == 0 and len(held.lanes) > 1 else 0
                sees = part.stream.rows.visual is not None
                lanes.append(
                    (records, held.tokens, row, part.count, held.record, drawn)
                    + constants[:4]
                    + (sees, partner)
                    + constants[4:]
                )
                row += part.count
        told[: len(lanes)] = lanes
        return told

    def _arrays(self, columns: int) -> list[tuple[str, type[np.generic], tuple[int, ...]]]:
        """Inputs by row: their names, types and what follows the rows in their shapes."""
        whole, real = np.int32, np.float32
        return [
            ("tokens", whole, ()),
            ("coordinates", whole, (3,)),
            ("slot", whole, ()),
            ("write_index", whole, ()),
            ("neighbours", whole, (self._call.n,)),
            ("condition_slot", whole, ()),
            ("cross_neighbours", whole, (columns,)),
            ("temperature", real, ()),
            ("top_k", whole, ()),
            ("top_p", real, ()),
            ("uniform", real, ()),
            ("guidance", real, ()),
            ("unconditional_row", whole, ()),
        ]

    def _make_room(self, rows: int, lanes: int) -> None:
        """For calls of so many rows and lanes, at new addresses where there was less."""
        self.memory.wait()  # the last call may still run where this one's room was
        if rows > self.capacity:
            rows = max(rows, 2 * self.capacity)
            arrays = self._arrays(len(self._columns.place))
            sizes = {name: 4 * rows * int(np.prod(wide)) for name, _, wide in arrays}
            self._move(sizes | {"drawn": 4 * rows})
            self.capacity = rows
        if lanes > self._lane_capacity:
            lanes = max(lanes, 2 * self._lane_capacity)
            self._move({"lanes": lanes * _LANE.itemsize, "finite": 4 * lanes})
            self._lane_capacity = self._call.lane_count = self._call.part_count = lanes

    def _move(self, sizes: dict[str, int]) -> None:
        """Gives arrays of calls new memory, all of them or none."""
        made: dict[str, int] = {}
        try:
            for name, size in sizes.items():
                made[name] = self.memory.allocate(size)
        except MemoryError:
            for address in made.values():
                self.memory.free(address)
            raise
        self.generation += 1
        for name, address in made.items():
            before = getattr(self._call, name)
            setattr(self._call, name, address)
            if before:
                self.memory.free(before)

    def _run(self, name: str) -> None:
        call = _Call.from_buffer_copy(self._call)  # which a launch copies too

        def work() -> None:
            error = getattr(self._library, f"nuwa_rows_{name}")(byref(call), self.memory.stream)
            if error:
                self.memory.check()
                raise RuntimeError(f"the rows of a step: {name}: {error.decode()}")

        self.memory.put(work)

    def _constant(self, array: Int) -> int:
        address = self.memory.allocate(array.nbytes)
        self.memory.upload(np.ascontiguousarray(array), address)
        return address

    def _take(self, size: int) -> int:
        size = _rounded(size)
        spare = self._spare.get(size)
        return spare.pop() if spare else self.memory.allocate(size)

    def _give(self, address: int, size: int) -> None:
        """For the next stream, whose work comes after what is in the device's stream."""
        self._spare.setdefault(size, []).append(address)


@contextmanager
def _answering(launched: int) -> Iterator[None]:
    """DeviceLostError for an error if several calls were launched: they cannot be made again, as
    the later ones have overwritten what the first ones read.
    """
    try:
        yield
    except Exception as error:
        if launched > 1:
            raise DeviceLostError(f"the answers of {launched} calls are lost: {error}") from error
        raise


def padded(rows: int) -> int:
    """How many rows a call of so many gets: of few sizes, and at most half as many again; of more
    than 128, where what a step takes goes by its rows, an eighth.
    """
    power = 1 << (rows - 1).bit_length()
    if rows > 128:
        return -(-rows // (power // 16)) * (power // 16)
    return 3 * power // 4 if rows <= 3 * power // 4 else power


def _records(rows: Rows) -> Int:
    """i32 [K, record]: the columns of rows.h, a record a row."""
    columns = [
        rows.coordinates,
        rows.fed[:, None],
        rows.place[:, None],
        rows.given[:, None],
        rows.write_index[:, None],
        rows.uniform.view(np.int32)[:, None],
        rows.neighbours,
    ]
    if rows.visual is not None:
        columns.append(rows.visual)
    return np.ascontiguousarray(np.concatenate(columns, axis=1), np.int32)


def _constants(stream: Stream, lane: Lane) -> tuple:
    """What a lane's RowLane holds in every call, in order, but for what is between."""
    sampling = stream.sampling
    guided = stream.guided and lane is stream.lanes[0]
    return (
        lane.cache_slot,
        lane.condition_slot,
        lane.text_length,
        lane.text_first,
        sampling.top_k,
        sampling.temperature,
        sampling.top_p,
        sampling.guidance_scale if guided else 1.0,
    )


def _rounded(size: int) -> int:
    """To a power of two, so that memory of closed streams fits others."""
    return 1 << max(size - 1, 255).bit_length()


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnavailableError(f"{path} cannot be loaded: {error}") from None
    if (version := library.nuwa_rows_abi()) != ABI:
        raise UnavailableError(
            f"{path} is of version {version}, and this needs {ABI}: build it again"
        )
    library.nuwa_rows_unusable.restype = c_char_p
    library.nuwa_rows_unusable.argtypes = [c_int32]
    for name in ("gather", "commit"):
        function = getattr(library, f"nuwa_rows_{name}")
        function.restype, function.argtypes = c_char_p, [POINTER(_Call), c_void_p]
    return library
