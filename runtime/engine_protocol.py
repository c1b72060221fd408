"""What the scheduler and the service need of an engine; engine.py has the one that runs bundles.

Exists so that both can be tested without a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .core import GenerationRequest, ModelInfo, Pixels, SlotStep, Until
from .ranking import Ranker


class Prepared(Protocol):
    """A request whose conditions are encoded."""

    def close(self) -> None:
        """Makes room for another one. No slot may need it any more; harmless if repeated.

        For any thread.
        """


class Engine(Protocol):
    """Slots that decode side by side.

    `info`, `slots`, `rankers`, `check` and `room` are for any thread; one prepares, one makes
    pixels and one does everything else, all three at the same time.
    """

    @property
    def info(self) -> ModelInfo: ...

    @property
    def slots(self) -> int: ...

    @property
    def rankers(self) -> Mapping[str, Ranker]:
        """What can score samples: those named in `info.rankers`."""
        ...

    def check(self, request: GenerationRequest) -> None:
        """ValueError or UnsupportedTaskError if this request cannot be done."""

    @property
    def room(self) -> int:
        """How many more requests can be prepared now."""
        ...

    def prepare(self, request: GenerationRequest) -> Prepared:
        """Encodes a checked request's conditions, once for all of its samples.

        There must be room. May be called while another thread steps, by one at a time.
        """
        ...

    def admit(self, prepared: Any, slot: int, sample_index: int) -> None:
        """Makes `slot` ready to step a sample of what this engine has prepared; quick."""

    def step(self, until: Until | None = None) -> list[SlotStep]:
        """Decodes one wave of admitted slots, of all or of some; every unfinished one has its turn.

        Or, with `until`, several, as far as that lets it. An error of one slot is in its result.
        """
        ...

    def unfinished(self, slot: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Of an image that is being decoded: tokens i32 [h, w], and bool [h, w], which are there.

        Those that are not are tokens of any value.
        """
        ...

    def release(self, slot: int) -> None:
        """Frees a slot; harmless if it is free."""

    def tokens(self, pixels: Pixels) -> npt.NDArray[np.int32]:
        """Pixels u8 [F, H, W, 3] as tokens i32 [F, h, w]."""
        ...

    def pixels(self, tokens: npt.NDArray[np.int32]) -> Pixels:
        """Tokens i32 [F, h, w] as pixels u8 [F, H, W, 3]."""
        ...
