"""What the engine asks of a device: a few verbs over numpy arrays; caches and tokens stay there.

Knows no request, no schedule and no bundle folder. Three threads drive a backend, each with methods
of its own, at the same time: one encodes and tokenizes, into condition slots that no stream reads
meanwhile; one opens, stages, steps, reads and closes streams; one detokenizes.

Legend: K rows staged at a time, n neighbour columns, v columns of the visual window, B batch,
M text length, N positions of a volume, H x W pixels and h x w tokens of a frame.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from nuwa.spec.engines import TENSORRT, TENSORRT_RTX
from nuwa.spec.grid import Int
from nuwa.spec.sampling import Sampling

from ..core import Pixels, Until
from ..errors import UnavailableError

Float = npt.NDArray[np.float32]

log = logging.getLogger("nuwa.runtime")

AUTO = "auto"
NATIVE_CPU, ONNXRUNTIME_CPU = "native-cpu", "onnxruntime-cpu"
ONNXRUNTIME_CUDA = "onnxruntime-cuda"
CPU_PRECISIONS = ("fp32", "fp16", "bf16", "int8")  # of bundles
# What choice.make_backend takes.
BACKENDS = (AUTO, NATIVE_CPU, ONNXRUNTIME_CPU, ONNXRUNTIME_CUDA, TENSORRT, TENSORRT_RTX)


def check_precision(name: str, precision: str, known: Collection[str]) -> None:
    """UnavailableError if a backend has no arithmetic for a bundle of this precision."""
    if precision not in known:
        *others, last = known
        raise UnavailableError(
            f"{name} runs bundles of {', '.join(others)} and {last}, and this one is of "
            f"{precision}: export the checkpoint in one of these, or use another backend"
        )


@dataclass(frozen=True)
class Lane:
    """Where rows of a stream run: a cache slot, a condition slot, and which text of that they see.

    text_length entries from text_first on are the lane's text.
    """

    cache_slot: int
    condition_slot: int
    text_length: int
    text_first: int = 0


@dataclass(frozen=True, eq=False)
class Rows:
    """What is known of positions of one stream before they are decoded, in decoding order.

    coordinates i32 [K, 3]; fed i32 [K], the place in the stream's tokens of what a position is fed,
    or -1 - t for the token t; place i32 [K], where its own token goes; given i32 [K], its token if
    that is not drawn, else -1; write_index i32 [K] and neighbours i32 [K, n], entries of the cache
    slot, -1 masked or not written; visual i32 [K, v], the entries of the condition slot that it
    sees besides text, -1 masked, None where it sees none; uniform f32 [K].

    Arrays are contiguous.
    """

    coordinates: Int
    fed: Int
    place: Int
    given: Int
    write_index: Int
    neighbours: Int
    visual: Int | None
    uniform: Float

    def __len__(self) -> int:
        return len(self.fed)


@dataclass(eq=False)
class Stream:
    """One sequence as a backend sees it.

    lanes: one or, guided, two: the logits of the first are moved away from those of the second.
    held: how many tokens it keeps; rows are staged in turn, each time instead of those before.
    """

    lanes: tuple[Lane, ...]
    sampling: Sampling
    held: int
    rows: Rows

    @property
    def guided(self) -> bool:
        return len(self.lanes) > 1


@dataclass(eq=False, slots=True)  # not frozen, which would make making one take longer
class Part:
    """What a call does for a stream: `count` of its staged rows from `first` on, once a lane."""

    stream: Stream
    first: int
    count: int


class CallDone(NamedTuple):
    """finite: of each part, as `Backend.step` returns; seconds: how long the call took."""

    finite: list[bool]
    seconds: float


def steps_in_turn(
    step: Callable[[Sequence[Part]], list[bool]], calls: Sequence[Sequence[Part]], until: Until
) -> list[CallDone]:
    """`Backend.steps` of one that does each call by itself."""
    done: list[CallDone] = []
    began = before = time.perf_counter()
    for parts in calls:
        try:
            finite = step(parts)
        except Exception:
            if not done:
                raise
            log.warning("a call that follows %d others failed", len(done), exc_info=True)
            break  # it is asked for again, and then comes first
        now = time.perf_counter()
        done.append(CallDone(finite, now - before))
        before = now
        if until.ended or now - began >= until.seconds:
            break
    return done


class Backend(Protocol):
    """A model on a device. Caches and condition slots are allocated when it is made.

    A sequence is a stream: opened, its rows staged, stepped by parts, its tokens read, closed. In
    between nothing of it goes to the device or comes back but which rows are next.
    """

    @property
    def name(self) -> str:
        """What ModelInfo.backend says."""
        ...

    @property
    def runs_on(self) -> str:
        """What ModelInfo.runs_on says."""
        ...

    @property
    def most_rows(self) -> int | None:
        """Rows that a call may have, a guided stream's counted twice; None for any number."""
        ...

    @property
    def most_candidates(self) -> int | None:
        """Codes that top-k and top-p may choose among (spec.sampling.sort_width); None for all."""
        ...

    def encode_text(
        self, ids: Int, condition_slots: Sequence[int], first: int, *, busy: bool = False
    ) -> None:
        """Puts the cross-attention keys and values of ids i32 [B, M] into B condition slots.

        Into entries [first, first + M) of each.
        """

    def encode_visual(
        self,
        tokens: Int,
        coordinates: Int,
        neighbours: Int,
        condition_slot: int,
        *,
        busy: bool = False,
    ) -> None:
        """Puts those of one volume of visual ids i32 [N] into the visual entries of a slot.

        coordinates i32 [N, 3]; neighbours i32 [N, n], positions of the volume, -1 masked; busy:
        streams are stepped beside, here and below: on a processor a call then leaves cores for
        that. Only for a model with a visual encoder.
        """

    def open(self, stream: Stream) -> None:
        """Makes a stream ready to step; its tokens are of any value."""

    def stage(self, stream: Stream) -> None:
        """Takes the stream's new rows."""

    def step(self, parts: Sequence[Part]) -> list[bool]:
        """Runs one call, which draws each row's token and puts it into its place.

        Of each part: logits of all rows were finite numbers; the tokens of a part that had others
        are of any value. A call that raises has put no token anywhere and may be made again, whole
        or in parts.
        """
        ...

    def steps(self, calls: Sequence[Sequence[Part]], until: Until) -> list[CallDone]:
        """Runs the first of these calls and, in turn, as many of the others as `until` lets it.

        All have the same streams. Each reads what those before it wrote. Raises only if the first
        one fails, which is then as if it had not been made.
        """
        ...

    def tokens(self, stream: Stream, first: int, count: int) -> Int:
        """i32 [count]: a copy of the tokens in places from `first` on."""
        ...

    def close(self, stream: Stream) -> None:
        """Forgets a stream."""

    def tokenize(self, pixels: Pixels, *, busy: bool = False) -> Int:
        """u8 [B, H, W, 3] -> codes i32 [B, h, w]."""
        ...

    def tokenize_sketch(self, class_maps: npt.NDArray[np.uint8], *, busy: bool = False) -> Int:
        """u8 [B, H, W] of class ids -> sketch codes i32 [B, h, w].

        Only for a model with a sketch tokenizer.
        """
        ...

    def detokenize(self, codes: Int, *, busy: bool = False) -> Pixels:
        """codes i32 [B, h, w] -> u8 [B, H, W, 3]."""
        ...
