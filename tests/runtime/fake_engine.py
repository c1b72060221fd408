"""An engine without a model, whose answers can be worked out by hand.

A frame is 4 x 4 tokens and 8 x 8 pixels: a token is a square of 2 x 2 pixels. One step decodes one
row of 4 tokens in every admitted slot, so a clip of F frames takes 4 F steps, and frame f is
finished by step 4 (f + 1). The token of frame f, row i, column j is

    (seed + sample_index + 16 f + 4 i + j) % 512

and a token t is the colour (t % 256, t // 256, 7). It can do every task but s2i; known frames and
masks are accepted and otherwise ignored. The prompt "refused" fails `check`.

It keeps state as the real one does, and draws from nothing else: the seed lies in the condition
slot of what is prepared, and is lost when that is given back; how far a sample is lies in the slot
that it decodes in. So what is mixed up, or given back too early, has other tokens.

Its ranker "first" scores a sample by the first token of its first frame; its ranker "broken" fails.

To misbehave on purpose: put an error into `prepare_error`, `admit_error`, `step_error` (used once),
into `slot_errors` for the next step of a slot, or give a seed in `bad_pixel_seeds`; clear `gate` to
hold every step until it is set again.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np

from nuwa.runtime.core import GenerationRequest, ModelInfo, SlotStep, UnsupportedTaskError, Until
from nuwa.runtime.errors import FieldError
from nuwa.spec.tasks import Task

GRID = 4
SIZE = 8
CODEBOOK = 512
MAX_FRAMES = 10
MAX_PREDICTED_FRAMES = 1000
CLASSES = 5
AHEAD = 2
LOST = 12345  # in a condition slot that is free
TASKS = tuple(task for task in Task if task is not Task.S2I)


def expected_tokens(seed: int, frame: int) -> np.ndarray:
    """The answer: i32 [4, 4]."""
    cells = np.arange(GRID * GRID).reshape(GRID, GRID)
    return ((seed % CODEBOOK + GRID * GRID * frame + cells) % CODEBOOK).astype(np.int32)


def expected_pixels(tokens: np.ndarray) -> np.ndarray:
    """Tokens i32 [..., 4, 4] as colours u8 [..., 8, 8, 3]."""
    colours = np.stack([tokens % 256, tokens // 256, np.full_like(tokens, 7)], axis=-1)
    return colours.astype(np.uint8).repeat(2, axis=-3).repeat(2, axis=-2)


def first_token(prompt: str, frames: np.ndarray) -> float:
    """The ranker "first"."""
    red, green, _ = frames[0, 0, 0].astype(int)
    return float(red + 256 * green)


def broken(prompt: str, frames: np.ndarray) -> float:
    """The ranker "broken"."""
    raise ValueError("secret of the ranker")


class FakePrepared:
    def __init__(self, request: GenerationRequest, slot: int, engine: FakeEngine) -> None:
        self.request, self.slot, self._engine = request, slot, engine

    def close(self) -> None:
        if self in self._engine.prepared:
            self._engine.prepared.remove(self)
            self._engine.seeds[self.slot] = LOST


class FakeEngine:
    def __init__(self, slots: int = 1) -> None:
        self.slots = slots
        self.info = ModelInfo(
            name="fake",
            bundle_hash="0" * 64,
            tasks=TASKS,
            height=SIZE,
            width=SIZE,
            max_frames=MAX_FRAMES,
            max_predicted_frames=MAX_PREDICTED_FRAMES,
            codebook_size=CODEBOOK,
            sketch_classes=CLASSES,
            parameter_count=3_000_000_000,
            precision="fp32",
            licence="CC0-1.0",
            backend="fake",
            rankers=("first", "broken"),
            sampling={},
            runs_on="fake 1.0",
        )
        self.rankers = {"first": first_token, "broken": broken}
        self.allocated: dict[int, GenerationRequest] = {}
        self.admitted: list[GenerationRequest] = []
        self.seeds = [LOST] * (slots + AHEAD)  # by condition slot
        self.sees: dict[int, int] = {}  # by slot, its condition slot
        self.next: dict[int, int] = {}  # by slot, the next token less the seed
        self.rows: dict[int, list[np.ndarray]] = {}  # by slot, i32 [4] each
        self.steps = 0
        self.pixel_calls: list[int] = []
        self.prepared: list[FakePrepared] = []
        self.prepare_error: Exception | None = None
        self.admit_error: Exception | None = None
        self.step_error: Exception | None = None
        self.slot_errors: dict[int, Exception] = {}
        self.bad_pixel_seeds: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()

    def check(self, request: GenerationRequest) -> None:
        if request.task not in TASKS:
            raise UnsupportedTaskError(f"{request.task} is not among {', '.join(TASKS)}", TASKS)
        if request.prompt == "refused":
            raise FieldError("prompt", "prompt 'refused' is refused")

    @property
    def room(self) -> int:
        return self.slots + AHEAD - len(self.prepared)

    def prepare(self, request: GenerationRequest) -> FakePrepared:
        assert self.room > 0, "there is no room to prepare a request"
        if self.prepare_error:
            error, self.prepare_error = self.prepare_error, None
            raise error
        slot = min({*range(len(self.seeds))} - {each.slot for each in list(self.prepared)})
        prepared = FakePrepared(request, slot, self)
        self.prepared.append(prepared)
        self.seeds[slot] = request.seed
        return prepared

    def admit(self, prepared: FakePrepared, slot: int, sample_index: int) -> None:
        assert slot not in self.allocated, "a slot was used twice"
        assert prepared in self.prepared, "it was given back, or never prepared"
        request = replace(prepared.request, sample_index=sample_index)
        self.allocated[slot] = request
        self.sees[slot], self.next[slot], self.rows[slot] = prepared.slot, sample_index, []
        self.admitted.append(request)
        if self.admit_error:
            error, self.admit_error = self.admit_error, None
            raise error

    def step(self, until: Until | None = None) -> list[SlotStep]:
        assert self.gate.wait(120), "a test forgot to open the gate"
        if self.step_error:
            error, self.step_error = self.step_error, None
            raise error
        self.steps += 1
        return [self._step_slot(slot, request) for slot, request in self.allocated.items()]

    def _step_slot(self, slot: int, request: GenerationRequest) -> SlotStep:
        drawn, rows_total = self.rows[slot], GRID * request.frame_count
        if error := self.slot_errors.pop(slot, None):
            return SlotStep(slot, GRID * len(drawn), GRID * rows_total, (), False, error)
        first = self.seeds[self.sees[slot]] + self.next[slot]
        drawn.append((np.arange(first, first + GRID) % CODEBOOK).astype(np.int32))
        self.next[slot] += GRID
        rows = len(drawn)
        frames: tuple = ()
        if rows % GRID == 0:
            frames = ((rows // GRID - 1, np.stack(drawn[-GRID:])),)
        given = 0 if request.frames is None else GRID * len(request.frames)
        return SlotStep(
            slot,
            GRID * rows,
            GRID * rows_total,
            frames,
            rows == rows_total,
            prefill=request.task is Task.V2V and rows <= given,
        )

    def unfinished(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        drawn = self.rows[slot]
        tokens, decoded = np.zeros((GRID, GRID), np.int32), np.zeros((GRID, GRID), bool)
        tokens[: len(drawn)], decoded[: len(drawn)] = np.reshape(drawn, (-1, GRID)), True
        return tokens, decoded

    def release(self, slot: int) -> None:
        self.allocated.pop(slot, None)
        self.rows.pop(slot, None)

    def tokens(self, pixels: np.ndarray) -> np.ndarray:
        """The inverse of `expected_pixels`."""
        cells = pixels[:, ::2, ::2].astype(np.int32)
        return cells[..., 0] + 256 * cells[..., 1]

    def pixels(self, tokens: np.ndarray) -> np.ndarray:
        assert tokens.dtype == np.int32 and tokens.shape[1:] == (GRID, GRID)
        self.pixel_calls.append(len(tokens))
        if self.bad_pixel_seeds & set(tokens[:, 0, 0].tolist()):
            raise ValueError("these tokens are bad")
        return expected_pixels(tokens)
