"""Calls of decoder_step recorded by their size, on the CPU provider, which runs each call anew."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from nuwa.runtime.backends import onnxruntime_cuda, onnxruntime_step
from nuwa.runtime.backends.device_memory import HostMemory
from nuwa.runtime.backends.device_rows import Tensor
from nuwa.runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda
from nuwa.runtime.bundle import open_bundle
from nuwa.runtime.core import GenerationRequest
from nuwa.runtime.engine import Engine, cache_slots, condition_slots
from nuwa.runtime.errors import DeviceLostError
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

from ..plugins_trt.native_rows import rows_library
from .engine_run import PROMPT, admit, alone, finish, stop

SLOTS = 2


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


class Session:
    """Says which graph each call is of and how many rows it has, and fails where it is told to."""

    def __init__(self, session) -> None:
        self._session, self.graphs, self.rows = session, [], []
        self.fails = ""

    def run_with_iobinding(self, binding, options) -> None:
        self.graphs.append(int(options.get_run_config_entry("gpu_graph_id")))
        if self.fails and self.graphs[-1] != -1:
            raise RuntimeError(self.fails)
        self._session.run_with_iobinding(binding, options)
        self.rows.append(binding.get_outputs()[-1].shape()[0])


class Releasing(Session):
    """As of ONNX Runtime 1.32."""

    def __init__(self, session) -> None:
        super().__init__(session)
        self.released: list[int] = []

    def release_captured_graph(self, graph_id: int) -> None:
        assert graph_id in self.graphs and graph_id not in self.released
        self.released.append(graph_id)

    def run_with_iobinding(self, binding, options) -> None:
        super().run_with_iobinding(binding, options)
        assert self.graphs[-1] not in self.released


class Ones(Releasing):
    """As the CUDA provider, whose recordings read what a wider call frees."""

    widest, recorded_at = 0, None

    def run_with_iobinding(self, binding, options) -> None:
        super().run_with_iobinding(binding, options)
        self.recorded_at = self.recorded_at or {}
        self.widest = max(self.widest, self.rows[-1])
        graph_id = self.graphs[-1]
        if graph_id != -1 and self.recorded_at.setdefault(graph_id, self.widest) != self.widest:
            drawn = binding.get_outputs()[-1]
            ctypes.memset(drawn.data_ptr(), 0, 4 * self.rows[-1])


class Memory(HostMemory):
    abandoned, capturing = 0, False

    def abandon(self) -> bool:
        self.abandoned += 1
        return self.capturing


class Made(NamedTuple):
    engine: Engine
    backend: OnnxRuntimeCuda
    session: Session


def made(bundle, kind=Session, rows=64, slots=SLOTS, **arguments) -> Made:
    backend = OnnxRuntimeCuda(
        bundle,
        cache_slots=cache_slots(slots),
        condition_slots=condition_slots(slots),
        rows=rows,
        threads=1,
        device="cpu",
        kernels=rows_library(),
        memory=Memory,
        **arguments,
    )
    backend._step._session = session = kind(backend._decoder)
    return Made(Engine(bundle, backend, slots=slots), backend, session)


def tokens(engine, **sampling) -> np.ndarray:
    return alone(engine, GenerationRequest(Task.T2I, PROMPT, sampling=Sampling(**sampling))).tokens


def test_every_size_is_recorded_once(bundle):
    engine, _, session = made(bundle)
    first = tokens(engine)
    assert session.graphs[0] == -1 and session.rows[0] == 64, "as wide as there is room for"
    session.graphs.clear()
    assert (tokens(engine) == first).all()
    graphs = session.graphs.copy()
    assert 1 < len({*graphs}) < len(graphs) and -1 not in graphs
    assert (tokens(engine) == first).all()
    assert session.graphs == 2 * graphs, "a graph of the same number is of the same size"
    session.graphs.clear()
    tokens(engine, guidance_scale=2.5)
    assert max(session.graphs) > max(graphs), "two lanes are wider calls"
    session.graphs.clear()
    tokens(engine, top_k=3)
    assert not {*session.graphs} & {*graphs}, "it sorts"
    unrecorded = made(bundle, recording=False)
    assert (tokens(unrecorded.engine) == first).all() and {*unrecorded.session.graphs} == {-1}


@pytest.mark.parametrize("recording", [True, False])
def test_what_a_step_launches_can_be_timed(bundle, recording):
    engine, backend, session = made(bundle, recording=recording)
    inside, outside = [], []

    @contextlib.contextmanager
    def around():
        before = len(session.graphs)
        yield
        inside.append(len(session.graphs) - before)
        outside.append(before)

    backend.launching = around
    tokens(engine)
    assert {*inside} == {1} and outside == list(range(len(session.graphs)))


def test_only_so_many_sizes_are_recorded(bundle, monkeypatch):
    monkeypatch.setattr(onnxruntime_step, "MOST_RECORDINGS", 2)
    engine, _, session = made(bundle)
    first = tokens(engine)
    assert {*session.graphs} == {1, 2, -1}
    assert (tokens(engine) == first).all()
    assert {*session.graphs} == {1, 2, -1}
    assert (tokens(made(bundle, recording=False).engine) == first).all()


def test_the_one_used_longest_ago_is_released_where_that_can_be(bundle, monkeypatch):
    monkeypatch.setattr(onnxruntime_step, "MOST_RECORDINGS", 2)
    engine, backend, session = made(bundle, Releasing)
    first = tokens(engine)
    assert session.graphs.count(-1) == 1 and session.released
    held = [graph_id for graph_id, *_ in backend._step._recorded.values()]
    assert len(held) == 2 and not {*held} & {*session.released}
    assert held[-1] == session.graphs[-1]
    assert (tokens(engine) == first).all()


def test_graphs_are_not_made_for_ever(bundle, monkeypatch, caplog):
    """Providers that cannot release one say nothing."""
    monkeypatch.setattr(onnxruntime_step, "MOST_RECORDINGS", 2)
    monkeypatch.setattr(onnxruntime_step, "_MOST_MADE", 3)
    engine, _, session = made(bundle, Releasing)
    first = tokens(engine)
    assert (tokens(engine) == first).all()
    assert {*session.graphs} == {-1, 1, 2, 3}
    assert caplog.messages.count("3 sizes of steps were recorded, others are not any more") == 1


def test_a_call_wider_than_all_before_is_not_recorded_and_others_are_recorded_anew(
    bundle, monkeypatch
):
    """ONNX Runtime's CUDA provider frees what narrower recordings read when there are more rows."""
    monkeypatch.setattr(onnxruntime_step, "_LEAST_WIDE", 4)
    engine, _, session = made(bundle, Releasing, slots=4)
    request = GenerationRequest(Task.T2I, PROMPT)
    first = tokens(engine)
    finish(engine, {slot: admit(engine, request, slot) for slot in range(4)})
    assert (tokens(engine) == first).all()
    widest, of, stale = 0, {}, set()
    for graph, rows in zip(session.graphs, session.rows, strict=True):
        if rows > widest:
            assert graph == -1 and rows in (4, 8, 16, 32), "it is padded well beyond"
            stale |= {*of.values()}
            widest, of = rows, {}
        else:
            assert graph >= 1 and graph not in stale and of.setdefault(rows, graph) == graph
    assert widest > 4 and stale and stale == {*session.released}


def test_a_wider_call_that_fails_leaves_no_recording_behind(bundle, monkeypatch):
    """What they read may be gone by then."""
    monkeypatch.setattr(onnxruntime_step, "_LEAST_WIDE", 4)
    engine, backend, session = made(bundle, Releasing)
    tokens(engine)
    held = {graph_id for graph_id, *_ in backend._step._recorded.values()}

    def full(*_):
        raise RuntimeError("Failed to allocate memory for requested buffer of size 1")

    monkeypatch.setattr(session, "run_with_iobinding", full)
    monkeypatch.setattr(backend._step, "_bind", lambda *_: None)
    with pytest.raises(RuntimeError, match="Failed to allocate"):
        backend._step.run({"tokens": Tensor(1, np.int32, (32,))})
    assert held and held <= {*session.released} and not backend._step._recorded
    assert backend._step.rows(20) == 32, "and the next one is such a call again"


def test_calls_are_as_wide_as_there_is_room_for_at_most(bundle):
    step = made(bundle, rows=442).backend._step
    assert step.rows(1) == 256 and step.rows(300) == 442 and step.rows(443) == 512
    step._widest = 442
    wanted = {1: 1, 129: 144, 320: 320, 321: 352, 440: 442, 443: 512}
    assert {count: step.rows(count) for count in wanted} == wanted


def test_rows_at_new_addresses_are_recorded_anew(bundle):
    engine, backend, session = made(bundle)
    first = tokens(engine)
    session.graphs.clear()
    tokens(engine)
    graphs = session.graphs.copy()
    rows = backend._rows
    rows._make_room(2 * rows.capacity, 1)
    session.graphs.clear()
    assert (tokens(engine) == first).all()
    assert min(session.graphs) == 1 + max(graphs)
    assert len({*session.graphs}) == len({*graphs}) == len(backend._step._recorded)


def test_more_requests_are_no_new_addresses(bundle):
    """Lanes in all slots have room from the start."""
    engine, backend, _ = made(bundle, slots=8)
    before = backend._rows.generation
    request = GenerationRequest(Task.T2I, PROMPT, sampling=Sampling(guidance_scale=2.0))
    finish(engine, {slot: admit(engine, request, slot) for slot in range(8)})
    assert backend._rows.generation == before


def test_what_cannot_be_recorded_is_run(bundle, caplog):
    engine, backend, session = made(bundle)
    session.fails = "a kernel cannot be captured"
    found = tokens(engine)
    assert session.graphs[:4] == [-1, 1, -1, -1] and {*session.graphs[2:]} == {-1}
    assert session.rows[0] == 64 and session.rows[1] < 64 and not backend._step.padding
    assert backend._rows.memory.abandoned == 1, "the stream is out of its recording"
    [said] = [record.getMessage() for record in caplog.records if "recorded" in record.getMessage()]
    assert said == "steps are not recorded any more: a kernel cannot be captured"
    assert (found == tokens(made(bundle).engine)).all()


@pytest.mark.parametrize("capturing", [False, True])
def test_a_call_that_fails_by_itself_ends_no_recording(bundle, monkeypatch, capturing):
    """For want of memory, say, for which the engine makes narrower ones."""
    monkeypatch.setattr(Memory, "capturing", capturing)
    engine, backend, session = made(bundle)
    run = admit(engine, GenerationRequest(Task.T2I, PROMPT), 0)
    session.fails = "Failed to allocate memory for requested buffer of size 1099511627776"
    first, second = (engine.step()[0].error for _ in range(2))
    assert backend._rows.memory.abandoned == 1 and first is None
    assert second is None if capturing else session.fails in str(second)
    assert backend._step.recording != capturing
    session.fails = ""
    stop(engine, 0, run)
    if not capturing:
        session.graphs.clear()
        assert (tokens(engine) == tokens(made(bundle).engine)).all()
        assert min(session.graphs) == 2


def test_a_launch_that_fails_is_an_error(bundle):
    engine, _, session = made(bundle)
    tokens(engine)
    tokens(engine)
    session.fails = "a kernel cannot be captured"
    run = admit(engine, GenerationRequest(Task.T2I, PROMPT), 0)
    [result] = engine.step()
    assert "a kernel cannot be captured" in str(result.error)
    stop(engine, 0, run)


def test_a_graph_of_which_some_is_for_the_cpu_is_not_recorded(bundle, monkeypatch, caplog):
    opened = OnnxRuntimeCuda._session

    def session(self, graph, stream=None, *, recording=False):
        if recording:
            raise RuntimeError("not all nodes are of the CUDAExecutionProvider")
        return opened(self, graph, stream)

    monkeypatch.setattr(OnnxRuntimeCuda, "_session", session)
    engine, _, session = made(bundle)
    assert "steps are not recorded: not all nodes" in caplog.text
    tokens(engine)
    assert {*session.graphs} == {-1}


@pytest.mark.parametrize(
    "version", ["1.22.1", "1.30.2", "1.31.0", "1.31.1", "1.32.0.dev1", "2.0.0"]
)
def test_an_onnxruntime_whose_recordings_read_freed_memory_records_nothing(
    bundle, monkeypatch, caplog, version
):
    monkeypatch.setattr(onnxruntime_cuda.ort, "__version__", version)
    engine, backend, session = made(bundle)
    tokens(engine)
    said = [each for each in caplog.messages if "are not recorded" in each]
    if version < "1.31":
        assert {*session.graphs} == {-1} and not backend._step.recording
        assert len(said) == 1 and f"ONNX Runtime {version} read" in said[0]
        assert said[0].endswith("install 1.31 or later")
    else:
        assert {*session.graphs} > {-1, 1} and not said


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0", True),
        ("Name:'n' Status Message: CUDA error cudaErrorIllegalAddress:an illegal memory", True),
        ("CUDA error cudaErrorLaunchFailure:unspecified launch failure", True),
        ("CUDA error cudaErrorInvalidValue:invalid argument", False),
        ("CUDA error cudaErrorMemoryAllocation:out of memory", False),
    ],
)
def test_errors_of_cuda_are_known_by_number_and_by_name(bundle, said, lost):
    """ONNX Runtime has two ways to tell of them, and our kernels the second (ort_operators.cc)."""
    backend = made(bundle).backend
    with (
        pytest.raises(DeviceLostError if lost else RuntimeError) as raised,
        backend._device_checked(),
    ):
        raise RuntimeError(said)
    assert isinstance(raised.value, DeviceLostError) == lost


@pytest.mark.parametrize("stepping", [False, True])
def test_only_the_thread_of_steps_waits_for_their_stream(bundle, monkeypatch, stepping):
    """Another might break what is being recorded."""
    asked = []
    for name in ("ask", "check"):
        monkeypatch.setattr(Memory, name, lambda _, name=name: asked.append(name))
    engine, backend, session = made(bundle)

    def fails(*_):
        raise RuntimeError("not enough rows")

    run = admit(engine, GenerationRequest(Task.T2I, PROMPT), 0)
    monkeypatch.setattr(session, "run_with_iobinding", fails)
    monkeypatch.setattr(backend._detokenizer, "run", fails)
    if stepping:
        assert "not enough rows" in str(engine.step()[0].error)
    else:
        with pytest.raises(RuntimeError, match="not enough rows"):
            backend.detokenize(np.zeros((1, 4, 4), np.int32))
    assert asked == ["check" if stepping else "ask"]
    stop(engine, 0, run)


@pytest.fixture
def mismatches(monkeypatch):
    """benchmarks/mismatches.py"""
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("mismatches", folder / "mismatches.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mismatches", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("stale", [False, True])
def test_a_benchmark_finds_recordings_that_read_what_is_gone(
    bundle, mismatches, monkeypatch, stale
):
    monkeypatch.setattr(onnxruntime_step, "_LEAST_WIDE", 8)
    if stale:
        monkeypatch.setattr(onnxruntime_step.DeviceStep, "_forget", lambda _: None)
    recording = made(bundle, Ones, slots=4)
    unrecorded = made(bundle, slots=4, recording=False)
    mismatches.padding(unrecorded.engine)
    requests = [GenerationRequest(Task.T2I, PROMPT), GenerationRequest(Task.T2I, "a red 3")]
    found = mismatches.recorded(recording.engine, unrecorded.engine, requests, [1, 4, 1])
    assert found["batches"] == [1, 4, 1] and found["generations"] == 6
    assert found["graphs"] == recording.backend._step.made > 0 and found["recording"]
    assert (found["differing"] > 0) == stale
    assert unrecorded.session.rows == recording.session.rows and {*unrecorded.session.graphs} == {
        -1
    }
