"""Which parts test which task."""

from __future__ import annotations

from collections.abc import Sequence

from ..sprites.world import SpriteWorld
from .completion import Completion
from .manipulation import Manipulation
from .prediction import GIVEN, CaptionedPrediction, Prediction
from .question import Part
from .sketch import FromSketch
from .text import FromText

TASKS = ("t2i", "s2i", "i2i", "ti2i", "t2v", "s2v", "v2v", "tv2v")


def parts_of(
    tasks: Sequence[str], world: SpriteWorld, *, sketch_prompt: str, given: int = GIVEN
) -> list[Part]:
    """The parts of `tasks`, in their order, each once; ValueError for an unknown task."""
    parts: list[Part] = []
    for task in dict.fromkeys(tasks):
        match task:
            case "t2i" | "t2v":
                parts.append(FromText(world, task))
            case "s2i" | "s2v":
                parts.append(FromSketch(world, task, sketch_prompt))
            case "i2i":
                parts.append(Completion(world))
            case "ti2i" | "tv2v":
                parts.append(Manipulation(world, task))
            case "v2v":
                parts += [Prediction(world, given), CaptionedPrediction(world, given)]
            case _:
                raise ValueError(f"cannot evaluate task {task!r}; choose from {', '.join(TASKS)}")
    return parts
