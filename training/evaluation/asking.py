"""Puts questions to a generator, several at a time, and refuses answers of the wrong shape.

A generator is any function generate(task=, prompt=, frame_count=, seed=, frames=, mask=, sketch=)
-> u8[F,64,64,3]; see Question for the last three. With concurrency above 1 it is called from as
many threads. Knows nothing of what is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from ..sprites.world import SIDE
from .question import Question

Generate = Callable[..., np.ndarray]
Ask = Callable[[str, Sequence[Question], Sequence[int]], list[np.ndarray]]


@contextmanager
def asking(generate: Generate, concurrency: int) -> Iterator[Ask]:
    """ask(task, questions, seeds) -> answers in the same order, however many run at a time.

    ValueError for wrongly shaped answers; what the generator raises comes through.
    """
    with ThreadPoolExecutor(concurrency) as pool:

        def ask(task: str, questions: Sequence[Question], seeds: Sequence[int]) -> list[np.ndarray]:
            def one(question: Question, seed: int) -> np.ndarray:
                return _answer(generate, task, question, seed)

            return list(pool.map(one, questions, seeds))

        yield ask


def _answer(generate: Generate, task: str, question: Question, seed: int) -> np.ndarray:
    made = generate(
        task=task,
        prompt=question.prompt,
        frame_count=len(question.real),
        seed=seed,
        frames=_copy(question.frames),
        mask=_copy(question.mask),
        sketch=_copy(question.sketch),
    )
    expected = (len(question.real), SIDE, SIDE, 3)
    if made.shape != expected or made.dtype != np.uint8:
        raise ValueError(
            f"{task} gave {made.dtype} {list(made.shape)}; "
            f"the sprite world needs uint8 {list(expected)}"
        )
    return made


def _copy(array: np.ndarray | None) -> np.ndarray | None:
    """Nobody can change a question by changing what it was given."""
    return None if array is None else array.copy()
