"""Calls of decoder_step recorded by their size, on the CPU provider, which runs each call anew."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import numpy as np
import pytest

from nuwa.runtime.backends import onnxruntime_cuda, onnxruntime_step
from nuwa.runtime.backends.device_memory import HostMemory
from nuwa.runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda
from nuwa.runtime.bundle import open_bundle
from nuwa.runtime.core import GenerationRequest
from nuwa.runtime.engine import Engine, cache_slots, condition_slots
from nuwa.runtime.errors import DeviceLostError
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

from ..plugins_trt.native_rows import rows_library
from .engine_run import PROMPT, admit, alone, stop

SLOTS = 2


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


class Session:
    """Says which graph each call is of, and fails where it is told to."""

    def __init__(self, session) -> None:
        self._session, self.graphs, self.fails = session, [], False

    def run_with_iobinding(self, binding, options) -> None:
        self.graphs.append(int(options.get_run_config_entry("gpu_graph_id")))
        if self.fails and self.graphs[-1] != -1:
            raise RuntimeError("a kernel cannot be captured")
        self._session.run_with_iobinding(binding, options)


class Memory(HostMemory):
    abandoned = 0

    def abandon(self) -> None:
        self.abandoned += 1


class Made(NamedTuple):
    engine: Engine
    backend: OnnxRuntimeCuda
    session: Session


def made(bundle, **arguments) -> Made:
    backend = OnnxRuntimeCuda(
        bundle,
        cache_slots=cache_slots(SLOTS),
        condition_slots=condition_slots(SLOTS),
        rows=64,
        threads=1,
        device="cpu",
        kernels=rows_library(),
        memory=Memory,
        **arguments,
    )
    backend._step._session = session = Session(backend._decoder)
    return Made(Engine(bundle, backend, slots=SLOTS), backend, session)


def tokens(engine, **sampling) -> np.ndarray:
    return alone(engine, GenerationRequest(Task.T2I, PROMPT, sampling=Sampling(**sampling))).tokens


def test_every_size_is_recorded_once(bundle):
    engine, _, session = made(bundle)
    first = tokens(engine)
    graphs = session.graphs.copy()
    assert 1 < len({*graphs}) < len(graphs) and min(graphs) == 1
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
    assert (tokens(made(bundle, recording=False).engine) == first).all()


def test_rows_at_new_addresses_are_recorded_anew(bundle):
    engine, backend, session = made(bundle)
    first = tokens(engine)
    graphs = session.graphs.copy()
    rows = backend._rows
    rows._make_room(2 * rows._capacity, 1)
    session.graphs.clear()
    assert (tokens(engine) == first).all()
    assert session.graphs == [each + max(graphs) for each in graphs]


def test_what_cannot_be_recorded_is_run(bundle, caplog):
    engine, backend, session = made(bundle)
    session.fails = True
    found = tokens(engine)
    assert session.graphs[:3] == [1, -1, -1] and {*session.graphs[1:]} == {-1}
    assert backend._rows.memory.abandoned == 1, "the stream is out of its recording"
    [said] = [record.getMessage() for record in caplog.records if "recorded" in record.getMessage()]
    assert said == "steps are not recorded any more: a kernel cannot be captured"
    assert (found == tokens(made(bundle).engine)).all()


def test_a_launch_that_fails_is_an_error(bundle):
    engine, _, session = made(bundle)
    tokens(engine)
    session.fails = True
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
        assert min(session.graphs) == 1 and not said


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
