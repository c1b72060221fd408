"""How a token is drawn: the settings, a model's defaults for them, what a call must sort for them.

Shared by everything that drives decoder_step; drawing itself is part of that graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from .tasks import Task


@dataclass(frozen=True)
class Sampling:
    """How one token is drawn from the model's distribution.

    temperature 0 is argmax (top_k, top_p and the seed then do not matter); top_k 0 and top_p 1
    switch those filters off; guidance_scale 1 switches classifier-free guidance off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        # Logits over a temperature must stay finite; the comparison also refuses NaN.
        if self.temperature != 0.0 and not 0.001 <= self.temperature <= 100.0:
            raise ValueError(f"temperature {self.temperature} is not in [0.001, 100], nor 0")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k {self.top_k} is not in [0, 2147483647]; 0 means no limit")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p {self.top_p} is not in (0, 1]")
        if not 0.0 <= self.guidance_scale <= 50.0:
            raise ValueError(f"guidance_scale {self.guidance_scale} is not in [0, 50]")


SAMPLING_NAMES = tuple(field.name for field in fields(Sampling))


def sampling_defaults(data: Any, tasks: Iterable[Task]) -> dict[Task, Sampling]:
    """Defaults by task from parsed JSON: {"t2i": {"temperature": 0.7}, ...}; tasks may be absent.

    ValueError naming what is wrong: a task that is not among `tasks`, an unknown name, a value out
    of its range.
    """
    able = [str(task) for task in tasks]
    if not isinstance(data, Mapping):
        raise ValueError(f"sampling defaults are {data!r}, not an object by task")
    for task, values in data.items():
        if task not in able:
            raise ValueError(f"sampling defaults of {task!r}; the model does {', '.join(able)}")
        if not isinstance(values, Mapping) or not set(values) <= set(SAMPLING_NAMES):
            raise ValueError(
                f"sampling defaults of {task} are {values!r}; they may set "
                f"{', '.join(SAMPLING_NAMES)}"
            )
        for name, value in values.items():
            whole = name == "top_k"
            number = isinstance(value, int if whole else (int, float))
            if not number or isinstance(value, bool):
                wanted = "a whole number" if whole else "a number"
                raise ValueError(f"sampling defaults of {task}: {name} {value!r} is not {wanted}")
    return {Task(task): _sampling(task, values) for task, values in data.items()}


def _sampling(task: str, values: Mapping[str, Any]) -> Sampling:
    try:
        return Sampling(**values)
    except ValueError as error:
        raise ValueError(f"sampling defaults of {task}: {error}") from None


def sort_width(top_k: Iterable[int], top_p: Iterable[float], codebook_size: int) -> int:
    """W, the length of the `ranks` input, for the top_k and top_p of all rows of a call.

    codebook_size if any row has top_p < 1 without a top_k, else the largest top_k, at least 1.
    """
    width = 1
    for k, p in zip(top_k, top_p, strict=True):
        if p < 1.0 and k == 0:
            return codebook_size
        width = max(width, int(k))
    return min(width, codebook_size)
