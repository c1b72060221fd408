"""Requests in, tokens and pixels out: slots that decode side by side, a wave of each in one call.

Drives a backend by the plans of spec/plan.py. No queue, no network, no device: those are the
scheduler's, the service's and the backend's.
"""

from __future__ import annotations

import functools
import itertools
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nuwa.spec.conditions import (
    ConditionLayout,
    lane_texts,
    visual_neighbours,
    visual_window,
)
from nuwa.spec.config import DecoderConfig
from nuwa.spec.grid import Grid, Int
from nuwa.spec.known import blank_hidden, hidden_edges
from nuwa.spec.manifest import BundleError, Manifest
from nuwa.spec.philox import uniforms
from nuwa.spec.plan import (
    Plan,
    RollingPlan,
    cache_entries,
    completion_plan,
    decode_plan,
    longest_clip,
    widest_wave,
)
from nuwa.spec.tasks import UNCONDITIONAL_PROMPT, Task

from .backends.base import AUTO, Backend, CallDone, Lane, Part
from .backends.choice import make_backend
from .bundle import Bundle, open_bundle
from .check import check_candidates, check_request
from .core import GenerationRequest, ModelInfo, Pixels, SlotStep, Until
from .errors import FieldError
from .given import known_positions
from .ranking import find_rankers, ranker_names
from .sequence import Sequence

log = logging.getLogger("nuwa.runtime")

Known = npt.NDArray[np.bool_]

# What is given is caught up with in calls of many rows. Beside others' waves such a call may have
# so many times their rows, which makes their step at most that much longer.
PREFILL_SHARE = 1.5
FEW_ROWS = 4  # take hardly longer than one: it is the weights that take the time
AHEAD = 2  # requests that can be prepared while all slots are taken
MOST_ROWS = (
    256  # of a call that nobody else waits for: its memory, and how soon it can be cancelled
)
MOST_WAVES = 8  # of a step, where they are short: what the host does around it is then an eighth
NOT_FINITE = "the model computed what is no finite number"


def load_engine(
    bundle: Path | str,
    *,
    slots: int = 1,
    threads: int | None = None,
    spinning: bool = False,
    verify: bool = True,
    backend: str = AUTO,
) -> Engine:
    """An engine on this machine for the bundle folder `bundle`.

    slots: requests that decode side by side; threads: None means one a core; spinning: threads
    wait actively within a step; verify: hash the bundle's files; backend: one of BACKENDS. Raises
    BundleError, UnavailableError where a backend that was asked for is not to be had, and
    ValueError for slots or threads below 1 and for an unknown backend.
    """
    if slots < 1:
        raise ValueError(f"slots {slots} is not at least 1")
    opened = open_bundle(bundle, verify)
    made = make_backend(
        backend,
        opened,
        cache_slots=cache_slots(slots),
        condition_slots=condition_slots(slots),
        rows=usual_rows(slots, opened.manifest.config.decoder),
        threads=threads,
        spinning=spinning,
    )
    return Engine(opened, made, slots=slots)


def condition_slots(slots: int) -> int:
    """Condition slots of an engine: one for each slot's request, and AHEAD for those that wait."""
    return slots + AHEAD


def cache_slots(slots: int) -> int:
    """Cache slots of an engine: slot s decodes in s, and its unconditional partner in slots + s."""
    return 2 * slots


def usual_rows(slots: int, decoder: DecoderConfig) -> int:
    """Rows of the largest usual call: the widest wave of a guided clip, of any length, in every
    slot.

    There are more where some catch up with what is given beside it; room for these is made then.
    """
    return max(MOST_ROWS, cache_slots(slots) * widest_wave(decoder))


class Prepared:
    """A request whose conditions are in a condition slot, which its samples share.

    plan, tokens i32 [N], known bool [N], window: as Sequence takes them; text_length: entries of
    the text that its first lane sees.
    """

    def __init__(
        self,
        request: GenerationRequest,
        slot: int,
        plan: Plan,
        tokens: Int,
        known: Known,
        window: Int | None,
        text_length: int,
        on_close: Callable[[int], None],
    ) -> None:
        self.request, self.slot, self.plan = request, slot, plan
        self.tokens, self.known, self.window = tokens, known, window
        self.text_length = text_length
        self._on_close: Callable[[int], None] | None = on_close

    def close(self) -> None:
        """Frees the condition slot; no sample may be running. Harmless if it is free."""
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close(self.slot)


class Engine:
    """Decodes samples of requests in up to `slots` slots; for its threads see engine_protocol.py.

    backend: has cache_slots(slots) and condition_slots(slots). on_step: where set, called with the
    rows and the seconds of each of the backend's calls.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *, slots: int) -> None:
        self.slots = slots
        self.on_step: Callable[[int, float], None] | None = None
        self.info = model_info(bundle, backend.name, backend.runs_on)
        self.rankers = find_rankers(bundle)
        self._backend = backend
        self._config = bundle.manifest.config
        self._text = bundle.text_tokenizer
        self._layout = ConditionLayout.of(self._config)
        self._sequences: dict[int, Sequence] = {}
        self._served: dict[int, int] = {}  # by slot, in which of the turns below it had rows last
        self._turn = 0
        _check_cache(bundle.manifest)
        self._free = list(range(condition_slots(slots)))  # condition slots; lists are thread-safe
        for slot in self._free:
            self._none_length = self._encode(UNCONDITIONAL_PROMPT, slot, self._layout.none)

    def check(self, request: GenerationRequest) -> None:
        """UnsupportedTaskError, or ValueError naming the value and the valid choices."""
        check_request(request, self.info)
        check_candidates(
            request.sampling, self._config.image.codebook_size, self._backend.most_candidates
        )
        if len(_texts(request)) > self._most:
            raise FieldError(
                "sampling.guidance_scale",
                f"guidance_scale {request.sampling.guidance_scale} takes two rows at a time, and "
                f"this server's backend takes {self._most}: give 1",
            )
        count, most = self._text.count(request.prompt), self._text.room
        if count > most:
            raise FieldError(
                "prompt", f"prompt is {count} tokens; the model reads at most {most}, so shorten it"
            )

    @property
    def room(self) -> int:
        """How many more requests can be prepared now."""
        return len(self._free)

    @property
    def _held(self) -> int:
        """Requests that are prepared, or being so, and not through with decoding."""
        return condition_slots(self.slots) - len(self._free)

    def prepare(self, request: GenerationRequest) -> Prepared:
        """Encodes what a checked request gives into a free condition slot, for all its samples."""
        assert self._free, "there is no free condition slot"
        slot = self._free.pop()
        try:
            return self._prepared(request, slot)
        except BaseException:
            self._free.append(slot)
            raise

    def admit(self, prepared: Prepared, slot: int, sample_index: int | None = None) -> None:
        """Makes a free slot ready to step a sample of a request, by default the request's own."""
        assert 0 <= slot < self.slots and slot not in self._sequences, "the slot is not free"
        request, config = prepared.request, self._config
        index = request.sample_index if sample_index is None else sample_index
        sequence = Sequence(
            prepared.plan,
            self._lanes(prepared, slot),
            request.sampling,
            functools.partial(uniforms, request.seed, index),
            prepared.tokens,
            prepared.known,
            config.bos,
            prepared.window,
        )
        self._backend.open(sequence.stream)
        self._sequences[slot] = sequence

    def _prepared(self, request: GenerationRequest, slot: int) -> Prepared:
        tokens, known = self._given_tokens(request)
        visual = self._visual_tokens(request, tokens, known)
        window = self._look(visual, self._grid(request), slot)
        length = self._encode(_texts(request)[0], slot, self._layout.text)
        plan = self._plan(request, known, slot)
        return Prepared(request, slot, plan, tokens, known, window, length, self._free.append)

    def step(self, until: Until | None = None) -> list[SlotStep]:
        """Decodes the next wave of admitted, unfinished slots, all in one call of the backend.

        Of a wide call that only catches up with what is given, a part, or nothing this time (see
        `_parts`). With `until`, and if nobody catches up, up to MOST_WAVES waves: no more than it
        lets, and none after one that completes a frame. A slot whose part fails, or whose logits
        are no finite numbers, fails alone: its result has the error.
        """
        active = {slot: s for slot, s in self._sequences.items() if not s.done}
        parts = self._parts(active)
        calls = [[*parts.values()]]
        whole = all(s.ordinary and slot in parts for slot, s in active.items())
        if until is not None and whole:
            calls += self._ahead(active)
        done = self._run(calls, until) if parts else []
        results = []
        for index, slot in enumerate(parts):
            taken = [(call[index], each[index]) for call, each in zip(calls, done, strict=False)]
            results.append(self._advance(slot, taken))
        return results

    def unfinished(self, slot: int) -> tuple[Int, Known]:
        """Of an image in a slot: its tokens i32 [h, w], and bool [h, w], which are decoded."""
        sequence = self._sequences[slot]
        height, width = sequence.plan.grid.height, sequence.plan.grid.width
        tokens = self._backend.tokens(sequence.stream, *sequence.place(0))
        return tokens.reshape(height, width), sequence.decoded().reshape(height, width)

    def release(self, slot: int) -> None:
        """Frees a slot; harmless if it is free."""
        sequence = self._sequences.pop(slot, None)
        if sequence is not None:
            self._served.pop(slot, None)
            self._backend.close(sequence.stream)

    def _parts(self, active: dict[int, Sequence]) -> dict[int, Part]:
        """What each slot does in the next call.

        Slots that decode a wave do all of it. Beside them, those with wider calls share
        PREFILL_SHARE times as many rows, and at least FEW_ROWS, the longest admitted first, so that
        nobody's wave waits long for what others were given; without them, MOST_ROWS. Never more
        than the backend takes.
        """
        waves = sum(s.width * len(s.stream.lanes) for s in active.values() if s.ordinary)
        room, most = max(FEW_ROWS, int(PREFILL_SHARE * waves)) if waves else MOST_ROWS, self._most
        lanes_behind = (len(s.stream.lanes) for s in active.values() if not s.ordinary)
        if waves + max(lanes_behind, default=0) > most:
            return self._parts_in_turn(active)
        room = min(room, most - waves)
        parts = {}
        for slot, sequence in active.items():
            if sequence.ordinary:
                parts[slot] = sequence.part()
            elif room >= (lanes := len(sequence.stream.lanes)):
                parts[slot] = sequence.part(room // lanes)
                room -= parts[slot].count * lanes
        return parts

    def _parts_in_turn(self, active: dict[int, Sequence]) -> dict[int, Part]:
        """For a backend that takes fewer rows than all need: those who had none for longest come
        first, and a wave may be decoded bit by bit.
        """
        parts, room = {}, self._most
        self._turn += 1
        for slot in sorted(active, key=lambda slot: self._served.get(slot, 0)):
            if room >= (lanes := len(active[slot].stream.lanes)):
                parts[slot] = active[slot].part(room // lanes)
                room -= parts[slot].count * lanes
                self._served[slot] = self._turn
        return parts

    def _ahead(self, active: dict[int, Sequence]) -> list[list[Part]]:
        """The calls after the next one, where each slot has a whole wave in all of them."""
        waves = [sequence.ahead(MOST_WAVES) for sequence in active.values()]
        calls = [list(call) for call in zip(*waves, strict=False)]  # up to the first to end
        return list(itertools.takewhile(lambda call: _rows(call) <= self._most, calls))[1:]

    @property
    def _most(self) -> int:
        """Rows that the backend takes in a call."""
        most = self._backend.most_rows
        return sys.maxsize if most is None else most

    def _run(self, calls: list[list[Part]], until: Until | None) -> list[list[Exception | None]]:
        """Runs calls, at least the first; what is wrong with each of their parts.

        Where the first one fails, each of its parts is run alone, so that only those at fault fail.
        """
        parts = calls[0]
        try:
            if until is not None and len(calls) > 1:
                done = self._backend.steps(calls, until)
            else:
                began = time.perf_counter()
                finite = self._backend.step(parts)
                done = [CallDone(finite, time.perf_counter() - began)]
        except Exception as error:
            if len(parts) == 1:
                return [[error]]
            errors = [self._run([[part]], None)[0][0] for part in parts]
            if not any(errors):  # or nobody would hear of it, but for its being slow
                log.warning(
                    "a step of %d requests failed, and none of them alone: %s", len(parts), error
                )
            return [errors]
        if self.on_step is not None:
            for call, each in zip(calls, done, strict=False):
                self.on_step(_rows(call), each.seconds)
        return [
            [None if fine else FloatingPointError(NOT_FINITE) for fine in each.finite]
            for each in done
        ]

    def _advance(self, slot: int, taken: list[tuple[Part, Exception | None]]) -> SlotStep:
        """After calls, with what was a slot's part in each and what was wrong with it."""
        sequence = self._sequences[slot]
        frames, prefill, error = [], not sequence.ordinary, None
        for part, error in taken:
            if error is not None:
                break
            try:
                for frame in sequence.advance(part.count):
                    tokens = self._backend.tokens(sequence.stream, *sequence.place(frame))
                    frames.append((frame, tokens.reshape(sequence.plan.grid.shape[1:])))
                if sequence.restage():
                    self._backend.stage(sequence.stream)
            except Exception as failure:
                frames, error = [], failure
                break
        positions, total = sequence.positions_done, sequence.positions_total
        return SlotStep(
            slot, positions, total, tuple(frames), sequence.done, error, prefill, len(taken)
        )

    def pixels(self, tokens: Int) -> Pixels:
        """Tokens i32 [F, h, w] -> u8 [F, H, W, 3]; given.restore_given puts given pixels back."""
        return self._backend.detokenize(tokens, busy=self._held > 0)

    def tokens(self, pixels: Pixels) -> Int:
        """u8 [F, H, W, 3] -> tokens i32 [F, h, w]; `pixels` of them is what the tokenizer keeps."""
        return self._backend.tokenize(pixels, busy=self._held > 1)

    def _given_tokens(self, request: GenerationRequest) -> tuple[Int, Known]:
        """i32 [N] and bool [N]; tokens that are not known are 0."""
        grid = self._grid(request)
        tokens = np.zeros(grid.size, np.int32)
        known = known_positions(request, grid)
        if request.frames is not None and known.any():
            frames = request.frames
            if request.mask is not None:
                frames = blank_hidden(frames, known.reshape(grid.shape))
            codes = self.tokens(frames).reshape(-1)
            where = np.flatnonzero(known)
            tokens[where] = codes[where]
        return tokens, known

    def _visual_tokens(self, request: GenerationRequest, tokens: Int, known: Known) -> Int | None:
        """i32 [N]: ids for the visual encoder; None if nothing is to be seen.

        Of a masked picture its known tokens. One that is hidden altogether is as good as none.
        """
        config = self._config
        if config.visual is None:
            return None
        if request.sketch is not None:
            codes = self._backend.tokenize_sketch(request.sketch, busy=self._held > 1).reshape(-1)
            return codes + np.int32(config.image.codebook_size)
        if request.task.needs_mask and known.any():
            assert request.mask is not None, "a checked request has the mask that its task needs"
            grid = self._grid(request)
            levels = config.visual.edge_levels
            edges = hidden_edges(request.mask, grid.height, grid.width, levels)
            hidden = np.int32(config.hidden) + np.tile(edges.reshape(-1), grid.frames)
            return np.where(known, tokens, hidden)
        return None

    def _plan(self, request: GenerationRequest, known: Known, slot: int) -> Plan:
        grid, decoder = self._grid(request), self._config.decoder
        if request.frame_count > decoder.grid.frames:
            given = 0 if request.frames is None else len(request.frames)
            # Clips in different slots do not all make new rows before the same step.
            return RollingPlan(decoder, request.frame_count, given, request.schedule, slot)
        if known.any():
            return completion_plan(decoder, grid, known, request.schedule)
        return decode_plan(decoder, grid, request.schedule)

    def _grid(self, request: GenerationRequest) -> Grid:
        """The volume, or as many first frames of it as the model was trained on."""
        most = self._config.decoder.grid
        return Grid(min(request.frame_count, most.frames), most.height, most.width)

    def _look(self, visual: Int | None, grid: Grid, slot: int) -> Int | None:
        """Encodes visual ids into a condition slot; the entries that every position then sees."""
        if visual is None:
            return None
        near = visual_neighbours(self._config, grid)
        self._backend.encode_visual(visual, grid.coordinates(), near, slot, busy=self._held > 1)
        return visual_window(self._config, grid)

    def _lanes(self, prepared: Prepared, slot: int) -> tuple[Lane, ...]:
        lane = Lane(slot, prepared.slot, prepared.text_length, self._layout.text)
        none = Lane(self.slots + slot, prepared.slot, self._none_length, self._layout.none)
        return (lane, none)[: len(_texts(prepared.request))]

    def _encode(self, prompt: str, slot: int, first: int) -> int:
        """Puts a text into a condition slot from entry `first`; how many positions of it count."""
        ids = self._text.encode(prompt)
        self._backend.encode_text(ids[None], [slot], first, busy=self._held > 1)
        text = self._config.text
        return self._text.used(ids) if text.mask_padding else text.length


def _rows(call: list[Part]) -> int:
    return sum(part.count * len(part.stream.lanes) for part in call)


def _texts(request: GenerationRequest) -> tuple[str, ...]:
    return lane_texts(request.prompt, request.sampling.guidance_scale)


def model_info(bundle: Bundle, backend: str, runs_on: str) -> ModelInfo:
    """What GetModel tells of a bundle on a backend."""
    manifest, config = bundle.manifest, bundle.manifest.config
    sketches = config.sketch is not None
    frames = config.decoder.grid.frames
    return ModelInfo(
        name=manifest.name,
        bundle_hash=bundle.hash,
        tasks=tuple(task for task in manifest.tasks if sketches or not task.needs_sketch),
        height=config.image.resolution,
        width=config.image.resolution,
        max_frames=frames,
        max_predicted_frames=longest_clip(config.decoder) if Task.V2V in manifest.tasks else frames,
        codebook_size=config.image.codebook_size,
        sketch_classes=config.sketch.channels if config.sketch is not None else 0,
        parameter_count=manifest.parameter_count,
        precision=manifest.precision,
        licence=manifest.licence,
        backend=backend,
        rankers=ranker_names(manifest),
        sampling=manifest.sampling,
        runs_on=runs_on,
    )


def _check_cache(manifest: Manifest) -> None:
    """BundleError if the graphs' caches are too small for this version's schedules.

    Also leaves the schedule of every number of frames in memory, so that no request waits for it.
    """
    needed = cache_entries(manifest.config.decoder)
    if needed > manifest.cache_entries:
        raise BundleError(
            f"the bundle's caches have {manifest.cache_entries} entries, and this nuwa-runtime "
            f"needs {needed}; export the checkpoint again with this version"
        )
