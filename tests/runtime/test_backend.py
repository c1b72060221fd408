"""All backends by one contract: caches in place, rows by themselves; and the batches they get."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref

import numpy as np
import onnxruntime as ort
import pytest

from nuwa.runtime.backends.base import Lane, Part
from nuwa.runtime.backends.cores import Cores
from nuwa.runtime.backends.frame_graph import FrameGraph
from nuwa.runtime.backends.native_cpu import NativeCpu
from nuwa.runtime.backends.native_library import LEVELS
from nuwa.runtime.backends.step_batch import StepBatch
from nuwa.runtime.backends.tensorrt import TensorRt
from nuwa.runtime.sequence import Sequence
from nuwa.spec.conditions import ConditionLayout, visual_neighbours, visual_window
from nuwa.spec.grid import MASKED, Grid
from nuwa.spec.manifest import STEP_ROW_INPUTS, step_call_inputs
from nuwa.spec.plan import decode_plan

from .backend_kinds import (
    CONDITIONS,
    KINDS,
    ON_A_DEVICE,
    SLOTS,
    WITH_PLUGINS,
    WITHOUT_KERNELS,
    WITHOUT_PLUGINS,
    batch_of,
    drawn,
    loaded,
    made_as,
    opened,
    random_tokens,
    sequence,
    volume,
)
from .fake_tensorrt import PLUGIN_ABI, FakeTensorRt


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def backend(bundle, kind):
    return loaded(bundle, kind)


def test_a_batch_has_the_inputs_of_the_graph(bundle, plain):
    fields = [field.name for field in dataclasses.fields(StepBatch)]
    assert fields == [*STEP_ROW_INPUTS, "ranks", "cross_columns"]
    for each in (bundle, plain):
        batch = batch_of(each, sequence(each, Lane(0, 0, 3)))
        given = [name for name in fields if getattr(batch, name) is not None]
        assert given == step_call_inputs(each.manifest.config)


def test_caches_are_written_in_place(bundle, backend):
    before = {name: array.copy() for name, array in backend.caches.items()}
    where = {name: array.ctypes.data for name, array in backend.caches.items()}
    parts = opened(backend, sequence(bundle, Lane(2, 1, 5), calls=4))
    backend.step(parts)
    if isinstance(backend, TensorRt):
        outputs = {name: backend._kept[f"{name}_out"].address for name in where}
        assert (outputs == where) == (not backend._copied)
    elif not isinstance(backend, NativeCpu):
        # The tokens and logits are bound after them.
        on_device = getattr(backend, "_step", None)
        binding = on_device._binding if on_device else backend._binding
        bound = [each.data_ptr() for each in binding.get_outputs()[:-2]]
        names = [each.name for each in backend._decoder.get_outputs()][2:]
        outputs = dict(zip(names, bound, strict=True))
        assert outputs == {f"{name}_out": address for name, address in where.items()}
    (part,) = parts
    rows = part.stream.rows.write_index[part.first : part.first + part.count]
    for name, array in backend.caches.items():
        assert where[name] == array.ctypes.data
        assert (array[2, rows] != 0).any(axis=-1).all(), "this call's entries are in the array"
        untouched = np.ones(array.shape[:2], bool)
        untouched[2, rows] = False
        assert (array[untouched] == before[name][untouched]).all(), "and nothing else is changed"


def test_a_later_call_reads_what_an_earlier_one_wrote(bundle, backend):
    parts = opened(backend, *(sequence(bundle, Lane(0, 1, 5), calls=calls) for calls in (0, 1)))
    backend.step(parts[:1])
    backend.step(parts[1:])
    seen = backend.logits
    for array in backend.caches.values():
        array[:] = 0
    backend.step(parts[1:])
    assert (backend.logits != seen).any()


def test_conditions_are_kept_apart(bundle, backend):
    def logits(condition: int) -> np.ndarray:
        length = backend.text_lengths[condition]
        backend.step(opened(backend, sequence(bundle, Lane(0, condition, length))))
        return backend.logits

    first = [logits(condition) for condition in range(CONDITIONS)]
    assert len({each.tobytes() for each in first}) == CONDITIONS
    backend.encode_text(bundle.text_tokenizer.encode("a blue cat stands still")[None], [1], 0)
    second = [logits(condition) for condition in range(CONDITIONS)]
    same = [(a == b).all() for a, b in zip(first, second, strict=True)]
    assert same == [True, False, True, True]


def test_each_part_of_a_condition_slot_is_written_alone(bundle, backend):
    config = bundle.manifest.config
    layout, frame = ConditionLayout.of(config), Grid(1, 4, 4)
    ids = bundle.text_tokenizer.encode("a blue cat stands still")[None]
    used = bundle.text_tokenizer.used(ids[0])  # what follows is padding, and may be left out
    picture = np.arange(16, dtype=np.int32), frame.coordinates(), visual_neighbours(config, frame)
    writes = [
        (0, 77, used, lambda: backend.encode_text(ids, [2], layout.text)),
        (77, 154, used, lambda: backend.encode_text(ids, [2], layout.none)),
        (154, 202, 48, lambda: backend.encode_visual(*volume(config, 9), 2)),
        (154, 170, 16, lambda: backend.encode_visual(*picture, 2)),
    ]
    for first, stop, count, write in writes:
        where, needed = slice(first, stop), slice(first, first + count)
        before = {name: array.copy() for name, array in backend.conditions.items()}
        write()
        for name, array in backend.conditions.items():
            assert array.shape == (CONDITIONS, 202, 32)
            assert (array[2, needed] != before[name][2, needed]).any(axis=-1).all()
            array[2, where] = before[name][2, where] = 0
            assert (array == before[name]).all()


def test_a_position_sees_only_what_is_near_it(bundle, backend):
    """One visual id changed: the logits of its window change, all others keep their bits."""
    config = bundle.manifest.config
    grid, text = config.decoder.grid, backend.text_lengths[1]
    window = visual_window(config, grid)
    waves = [
        sequence(bundle, Lane(0, 1, text), visual=window, calls=calls)
        for calls in range(decode_plan(config.decoder, grid).steps)
    ]

    def logits() -> dict[int, bytes]:
        seen = {}
        for each in waves:
            backend.step(without_writes(backend, each))
            position = each.stream.rows.place[each.part().first :][: each.width]
            rows = zip(position.tolist(), backend.logits, strict=True)
            seen |= {position: row.tobytes() for position, row in rows}
        return seen

    before = logits()
    layout, place = ConditionLayout.of(config), 21  # frame 1, row 1, column 1
    for array in backend.conditions.values():
        array[1, layout.visual + place] += 1.0
    after = logits()
    f, i, j = (np.abs(grid.coordinates() - grid.coordinates()[place])).T
    near = {
        position for position in range(grid.size) if max(f[position], i[position], j[position]) < 2
    }
    assert {position for position in before if before[position] != after[position]} == near


@pytest.mark.parametrize("sees", ["text", "visual", "mixed", "plain"])
def test_logits_have_the_same_bits_in_any_company(bundle, plain, kind, sees):
    """What co-batching rests on: not close, equal. With other calls, prompts, caches beside.

    Some rows see text alone and some a sketch too, beside text of every length.
    """
    bundle = plain if sees == "plain" else bundle
    backend, config = loaded(bundle, kind), bundle.manifest.config
    rng = np.random.default_rng(1)
    for array in backend.caches.values():
        array[:] = rng.standard_normal(array.shape)
    window = None if sees in ("plain", "text") else visual_window(config, config.decoder.grid)

    def clip(slot: int) -> Sequence:
        condition = slot % CONDITIONS
        looks = sees == "visual" or slot in (1, 2, 5)
        return sequence(
            bundle,
            Lane(slot, condition, backend.text_lengths[condition]),
            seed=slot,
            calls=2 * slot,
            visual=window if looks else None,
            top_p=0.9,
        )

    crowd = [clip(slot) for slot in range(SLOTS)]
    backend.step(without_writes(backend, *crowd))
    together, tokens = backend.logits, drawn(backend, *crowd)
    start = 0
    assert len(together) > 16
    for index, each in enumerate(crowd):
        rows = slice(start, start + each.width)
        start += each.width
        backend.step(without_writes(backend, each))
        assert (backend.logits == together[rows]).all()
        assert drawn(backend, each) == tokens[index : index + 1]
        whole = each.part()
        for row in range(each.width):  # and as single rows
            backend.step([Part(each.stream, whole.first + row, 1)])
            assert (backend.logits[0] == together[rows][row]).all()
        for other in crowd:  # and beside one other
            backend.step(without_writes(backend, other, each))
            assert (backend.logits[other.width :] == together[rows]).all()


def without_writes(backend, *sequences: Sequence) -> list[Part]:
    """`opened`, but so that every call meets the same caches."""
    for each in sequences:
        rows = each.stream.rows
        masked = np.full_like(rows.write_index, MASKED)
        each.stream.rows = dataclasses.replace(rows, write_index=masked)
    return opened(backend, *sequences)


@pytest.mark.parametrize(("length", "columns"), [(1, 16), (16, 16), (17, 32), (65, 77), (77, 77)])
def test_text_columns_are_rounded_up(plain, length, columns):
    batch = batch_of(plain, sequence(plain, Lane(0, 0, length), calls=3))
    expected = [*range(length), *[MASKED] * (columns - length)]
    assert batch.cross_neighbours.shape == (len(batch.tokens), columns)
    assert (batch.cross_neighbours == expected).all()
    assert batch.cross_columns is None


@pytest.mark.parametrize(
    ("length", "sees", "columns"),
    [(1, 0, 16), (17, 0, 32), (32, 0, 32), (33, 0, 80), (77, 0, 112)]
    + [(1, 1, 64), (32, 1, 64), (33, 1, 80), (49, 1, 96), (77, 1, 112)],
)
def test_columns_keep_their_place_whatever_a_call_needs(bundle, length, sees, columns):
    """32 text columns, 27 of the window and 5 empty ones, the other text columns."""
    config = bundle.manifest.config
    window = visual_window(config, config.decoder.grid)
    lane = Lane(0, 0, length, text_first=77)
    wave = sequence(bundle, lane, visual=window if sees else None, calls=3)
    batch = batch_of(bundle, wave)
    part = wave.part()
    positions = wave.stream.rows.place[part.first : part.first + part.count]
    for row, position in zip(batch.cross_neighbours, positions, strict=True):
        text = [77 + place if place < length else MASKED for place in range(80)]
        near = window[position].tolist() if sees else [MASKED] * 27
        whole = [*text[:32], *near, *[MASKED] * 5, *text[32:]]
        assert row.tolist() == whole[:columns]
        assert all(entry == MASKED for entry in whole[columns:])
    bias = [*[27] * 32, *range(27), *[27] * 53]
    assert batch.cross_columns.tolist() == bias[:columns]


def test_guided_rows_are_moved_away_from_their_partners(bundle, backend):
    window = visual_window(bundle.manifest.config, bundle.manifest.config.decoder.grid)
    conditional = Lane(0, 1, backend.text_lengths[1])
    unconditional = Lane(1, 1, 3, text_first=77)

    def logits(*lanes: Lane, scale: float) -> np.ndarray:
        clip = sequence(bundle, *lanes, visual=window, guidance_scale=scale)
        backend.step(opened(backend, clip))
        return backend.logits

    c = logits(conditional, scale=1.0)
    u = logits(unconditional, scale=1.0)
    both = logits(conditional, unconditional, scale=2.5)
    width = len(c)
    # To a rounding: a processor may multiply and add in one operation.
    np.testing.assert_allclose(both[:width], u + np.float32(2.5) * (c - u), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(both[width:], u)


def test_tokens_of_each_row_follow_its_own_settings(bundle, backend):
    """Greedy, one-candidate and free rows in one call."""
    lanes = [Lane(slot, 1, backend.text_lengths[1]) for slot in range(3)]
    settings = ({"temperature": 0.0}, {"top_k": 1, "temperature": 5.0}, {"temperature": 100.0})
    crowd = [
        sequence(bundle, lane, calls=4, **each) for lane, each in zip(lanes, settings, strict=True)
    ]
    for array in backend.caches.values():
        array[:] = 0
    assert all(backend.step(opened(backend, *crowd)))
    tokens = np.array(drawn(backend, *crowd))
    likeliest = backend.logits.argmax(axis=1).reshape(3, -1)
    assert (tokens[:2] == likeliest[:2]).all()
    assert (tokens[2] != likeliest[2]).any()


def test_serving_binds_no_logits(bundle, kind):
    backend = made_as(kind, bundle, cache_slots=1, condition_slots=1, threads=1, spinning=False)
    assert backend.step(opened(backend, sequence(bundle, Lane(0, 0, 3)))) == [True]
    assert backend.logits is None
    if kind == "onnxruntime":
        assert len(backend._binding.get_outputs()) == 1 + len(backend.caches)


def test_what_it_runs_on_is_told(backend, kind):
    library = f"ONNX Runtime {ort.__version__}"
    standard, recorded = f"{library}, standard operators", "steps recorded if they can be"
    fakes = FakeTensorRt.__version__
    told = {
        "onnxruntime": library,
        ON_A_DEVICE: f"{standard}, tokens on the device, steps not recorded",
        WITHOUT_KERNELS: f"{standard}, tokens on the host, steps not recorded",
        WITH_PLUGINS: f"tensorrt {fakes}, plugins {PLUGIN_ABI}, {recorded}",
        WITHOUT_PLUGINS: f"tensorrt_rtx {fakes}, standard operators, {recorded}",
    } | {f"native level {level}": f"native level {level}, {library}" for level in LEVELS}
    assert backend.runs_on == told[kind]


def test_codes_and_pixels_go_both_ways(bundle, backend):
    codes = np.random.default_rng(2).integers(0, 64, (5, 4, 4), np.int32)
    pixels = backend.detokenize(codes)
    assert pixels.shape == (5, 16, 16, 3) and pixels.dtype == np.uint8
    back = backend.tokenize(pixels)
    assert back.shape == codes.shape and back.dtype == np.int32
    assert ((back >= 0) & (back < 64)).all()


def test_class_maps_become_sketch_codes(bundle, backend):
    maps = np.random.default_rng(3).integers(0, 5, (3, 16, 16), np.uint8)
    codes = backend.tokenize_sketch(maps)
    assert codes.shape == (3, 4, 4) and codes.dtype == np.int32
    assert ((codes >= 0) & (codes < 48)).all() and len(np.unique(codes)) > 1
    assert (backend.tokenize_sketch(maps[1:2])[0] == codes[1]).all()


def test_graphs_that_a_bundle_lacks_are_named(plain):
    backend = loaded(plain, "onnxruntime")
    with pytest.raises(ValueError, match="no graph 'sketch_tokenizer'; it has decoder_step, text"):
        backend.tokenize_sketch(np.zeros((1, 16, 16), np.uint8))
    assert {array.shape[1] for array in backend.conditions.values()} == {154}


def test_threads_are_at_least_one(bundle, kind):
    with pytest.raises(ValueError, match="threads 0 is not at least 1"):
        made_as(kind, bundle, cache_slots=1, condition_slots=1, threads=0)


def test_logits_that_are_no_numbers_are_told(bundle, backend):
    """Of the part that has them; its tokens stay inside, and the others' are as without it."""
    for name, array in backend.conditions.items():
        if name.startswith("cross_value"):
            array[1] = np.nan
    ill, well = (sequence(bundle, Lane(c, c, 5), calls=4, temperature=1.0) for c in (1, 2))
    assert backend.step(opened(backend, well)) == [True]
    alone = drawn(backend, well)
    assert backend.step(opened(backend, ill, well)) == [False, True]
    assert np.isnan(backend.logits[: ill.width]).all(), "they are not hidden"
    assert drawn(backend, well) == alone
    assert all(-1 <= token < 64 for token in drawn(backend, ill)[0])


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_number_that_is_none_is_enough_to_be_told(other, kind, value):
    """Also where rows are quantized, which could make any whole number of it."""
    backend = loaded(other, kind)
    for name, array in backend.conditions.items():
        if name.startswith("cross_value"):
            array[1, :, 5] = value
    ill, well = (sequence(other, Lane(c, c, 5), calls=4, temperature=1.0) for c in (1, 2))
    assert backend.step(opened(backend, ill, well)) == [False, True]


def test_given_tokens_are_put_in_place_and_fed(bundle, backend):
    """A call whose rows are all given but the last: what is drawn is as if one by one."""
    config = bundle.manifest.config
    size = config.decoder.grid.size
    known = np.arange(size) < size // 2
    lane = Lane(0, 1, 5)
    made = sequence(bundle, lane, known=known)
    backend.open(made.stream)
    tokens = []
    while not made.done:
        parts = [made.part()]
        assert all(backend.step(parts))
        tokens += drawn(backend, made)[0]
        made.advance(made.width)
    order = decode_plan(config.decoder, config.decoder.grid).position
    got = dict(zip(order.tolist(), tokens, strict=True))
    assert [got[p] for p in range(size // 2)] == random_tokens(0, size)[: size // 2].tolist()
    whole = backend.tokens(made.stream, 0, size)
    assert whole.tolist() == [got[p] for p in range(size)]


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_frames_are_read_alike_in_any_company(bundle, threads):
    """On one thread each, so that tokens of what is given are the same at any time."""
    one, many = loaded(bundle, "onnxruntime"), loaded(bundle, "onnxruntime", threads)
    pixels = np.random.default_rng(2).integers(0, 256, (7, 16, 16, 3), np.uint8)
    maps = np.random.default_rng(3).integers(0, 5, (7, 16, 16), np.uint8)
    for read, frames in (("tokenize", pixels), ("tokenize_sketch", maps)):
        alone = np.stack([getattr(one, read)(frame[None])[0] for frame in frames])
        for count in (1, 2, 3, 7):
            for busy in (False, True):
                assert (getattr(many, read)(frames[:count], busy=busy) == alone[:count]).all()


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_a_visual_volume_is_encoded_alike_in_any_company(bundle, threads):
    one, many = loaded(bundle, "onnxruntime"), loaded(bundle, "onnxruntime", threads)
    for busy in (False, True):
        for backend in (one, many):
            backend.encode_visual(*volume(bundle.manifest.config, 9), 2, busy=busy)
        for name, array in one.conditions.items():
            assert (array[2] == many.conditions[name][2]).all()


class Recorded(FrameGraph):
    """Notes of each call of a session: its thread, its frames, and the cores that were left.

    meeting: so many threads begin before any of them ends its first call.
    """

    def __init__(self, graph: FrameGraph, meeting: int = 1) -> None:
        vars(self).update(vars(graph))
        self.calls: list[tuple[int, int, int, bool]] = []
        self._barrier = threading.Barrier(meeting)

    def _run(self, session, frames):
        whole, thread = session is self._all, threading.get_ident()
        first = thread not in [call[0] for call in self.calls]
        self.calls.append((thread, len(frames), self._cores.free, whole))
        if first:
            self._barrier.wait(60)
        return super()._run(session, frames)


@pytest.mark.parametrize(
    ("count", "busy", "workers", "left", "whole"),
    [
        (1, False, 1, 1, True),
        (1, True, 1, 7, False),
        (2, False, 2, 6, False),
        (7, True, 2, 6, False),
        (20, False, 8, 1, False),
    ],
)
def test_frames_are_shared_out(bundle, count, busy, workers, left, whole):
    backend = loaded(bundle, "onnxruntime", threads=8)
    detokenizer = backend._detokenizer
    graph = backend._detokenizer = Recorded(detokenizer, workers)
    codes = np.random.default_rng(2).integers(0, 64, (count, 4, 4), np.int32)
    pixels = backend.detokenize(codes, busy=busy)
    assert pixels.shape == (count, 16, 16, 3)
    threads, frames, free, wide = zip(*graph.calls, strict=True)
    assert frames == (1,) * count and set(free) == {left} and set(wide) == {whole}
    assert len(set(threads)) == workers
    assert backend._cores.free == 8
    backend._detokenizer = detokenizer
    each = np.stack([backend.detokenize(code[None], busy=True)[0] for code in codes])
    assert np.abs(pixels.astype(int) - each).max() <= int(whole)


def test_a_part_that_fails_ends_when_all_parts_have(bundle):
    backend = loaded(bundle, "onnxruntime", threads=8)
    graph = backend._detokenizer = Recorded(backend._detokenizer)
    codes = np.zeros((8, 4, 4), np.int32)
    run = graph._run

    def fail_first(session, frames):
        if not graph.calls:
            graph.calls.append((0, 0, 0, False))
            raise RuntimeError("no pixels today")
        return run(session, frames)

    graph._run = fail_first
    with pytest.raises(RuntimeError, match="no pixels today"):
        backend.detokenize(codes)
    assert len(graph.calls) == 8 and backend._cores.free == 8


def test_a_backend_that_nobody_needs_is_gone_at_once(bundle, kind):
    """Not only when the garbage collector comes by, which cannot see how much memory it holds."""
    gc.collect()
    gc.disable()
    try:
        backend = weakref.ref(loaded(bundle, kind, threads=2))
        assert backend() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("total", "share"), [(1, 1), (2, 1), (4, 1), (8, 2), (16, 4)])
def test_calls_beside_steps_leave_cores_for_them(total, share):
    cores = Cores(total)
    assert (cores.share, cores.free) == (share, total)
    with cores.lend(cores.share), cores.lend(cores.share):
        assert cores.free == max(1, total - 2 * share)
    with cores.lend(total):
        assert cores.free == 1
    assert cores.free == total
