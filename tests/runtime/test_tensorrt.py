"""The TensorRT backends, with ONNX Runtime in the place of TensorRT and the CPU as the GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest

from nuwa import plugins_trt
from nuwa.export import engines
from nuwa.runtime.backends import tensorrt
from nuwa.runtime.backends.device_memory import HostMemory
from nuwa.runtime.backends.device_rows import Tensor
from nuwa.runtime.backends.tensorrt import TensorRt, TensorRtRtx
from nuwa.runtime.bundle import open_bundle
from nuwa.runtime.core import GenerationRequest
from nuwa.runtime.engine import Engine, cache_slots, condition_slots, load_engine
from nuwa.runtime.errors import DeviceLostError, FieldError, UnavailableError
from nuwa.spec.manifest import BundleError
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

from ..plugins_trt.native_rows import rows_library
from . import fake_tensorrt
from .engine_run import PROMPT, alone
from .fake_tensorrt import (
    PLUGIN_ABI,
    FakeTensorRt,
    FakeTensorRtx,
    IPluginRegistry,
    Memory,
    plugin_library,
    with_engines,
)

SLOTS = 2


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """The plugins that TensorRT knows: none, and none were built."""

    def none():
        raise FileNotFoundError("libnuwa_plugins.so was not built")

    made = IPluginRegistry()
    monkeypatch.setattr(fake_tensorrt, "REGISTRY", made)
    monkeypatch.setattr(plugins_trt, "library", none)
    return made


@pytest.fixture
def plugins(monkeypatch):
    monkeypatch.setattr(plugins_trt, "library", plugin_library)


@pytest.fixture(scope="module")
def bundle(tiny_bundle, tmp_path_factory):
    copy = tmp_path_factory.mktemp("tensorrt") / "bundle"
    shutil.copytree(tiny_bundle, copy)
    for runtime in ("tensorrt", "tensorrt-rtx"):
        with_engines(copy, runtime, slots=SLOTS)
    with_engines(copy, "tensorrt", slots=SLOTS, plugin_abi=PLUGIN_ABI)
    return open_bundle(copy)


def made(bundle, kind=TensorRtRtx, **options):
    return kind(
        bundle,
        cache_slots=cache_slots(SLOTS),
        condition_slots=condition_slots(SLOTS),
        kernels=rows_library(),
        module=FakeTensorRt if kind is TensorRt else FakeTensorRtx,
        memory=Memory,
        **options,
    )


def requests():
    """Of a few tasks, with few and many columns of cross attention, and candidates to sort."""
    for task in (Task.T2I, Task.T2V, Task.V2V):
        for guidance, prompt, top_k in ((1.0, PROMPT, 5), (2.0, "red " * 20, 0), (2.0, "a", 9)):
            yield GenerationRequest(
                task,
                prompt,
                frame_count=3 if task.is_video else 1,
                seed=3,
                sampling=Sampling(guidance_scale=guidance, top_k=top_k),
                frames=np.zeros((2, 16, 16, 3), np.uint8) if task is Task.V2V else None,
            )


def check_tokens(bundle, backend):
    """Those of the CPU, also when all sizes of calls were met before."""
    engine = Engine(bundle, backend, slots=SLOTS)
    cpu = load_engine(bundle.path, slots=SLOTS, backend="onnxruntime-cpu", threads=1)
    expected = [alone(cpu, request).tokens for request in requests()]
    for _ in range(2):
        for request, tokens in zip(requests(), expected, strict=True):
            assert (alone(engine, request).tokens == tokens).all()


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("kind", [TensorRt, TensorRtRtx])
def test_engines_give_the_tokens_of_the_cpu(bundle, kind, recording):
    """Rows are padded, and steps done again from what was recorded."""
    backend = made(bundle, kind, recording=recording)
    assert backend._copied
    check_tokens(bundle, backend)
    assert bool(backend._recorded) == recording
    if recording:
        rows, columns, candidates = map(set, zip(*backend._recorded, strict=True))
        assert len(rows) > 3 and len(columns) > 1 and candidates == {1, 8, 16}
        contexts = {id(each.context.made) for each in backend._recorded.values()}
        assert len(contexts) == len(backend._recorded), "each recording has one of its own"


class Events:
    """What stands for CUDA events: they see what is put into the stream between them."""

    def __init__(self, memory) -> None:
        assert isinstance(memory, Memory)
        self.open, self.asked = False, 0

    @contextlib.contextmanager
    def around(self):
        self.open = True
        yield
        self.open = False

    def seconds(self) -> float:
        self.asked += 1
        assert not self.open
        return 1e-9


@pytest.fixture
def batches(monkeypatch):
    """benchmarks/batches.py"""
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("batches", folder / "batches.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("recording", [True, False])
def test_a_benchmark_tells_device_and_gap_of_every_step(bundle, batches, monkeypatch, recording):
    backend = made(bundle, recording=recording)
    engine = Engine(bundle, backend, slots=SLOTS)
    inside, launched = batches._Inside(engine, Events), []
    execute = fake_tensorrt.Context._execute

    def noted(context):
        if context.engine.graph == "decoder_step":
            launched.append(inside._events.open)
        execute(context)

    monkeypatch.setattr(fake_tensorrt.Context, "_execute", noted)
    for _ in range(2):
        inside.clear()
        launched.clear()
        alone(engine, GenerationRequest(Task.T2I, PROMPT))
        assert launched and all(launched), "all of a step is between the events"
        assert len(inside.seconds) == len(launched) == len(inside.device)
        assert sum(inside.gap) == pytest.approx(sum(inside.seconds), rel=1e-3)
    asked = inside._events.asked
    inside.restore()
    alone(engine, GenerationRequest(Task.T2I, PROMPT))
    assert inside._events.asked == asked


def test_a_backend_without_a_gpu_has_no_device_time(bundle, batches):
    engine = load_engine(bundle.path, slots=SLOTS, backend="onnxruntime-cpu", threads=1)
    inside = batches._Inside(engine, Events)
    alone(engine, GenerationRequest(Task.T2I, PROMPT))
    assert inside.seconds and inside.device is None and inside.gap is None


@pytest.mark.parametrize("recording", [True, False])
def test_engines_with_the_plugin_write_caches_where_they_are(bundle, plugins, registry, recording):
    backend = made(bundle, TensorRt, recording=recording)
    assert registry.loaded == [str(plugin_library())]
    assert not backend._copied
    assert all(backend._kept[f"{name}_out"] == cache for name, cache in backend._caches.items())
    check_tokens(bundle, backend)
    made(bundle, TensorRt)
    assert len(registry.loaded) == 1, "the next model finds the plugins"


def test_who_builds_engines_twice_registers_the_plugins_once(registry):
    for _ in range(2):
        assert engines._load_plugins(FakeTensorRt, plugin_library()) == PLUGIN_ABI
    assert len(registry.loaded) == 1
    registry.all_creators.clear()
    registry.load_library = lambda path: None
    with pytest.raises(engines.EngineError, match="took no CachedNearbyAttention and no Near.*so"):
        engines._load_plugins(FakeTensorRt, plugin_library())


def test_engines_without_plugins_are_not_built_where_plugins_are_known(
    bundle, registry, monkeypatch
):
    """TensorRT would take them, for engines whose record says that they have none."""
    monkeypatch.setattr(engines, "_module", lambda _: FakeTensorRt)
    monkeypatch.setattr(engines, "_own_gpu", lambda: ("sm_90", "NVIDIA H200"))
    without = engines.EngineOptions("tensorrt")
    engines.check(without, "fp16")
    engines.check(engines.EngineOptions("tensorrt", plugins=plugin_library()), "fp16")
    found = sorted(bundle.path.glob("engines/*"))
    with pytest.raises(engines.EngineError, match="registered .* in a process of its own"):
        engines.check(without, "fp16")
    with pytest.raises(engines.EngineError, match="registered .* in a process of its own"):
        engines.build_engines(bundle.path, without)
    assert sorted(bundle.path.glob("engines/*")) == found


def test_a_library_whose_plugins_are_refused_is_named(bundle, plugins, registry, monkeypatch):
    monkeypatch.setattr(IPluginRegistry, "load_library", lambda *_: None)
    with pytest.raises(UnavailableError, match="took no CachedNearbyAttention and no NearbyAtt.*s"):
        made(bundle, TensorRt)


def test_a_recording_is_of_no_use_once_its_context_changes(bundle):
    """The stand-in sees it, TensorRT would do anything."""
    backend = made(bundle)
    graph, memory = backend._detokenizer, backend._detokenizer.memory
    tensors = graph.uploaded({"codes": np.zeros((1, 4, 4), np.int32)})
    shape = graph.shape_of("pixels", tensors)
    tensors["pixels"] = Tensor(graph.scratch("pixels", int(np.prod(shape))), np.uint8, shape)
    context = graph.new_context(0)
    with pytest.raises(AssertionError, match="it has not run like this before"):
        memory.record(lambda: graph.enqueue(tensors, context))
    graph.enqueue(tensors, context)
    recorded = memory.record(lambda: graph.enqueue(tensors, context))
    recorded.launch()
    context.made.set_input_shape("codes", (2, 4, 4))
    with pytest.raises(AssertionError, match="its context has changed"):
        recorded.launch()


def test_a_lost_gpu_is_told_from_a_call_that_fails(bundle, monkeypatch):
    backend = made(bundle)
    codes = np.zeros((1, 4, 4), np.int32)
    monkeypatch.setattr(fake_tensorrt.Context, "execute_async_v3", lambda *_: False)
    with pytest.raises(RuntimeError, match="image_detokenizer.engine did not run"):
        backend.detokenize(codes)

    def lost(_self):
        raise DeviceLostError("GPU 0 is lost to this process")

    monkeypatch.setattr(HostMemory, "check", lost)
    with pytest.raises(DeviceLostError):
        backend.detokenize(codes)
    with pytest.raises(DeviceLostError):
        alone(Engine(bundle, backend, slots=SLOTS), GenerationRequest(Task.T2I, PROMPT))


def test_more_candidates_than_engines_sort_are_refused(bundle, monkeypatch):
    monkeypatch.setattr(fake_tensorrt, "SORTED", 24)
    backend = made(bundle)
    engine = Engine(bundle, backend, slots=SLOTS)
    for sampling in (Sampling(top_k=25), Sampling(top_p=0.9), Sampling(top_k=1000, top_p=0.5)):
        with pytest.raises(FieldError, match="backend can sort 24: give a top_k of 1 to 24"):
            alone(engine, GenerationRequest(Task.T2I, PROMPT, sampling=sampling))
    cpu = load_engine(bundle.path, slots=SLOTS, backend="onnxruntime-cpu", threads=1)
    for sampling in (Sampling(top_k=24), Sampling(top_k=17, top_p=0.9), Sampling()):
        request = GenerationRequest(Task.T2I, PROMPT, sampling=sampling)
        assert (alone(engine, request).tokens == alone(cpu, request).tokens).all()
    assert {width for _, _, width in backend._recorded} == {24, 1}


def test_calls_are_rounded_up_within_their_profile(bundle):
    backend = made(bundle)
    assert backend._ranges == [(1, 1), (2, 8), (9, 64), (65, 300)]
    wanted = {1: (1, 0), 2: (2, 1), 7: (8, 1), 9: (12, 2), 13: (16, 2), 60: (64, 2), 65: (96, 3)}
    wanted |= {130: (144, 3), 200: (208, 3), 257: (288, 3), 289: (300, 3)}
    assert {rows: backend._rounded(rows) for rows in wanted} == wanted
    with pytest.raises(ValueError, match="a call of 301 rows is more than the 300"):
        backend._rounded(301)


@pytest.mark.parametrize("most", [None, 8])
def test_engines_that_are_too_narrow_for_guided_clips_say_so(bundle, monkeypatch, caplog, most):
    if most:
        monkeypatch.setattr(fake_tensorrt, "ROWS", (1, most))
    backend = made(bundle)
    said = [each for each in caplog.messages if "guided clips in all slots may need" in each]
    assert bool(said) == bool(most) and all("no calls of more than 8 rows" in s for s in said)
    assert backend.most_rows == (most or 300)
    alone(Engine(bundle, backend, slots=SLOTS), GenerationRequest(Task.T2I, PROMPT))


def test_what_was_recorded_is_forgotten_when_its_memory_goes(bundle, monkeypatch):
    freed = []
    monkeypatch.setattr(
        "nuwa.runtime.backends.device_memory._HostRecording.free", lambda each: freed.append(each)
    )
    backend = made(bundle)
    engine = Engine(bundle, backend, slots=SLOTS)
    alone(engine, GenerationRequest(Task.T2I, PROMPT))
    recorded = [each.recording for each in backend._recorded.values()]
    assert recorded
    freed.clear()  # those of the first calls, before there was room for the largest
    backend._rows.generation += 1
    alone(engine, GenerationRequest(Task.T2I, PROMPT))
    assert freed == recorded


def test_of_many_recordings_those_used_last_are_kept(bundle, monkeypatch):
    monkeypatch.setattr(tensorrt, "MOST_RECORDINGS", 2)
    backend = made(bundle)
    engine = Engine(bundle, backend, slots=SLOTS)
    contexts = weakref.WeakSet()
    new_context = backend._decoder.new_context
    monkeypatch.setattr(
        backend._decoder, "new_context", lambda profile: noted(contexts, new_context(profile))
    )
    request = GenerationRequest(Task.T2I, PROMPT)
    first, second = (alone(engine, request) for _ in range(2))
    assert (first.tokens == second.tokens).all()
    widths = [part for part, *_ in backend._recorded]
    assert len(widths) == 2 == len(contexts), "a context goes with its recording"
    assert widths[-1] == 1, "as the last wave has one row"


def noted(seen, each):
    seen.add(each)
    return each


def test_without_memory_for_a_context_steps_are_not_recorded(bundle, monkeypatch, caplog):
    backend = made(bundle)
    engine = Engine(bundle, backend, slots=SLOTS)
    request = GenerationRequest(Task.T2I, PROMPT)
    for profile in range(4):
        backend._decoder.context(profile)
    with monkeypatch.context() as patched:
        patched.setattr(fake_tensorrt.Engine, "create_execution_context", lambda *_: None)
        without = alone(engine, request)
    assert set(backend._recorded.values()) == {None}
    assert "steps of 1 rows are not recorded: TensorRT has no memory" in caplog.text
    assert (
        without.tokens == alone(Engine(bundle, made(bundle), slots=SLOTS), request).tokens
    ).all()


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
    options = {"kernels": rows_library(), "module": FakeTensorRt, "memory": Memory}
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

    sizes = {"cache_slots": 4, "condition_slots": 4}
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UnavailableError, match="tensorrt is not installed; pip install tensorrt-c"):
        TensorRt(bundle, **sizes)

    def none():
        raise FileNotFoundError("libnuwa_rows.so was not built")

    monkeypatch.setattr(plugins_trt, "rows", none)
    with pytest.raises(UnavailableError, match="needs kernels of its own: libnuwa_rows.so"):
        TensorRt(bundle, **sizes, module=FakeTensorRt, memory=HostMemory)


@pytest.mark.parametrize("module", ["tensorrt_lean_bindings", "tensorrt_rtx"])
def test_the_stand_in_has_the_names_of_tensorrt(module):
    """The lean runtime has the names of the full TensorRT, but for what builds."""
    trt = pytest.importorskip(module)
    rtx = module == "tensorrt_rtx"
    kinds = [
        "TensorIOMode",
        "Runtime",
        "ILogger",
        "IRuntimeConfig",
        "ExecutionContextAllocationStrategy",
        "IPluginRegistry",
    ]
    real = {getattr(fake_tensorrt, kind): getattr(trt, kind) for kind in kinds}
    real |= {fake_tensorrt.Context: trt.IExecutionContext, fake_tensorrt.Engine: trt.ICudaEngine}
    own = {"output_shape"}
    if rtx:
        kind = "DynamicShapesKernelSpecializationStrategy"
        real[getattr(fake_tensorrt, kind)] = getattr(trt, kind)
    else:  # which the backend asks TensorRT-RTX alone
        own |= {"is_stream_capturable", "dynamic_shapes_kernel_specialization_strategy"}
    for fake, wanted in real.items():
        names = {name for name in vars(fake) if not name.startswith("_")} - own
        assert names, fake
        assert names <= set(dir(wanted)), fake
    assert trt.ILogger.ERROR != trt.ILogger.WARNING
    kinds = {*vars(FakeTensorRt), *(vars(FakeTensorRtx) if rtx else ())}
    assert {name for name in kinds if not name.startswith("__")} <= set(dir(trt))


@pytest.mark.parametrize("module", ["tensorrt_lean_bindings", "tensorrt_rtx"])
def test_creators_of_a_real_registry_say_what_they_are(module):
    """Of plugins that TensorRT itself brings; ours are loaded in tests/plugins_trt."""
    trt = pytest.importorskip(module)
    creators = trt.get_plugin_registry().all_creators
    assert creators
    assert all(isinstance(each.name, str) for each in creators)
    assert {each.plugin_namespace for each in creators} <= {"", "nuwa"}


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        (Sampling(top_k=11), "top_k 11 chooses among 11 codes, .* can sort 10: give a top_k of 1"),
        (Sampling(top_p=0.9), "top_p 0.9 chooses among .* with it, or top_p 1"),
    ],
)
def test_more_candidates_than_can_be_sorted_are_refused_at_the_door(bundle, sampling, told):
    backend = made(bundle)
    backend.most_candidates = 10
    engine = Engine(bundle, backend, slots=SLOTS)
    engine.check(GenerationRequest(Task.T2I, "a red 3", sampling=Sampling(top_k=10, top_p=0.9)))
    with pytest.raises(FieldError, match=told) as caught:
        engine.check(GenerationRequest(Task.T2I, "a red 3", sampling=sampling))
    assert caught.value.field == f"sampling.{told.split()[0]}"


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


def test_a_backend_of_one_row_takes_no_guidance(bundle):
    backend = made(bundle)
    backend.most_rows = 1
    engine = Engine(bundle, backend, slots=SLOTS)
    request = GenerationRequest(Task.T2I, "a 3", sampling=Sampling(guidance_scale=2.0))
    with pytest.raises(FieldError, match="guidance_scale 2.0 takes two rows at a time, and"):
        engine.check(request)
    alone(engine, GenerationRequest(Task.T2I, "a 3"))


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
