"""Streams of a backend that runs decoder_step as a graph: their tokens stay on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nuwa.spec.grid import Int

from .base import Part, Stream


class HostTokens:
    """The part of Backend that concerns streams, but for the step; rows are read where they are."""

    def __init__(self) -> None:
        self._tokens: dict[Stream, Int] = {}

    def open(self, stream: Stream) -> None:
        self._tokens[stream] = np.zeros(stream.held, np.int32)

    def stage(self, stream: Stream) -> None:
        """Nothing to do: a step reads the stream's rows."""

    def tokens(self, stream: Stream, first: int, count: int) -> Int:
        return self._tokens[stream][first : first + count].copy()

    def close(self, stream: Stream) -> None:
        self._tokens.pop(stream, None)

    def held(self, stream: Stream) -> Int:
        """i32 [stream.held]: the tokens themselves."""
        return self._tokens[stream]

    def commit(self, parts: Sequence[Part], drawn: Int) -> list[bool]:
        """Puts what a call drew, i32 [T], into place, or -1 for no number; what `step` returns."""
        finite, start = [], 0
        for part in parts:
            rows, held = part.stream.rows, self._tokens[part.stream]
            staged = slice(part.first, part.first + part.count)
            own, given = drawn[start : start + part.count], rows.given[staged]
            finite.append(bool((own[given < 0] >= 0).all()))
            held[rows.place[staged]] = np.where(given < 0, own, given)
            start += part.count * len(part.stream.lanes)
        return finite
