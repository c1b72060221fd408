"""The TensorRT backends, with ONNX Runtime in the place of TensorRT and the CPU as the GPU."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from nuwa.runtime.backends import tensorrt
from nuwa.runtime.backends.device_memory import HostMemory
from nuwa.runtime.backends.tensorrt import TensorRt, TensorRtRtx
from nuwa.runtime.bundle import open_bundle
from nuwa.runtime.core import GenerationRequest
from nuwa.runtime.engine import Engine, cache_slots, condition_slots, load_engine
from nuwa.runtime.errors import UnavailableError
from nuwa.spec.manifest import BundleError
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

from ..plugins_trt.native_rows import rows_library
from . import fake_tensorrt
from .engine_run import PROMPT, alone
from .fake_tensorrt import FakeTensorRt, FakeTensorRtx, with_engines

SLOTS = 2


@pytest.fixture(scope="module")
def bundle(tiny_bundle, tmp_path_factory):
    copy = tmp_path_factory.mktemp("tensorrt") / "bundle"
    shutil.copytree(tiny_bundle, copy)
    for runtime in ("tensorrt", "tensorrt-rtx"):
        with_engines(copy, runtime, slots=SLOTS)
    return open_bundle(copy)


def made(bundle, kind=TensorRtRtx, **options):
    return kind(
        bundle,
        cache_slots=cache_slots(SLOTS),
        condition_slots=condition_slots(SLOTS),
        kernels=rows_library(),
        module=FakeTensorRt if kind is TensorRt else FakeTensorRtx,
        memory=HostMemory,
        **options,
    )


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("kind", [TensorRt, TensorRtRtx])
def test_engines_give_the_tokens_of_the_cpu(bundle, kind, recording):
    """Rows are padded, and steps done again from what was recorded."""
    backend = made(bundle, kind, recording=recording)
    engine = Engine(bundle, backend, slots=SLOTS)
    cpu = load_engine(bundle.path, slots=SLOTS, backend="onnxruntime-cpu", threads=1)
    for task in (Task.T2I, Task.T2V, Task.V2V):
        for guidance, prompt, top_k in ((1.0, PROMPT, 5), (2.0, "red " * 20, 0), (2.0, "a", 9)):
            frames = np.zeros((2, 16, 16, 3), np.uint8) if task is Task.V2V else None
            request = GenerationRequest(
                task,
                prompt,
                frame_count=3 if task.is_video else 1,
                seed=3,
                sampling=Sampling(guidance_scale=guidance, top_k=top_k),
                frames=frames,
            )
            here, there = alone(engine, request), alone(cpu, request)
            assert (here.tokens == there.tokens).all()
    assert bool(backend._recorded) == recording
    rows, columns, candidates = (
        map(set, zip(*backend._recorded, strict=True)) if recording else [()] * 3
    )
    assert not recording or (len(rows) > 3 and len(columns) > 1 and len(candidates) > 2)


def test_calls_are_rounded_up_within_their_profile(bundle):
    backend = made(bundle)
    assert backend._ranges == [(1, 1), (2, 8), (9, 64), (65, 300)]
    wanted = {1: (1, 0), 2: (2, 1), 7: (8, 1), 9: (12, 2), 13: (16, 2), 60: (64, 2), 65: (96, 3)}
    wanted |= {130: (192, 3), 200: (256, 3), 257: (300, 3)}
    assert {rows: backend._rounded(rows) for rows in wanted} == wanted
    with pytest.raises(ValueError, match="a call of 301 rows is more than the 300"):
        backend._rounded(301)


def test_what_was_recorded_is_forgotten_when_its_memory_goes(bundle, monkeypatch):
    freed = []
    monkeypatch.setattr(
        "nuwa.runtime.backends.device_memory._Again.free", lambda each: freed.append(each)
    )
    backend = made(bundle)
    engine = Engine(bundle, backend, slots=SLOTS)
    alone(engine, GenerationRequest(Task.T2I, PROMPT))
    recorded = [each for each in backend._recorded.values() if each]
    assert recorded
    freed.clear()  # those of the first calls, before there was room for the largest
    backend._rows.generation += 1
    alone(engine, GenerationRequest(Task.T2I, PROMPT))
    assert freed == recorded
    monkeypatch.setattr(tensorrt, "_MOST_RECORDINGS", 2)
    backend._rows.generation += 1
    alone(engine, GenerationRequest(Task.T2I, PROMPT))
    assert len(backend._recorded) <= 2


def test_what_cannot_be_recorded_is_done_each_time(bundle, monkeypatch, caplog):
    def refuse(_self, _work):
        raise RuntimeError("cudaErrorStreamCaptureUnsupported")

    monkeypatch.setattr(HostMemory, "record", refuse)
    backend = made(bundle)
    engine = Engine(bundle, backend, slots=SLOTS)
    first, second = (alone(engine, GenerationRequest(Task.T2I, PROMPT)) for _ in range(2))
    assert (first.tokens == second.tokens).all()
    assert set(backend._recorded.values()) == {None}
    said = [each for each in caplog.messages if "are not recorded: cudaErrorStream" in each]
    assert len(said) == len(backend._recorded), "once for each size"


def test_frames_go_in_calls_as_large_as_engines_take(bundle):
    backend = made(bundle)
    codes = np.random.default_rng(0).integers(0, 64, (7, 4, 4), np.int32)
    cpu = load_engine(bundle.path, backend="onnxruntime-cpu", threads=1)
    assert (np.abs(backend.detokenize(codes).astype(int) - cpu.pixels(codes)) <= 1).all()
    assert backend._detokenizer._engine.runs == 3
    pixels = cpu.pixels(codes)
    assert (backend.tokenize(pixels) == cpu.tokens(pixels)).mean() > 0.99


def test_engines_that_do_not_fit_are_refused_before_they_are_read(bundle, tmp_path):
    options = {"kernels": rows_library(), "module": FakeTensorRt, "memory": HostMemory}
    with pytest.raises(BundleError, match="for 2 slots, not 4.* --slots 4`"):
        TensorRt(bundle, cache_slots=8, condition_slots=6, **options)
    copy = tmp_path / "bundle"
    shutil.copytree(bundle.path, copy)
    folder = with_engines(copy, "tensorrt-rtx", slots=SLOTS)
    (folder / "text_encoder.engine").write_text("{}")
    with pytest.raises(BundleError, match="text_encoder.engine is not the file that its record"):
        made(open_bundle(copy))


def test_what_is_missing_is_named(bundle, monkeypatch):
    import sys

    from nuwa import plugins_trt

    sizes = {"cache_slots": 4, "condition_slots": 4}
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UnavailableError, match="tensorrt is not installed; pip install tensorrt-c"):
        TensorRt(bundle, **sizes)

    def none():
        raise FileNotFoundError("libnuwa_rows.so was not built")

    monkeypatch.setattr(plugins_trt, "rows", none)
    with pytest.raises(UnavailableError, match="needs kernels of its own: libnuwa_rows.so"):
        TensorRt(bundle, **sizes, module=FakeTensorRt, memory=HostMemory)


def test_the_stand_in_has_the_names_of_tensorrt():
    trt = pytest.importorskip("tensorrt_rtx")
    real = {
        fake_tensorrt.Context: trt.IExecutionContext,
        fake_tensorrt.Engine: trt.ICudaEngine,
        fake_tensorrt.Runtime: trt.Runtime,
        fake_tensorrt.TensorIOMode: trt.TensorIOMode,
        fake_tensorrt.ILogger: trt.ILogger,
        fake_tensorrt.IRuntimeConfig: trt.IRuntimeConfig,
        fake_tensorrt.ExecutionContextAllocationStrategy: trt.ExecutionContextAllocationStrategy,
        fake_tensorrt.DynamicShapesKernelSpecializationStrategy: (
            trt.DynamicShapesKernelSpecializationStrategy
        ),
    }
    own = {"output_shape"}
    for fake, wanted in real.items():
        names = {name for name in vars(fake) if not name.startswith("_")} - own
        assert names, fake
        assert names <= set(dir(wanted)), fake
    assert trt.ILogger.ERROR != trt.ILogger.WARNING
    kinds = {*vars(FakeTensorRt), *vars(FakeTensorRtx)}
    assert {name for name in kinds if not name.startswith("__")} <= set(dir(trt))


def test_prefill_takes_no_more_rows_than_there_are(bundle):
    """What is given to one request waits, rather than that a call is too large."""
    backend = made(bundle)
    backend.most_rows = 20
    engine = Engine(bundle, backend, slots=SLOTS)
    calls, step = [], backend.step

    def counted(parts):
        calls.append(sum(part.count * len(part.stream.lanes) for part in parts))
        return step(parts)

    backend.step = counted
    frames = np.zeros((3, 16, 16, 3), np.uint8)
    sampling = Sampling(guidance_scale=2.0)
    request = GenerationRequest(
        Task.V2V, "a red cat", frame_count=4, frames=frames, sampling=sampling
    )
    alone(engine, request)
    assert 16 < max(calls) <= 20


def test_memory_that_cannot_be_had_leaves_what_there_was(bundle, monkeypatch):
    backend = made(bundle)
    codes = np.random.default_rng(0).integers(0, 64, (1, 4, 4), np.int32)
    before = backend.detokenize(codes)
    room = dict(backend._detokenizer._room)

    def full(_self, _size):
        raise MemoryError("GPU 0 has no more memory")

    with monkeypatch.context() as patched:
        patched.setattr(HostMemory, "allocate", full)
        with pytest.raises(MemoryError):
            backend.detokenize(codes.repeat(3, axis=0))
    assert backend._detokenizer._room == room
    assert (backend.detokenize(codes) == before).all()
