"""The eight tasks of NÜWA: what conditions each, what is given, what comes out."""

from __future__ import annotations

from enum import StrEnum


class Task(StrEnum):
    """A task; the value is its name on the command line and in a manifest."""

    T2I = "t2i"
    S2I = "s2i"
    I2I = "i2i"
    TI2I = "ti2i"
    T2V = "t2v"
    S2V = "s2v"
    V2V = "v2v"
    TV2V = "tv2v"

    @property
    def is_video(self) -> bool:
        """Whether the result is a clip (else one image)."""
        return self.value.endswith("v")

    @property
    def needs_text(self) -> bool:
        """Whether a caption is required."""
        return self.value.startswith("t")

    @property
    def needs_sketch(self) -> bool:
        """Whether a sketch (segmentation map) conditions the result."""
        return self.value.startswith("s")

    @property
    def needs_frames(self) -> bool:
        """Whether a picture or clip is given, whose tokens are partly kept."""
        return self in (Task.I2I, Task.TI2I, Task.V2V, Task.TV2V)

    @property
    def needs_mask(self) -> bool:
        """Whether the part to generate is given as a mask."""
        return self in (Task.I2I, Task.TI2I, Task.TV2V)


UNCONDITIONAL_PROMPT = "none"  # the special word that conditions V2V and I2I (paper, section 3)


def parse_task(name: str) -> Task:
    """Task by name, in any case; ValueError naming the eight otherwise."""
    try:
        return Task(name.lower())
    except ValueError:
        choices = ", ".join(Task)
        raise ValueError(f"unknown task {name!r}; choose one of {choices}") from None
