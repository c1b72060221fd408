"""What the scheduler and the service need of an engine; engine.py has the one that runs bundles.

Exists so that both can be tested without a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .core import GenerationRequest, ModelInfo, Pixels, SlotStep
from .ranking import Ranker


class Engine(Protocol):
    """Slots that decode side by side.

    Only `info`, `slots`, `rankers` and `check` are used by many threads.
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

    def admit(self, request: GenerationRequest, slot: int) -> None:
        """Encodes the request's conditions and makes `slot` ready to step."""

    def step(self) -> list[SlotStep]:
        """Decodes one wave of every admitted slot."""
        ...

    def release(self, slot: int) -> None:
        """Frees a slot; harmless if it is free."""

    def tokens(self, pixels: Pixels) -> npt.NDArray[np.int32]:
        """Pixels u8 [F, H, W, 3] as tokens i32 [F, h, w]."""
        ...

    def pixels(self, tokens: npt.NDArray[np.int32]) -> Pixels:
        """Tokens i32 [F, h, w] as pixels u8 [F, H, W, 3]."""
        ...
