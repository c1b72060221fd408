"""Rows put together on a device, with the CPU as the device, against the numpy of step_batch.py."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import re
import sys
import types
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest

from nuwa.runtime.backends import device_memory, device_rows
from nuwa.runtime.backends.base import Lane, Part, Rows, Stream
from nuwa.runtime.backends.device_memory import CudaMemory, HostMemory
from nuwa.runtime.backends.device_rows import DeviceRows
from nuwa.runtime.backends.host_tokens import HostTokens
from nuwa.runtime.backends.step_batch import CrossColumns, assemble
from nuwa.runtime.errors import DeviceLostError, UnavailableError
from nuwa.spec.config import VisualConfig, preset
from nuwa.spec.sampling import Sampling

from ..plugins_trt.native_rows import rows_library

PLAIN = dataclasses.replace(preset("sprites"), visual=None, sketch=None)
SEEING = dataclasses.replace(
    preset("sprites"),
    sketch=dataclasses.replace(preset("sprites").image, channels=21),
    visual=VisualConfig(layers=1, heads=4, ff_multiplier=1),
)
HELD = 300


def stream(config, draw, *, rows=40, guided=False, sees=False, text=9) -> Stream:
    """One of random rows, some given, some fed a token of their own."""
    windows = CrossColumns(config).bias

    def whole(low, high, *shape):
        return draw.integers(low, high, (rows, *shape), np.int32)

    visible = None
    if sees:
        assert windows is not None
        visible = whole(-1, 100, int(windows.max()))
    made = Rows(
        coordinates=whole(0, 8, 3),
        fed=whole(-config.image.codebook_size - 1, HELD),
        place=draw.permutation(HELD)[:rows].astype(np.int32),
        given=np.where(draw.random(rows) < 0.3, whole(0, 50), -1).astype(np.int32),
        write_index=whole(-1, 60),
        neighbours=whole(-1, 60, config.decoder.neighbour_count),
        visual=visible,
        uniform=draw.random(rows, np.float32),
    )
    lanes = [Lane(3, 1, text, 0)] + [Lane(4, 1, 3, 77)] * guided
    top_k = int(draw.integers(0, 9))
    sampling = Sampling(temperature=0.7, top_k=top_k, top_p=0.8, guidance_scale=2.5)
    return Stream(tuple(lanes), sampling, HELD, made)


def both(config, streams):
    """DeviceRows and HostTokens that hold the same tokens, and the memory of the first."""
    memory, host = HostMemory(), HostTokens()
    rows = DeviceRows(memory, rows_library(), config)
    for index, each in enumerate(streams):
        rows.open(each)
        host.open(each)
        host.held(each)[:] = np.random.default_rng(index).integers(0, 90, HELD)
        memory.upload(host.held(each), rows._streams[each].tokens)
    return rows, host, memory


def read(memory, tensor) -> np.ndarray:
    array = np.empty(tensor.shape, tensor.dtype)
    memory.download(tensor.address, array)
    return array


CROWDS = {
    "one": (PLAIN, [{}]),
    "guided": (PLAIN, [{"guided": True, "text": 70}, {}, {"guided": True}]),
    "sketches": (SEEING, [{}, {"sees": True, "guided": True}, {"sees": True, "text": 77}]),
    "text of a seeing model": (SEEING, [{"text": 40}, {"guided": True}]),
    "many": (SEEING, [{"sees": bool(i % 3), "guided": bool(i % 2)} for i in range(21)]),
}


@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("padding", [None, 5])
def test_inputs_are_those_of_a_batch(crowd, padding):
    config, kinds = CROWDS[crowd]
    draw = np.random.default_rng(len(kinds))
    streams = [stream(config, draw, **kind) for kind in kinds]
    rows, host, memory = both(config, streams)
    for count in (1, 7):
        parts = [Part(each, int(draw.integers(0, 30)), count) for each in streams]
        bos, columns = config.image.codebook_size, CrossColumns(config)
        batch = assemble(parts, host.held, bos, columns)
        wanted = len(batch.tokens)
        got = rows.begin(parts, None if padding is None else wanted + padding)
        rows.gather()
        for name, tensor in got.items():
            if name == "next_tokens":
                assert tensor.shape == (wanted + (padding or 0),)
                continue
            expected, array = getattr(batch, name), read(memory, tensor)
            assert array.dtype == expected.dtype, name
            rows_of = len(expected) if name in ("ranks", "cross_columns") else wanted
            if name == "ranks":  # rounded up
                assert len(array) == 1 << (len(expected) - 1).bit_length()
                assert (array == np.arange(len(array))).all()
            np.testing.assert_array_equal(array[:rows_of], expected, err_msg=name)
            if padding and rows_of == wanted:
                rest = array[wanted:]
                if name in ("write_index", "neighbours", "cross_neighbours"):
                    assert (rest == -1).all(), "padding touches no cache"
                if name == "unconditional_row":
                    assert (rest == np.arange(wanted, len(array))).all()
                if name == "tokens":
                    assert (rest == bos).all()
        assert set(got) - {"next_tokens"} == {
            field.name
            for field in dataclasses.fields(batch)
            if getattr(batch, field.name) is not None
        }


@pytest.mark.parametrize("crowd", CROWDS)
def test_drawn_tokens_go_where_they_belong(crowd):
    config, kinds = CROWDS[crowd]
    draw = np.random.default_rng(1)
    streams = [stream(config, draw, **kind) for kind in kinds]
    rows, host, memory = both(config, streams)
    parts = [Part(each, 4, 9) for each in streams]
    tensors = rows.begin(parts, 500)
    rows.gather()
    drawn = draw.integers(0, 60, 500, np.int32)
    start = 0
    for index, part in enumerate(parts):  # every third part meets what is no number
        if index % 3 == 0:
            free = np.flatnonzero(part.stream.rows.given[4:13] < 0)
            drawn[start + free[-1]] = -1
        start += part.count * len(part.stream.lanes)
    memory.upload(drawn, tensors["next_tokens"].address)
    rows.commit()
    assert rows.finish() == host.commit(parts, drawn) == [i % 3 != 0 for i in range(len(parts))]
    for each in streams:
        assert (rows.tokens(each, 0, HELD) == host.tokens(each, 0, HELD)).all()
    assert (rows.tokens(streams[-1], 17, 5) == host.tokens(streams[-1], 17, 5)).all()


def test_a_second_lane_draws_for_nobody():
    draw = np.random.default_rng(2)
    guided = stream(PLAIN, draw, guided=True)
    rows, _, memory = both(PLAIN, [guided])
    before = rows.tokens(guided, 0, HELD)
    tensors = rows.begin([Part(guided, 0, 6)])
    rows.gather()
    drawn = np.array([*range(100, 106), *[-1] * 6], np.int32)
    memory.upload(drawn, tensors["next_tokens"].address)
    rows.commit()
    assert rows.finish() == [True]
    changed = np.flatnonzero(rows.tokens(guided, 0, HELD) != before)
    assert set(changed) <= set(guided.rows.place[:6])


def test_rows_are_staged_anew_and_memory_is_used_again():
    draw, memory = np.random.default_rng(3), HostMemory()
    rows = DeviceRows(memory, rows_library(), PLAIN)
    for size in (40, 10, 200, 40):
        streams = [stream(PLAIN, draw, rows=size) for _ in range(3)]
        for each in streams:
            rows.open(each)
            each.rows = stream(PLAIN, draw, rows=2 * size if size < 150 else size).rows
            rows.stage(each)
        for each in streams:
            got = rows.begin([Part(each, 3, 5)])
            rows.gather()
            assert (read(memory, got["coordinates"]) == each.rows.coordinates[3:8]).all()
        for each in streams:
            rows.close(each)
            rows.close(each)  # as often as one likes
    before = len(memory._arrays)
    for _ in range(5):
        again = stream(PLAIN, draw)
        rows.open(again)
        rows.close(again)
    assert len(memory._arrays) == before


def test_memory_of_calls_stays_until_one_is_larger():
    """So long what was recorded can be launched again."""
    draw = np.random.default_rng(4)
    streams = [stream(PLAIN, draw, guided=True) for _ in range(3)]
    rows, _, _ = both(PLAIN, streams)
    first, generation = rows.begin([Part(streams[0], 0, 8)]), rows.generation
    again = rows.begin([Part(streams[1], 9, 4), Part(streams[2], 2, 4)])
    assert generation == rows.generation
    assert {n: t.address for n, t in first.items()} == {n: t.address for n, t in again.items()}
    rows.begin([Part(each, 0, 3) for each in streams])
    assert generation < rows.generation, "there are more lanes than before"


def test_without_memory_streams_keep_what_they_had(monkeypatch):
    draw = np.random.default_rng(5)
    first, large = stream(PLAIN, draw), stream(PLAIN, draw, rows=250)
    rows, _, memory = both(PLAIN, [first])
    spare = {size: list(each) for size, each in rows._spare.items()}

    def full(_self, _size):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(HostMemory, "allocate", full)
        with pytest.raises(MemoryError):
            rows.open(large)
        with pytest.raises(MemoryError):
            rows.begin([Part(first, 0, 3)], 10_000)
        first.rows, kept = large.rows, first.rows
        with pytest.raises(MemoryError):
            rows.stage(first)
        first.rows = kept
    assert rows._spare == spare and list(rows._streams) == [first]
    got = rows.begin([Part(first, 3, 5)])
    rows.gather()
    assert (read(memory, got["coordinates"]) == kept.coordinates[3:8]).all()


def test_a_library_of_another_version_is_refused(monkeypatch, tmp_path):
    with pytest.raises(UnavailableError, match="nowhere.so cannot be loaded"):
        DeviceRows(HostMemory(), tmp_path / "nowhere.so", PLAIN)
    monkeypatch.setattr(device_rows, "ABI", 99)
    with pytest.raises(UnavailableError, match="version 1, and this needs 99"):
        DeviceRows(HostMemory(), rows_library(), PLAIN)


def test_structs_are_as_large_as_the_librarys():
    library = ctypes.CDLL(str(rows_library()))
    assert library.nuwa_rows_lane_size() == device_rows._LANE.itemsize
    assert library.nuwa_rows_call_size() == ctypes.sizeof(device_rows._Call)


@pytest.mark.parametrize(
    ("top_ks", "top_p", "width"),
    [
        ([1], 1.0, 1),
        ([0, 3], 0.5, 4),
        ([5, 17], 1.0, 32),
        ([900], 1.0, 900),
        ([0], 0.5, 900),
        ([10_000], 1.0, 900),
    ],
)
def test_candidates_are_rounded_up_to_few_sizes(top_ks, top_p, width):
    config = dataclasses.replace(PLAIN, image=dataclasses.replace(PLAIN.image, codebook_size=900))
    rows = DeviceRows(HostMemory(), rows_library(), config)
    settings = [Sampling(top_k=k, top_p=top_p if k or len(top_ks) == 1 else 1.0) for k in top_ks]
    streams = []
    for sampling in settings:
        streams.append(stream(config, np.random.default_rng(0)))
        streams[-1].sampling = sampling
        rows.open(streams[-1])
    assert rows.begin([Part(each, 0, 2) for each in streams])["ranks"].shape == (width,)


def test_a_stream_with_more_candidates_than_can_be_sorted_is_not_opened():
    draw = np.random.default_rng(0)
    rows = DeviceRows(HostMemory(), rows_library(), PLAIN, widest=100)
    refused = stream(PLAIN, draw)
    for sampling in (Sampling(top_k=101), Sampling(top_p=0.9)):
        refused.sampling = sampling
        with pytest.raises(ValueError, match="sort at most 100 of .* a top_k of 1 to 100, or"):
            rows.open(refused)
    assert not rows._streams
    refused.sampling = Sampling(top_k=65, top_p=0.9)
    rows.open(refused)
    assert rows.begin([Part(refused, 0, 1)])["ranks"].shape == (100,)


def test_a_recording_on_the_host_is_what_was_put_then():
    """As a CUDA graph: with the sizes and addresses of then, and none of what the host did."""
    draw, memory = np.random.default_rng(6), HostMemory()
    rows = DeviceRows(memory, rows_library(), PLAIN)
    first, second = (stream(PLAIN, draw) for _ in range(2))
    rows.open(first)
    rows.open(second)
    tensors = rows.begin([Part(first, 3, 5)])
    recorded = memory.record(rows.gather)
    assert (read(memory, tensors["write_index"]) == 0x5A5A5A5A).all(), "it was not done"
    rows.begin([Part(second, 7, 5)])  # lanes of another stream
    rows._call.rows = 1
    recorded.launch()
    assert (read(memory, tensors["write_index"]) == second.rows.write_index[7:12]).all()
    recorded.free()


@pytest.mark.parametrize(
    "work",
    [
        lambda memory, at: memory.allocate(8),
        lambda memory, at: memory.free(at),
        lambda memory, at: memory.upload(np.zeros(2, np.int32), at),
        lambda memory, at: memory.download(at, np.zeros(2, np.int32)),
        lambda memory, at: memory.wait(),
        lambda memory, at: memory.record(lambda: None),
    ],
)
def test_what_a_launch_would_not_do_is_not_recorded(work):
    memory = HostMemory()
    at = memory.allocate(8)
    with pytest.raises(AssertionError, match="while recording"):
        memory.record(lambda: work(memory, at))
    memory.wait()  # the recording is over


class Cuda:
    """As much of cuda.bindings.runtime as CudaMemory calls; `fails` says which call fails how.

    Memory of the device is numbers only, pinned memory is real.
    """

    class cudaError_t:  # noqa: N801
        pass

    class cudaMemcpyKind:  # noqa: N801
        cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice = 1, 2, 3

    class cudaStreamCaptureMode:  # noqa: N801
        cudaStreamCaptureModeThreadLocal = 1

    class cudaStreamCaptureStatus:  # noqa: N801
        cudaStreamCaptureStatusNone = 0

    class cudaDeviceAttr:  # noqa: N801
        cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor = 75, 76

    cudaStreamNonBlocking = 1

    def __init__(self, devices=2, **fails):
        names = ("cudaSuccess", "cudaErrorMemoryAllocation", "cudaErrorIllegalAddress")
        names += ("cudaErrorNoDevice", "cudaErrorStreamCaptureUnsupported")
        self.cudaError_t = type("cudaError_t", (), {n: Status(n) for n in names})
        self.devices, self.fails, self.calls = devices, fails, []
        self.allocated, self.pinned = itertools.count(4096, 4096), {}
        self.streams = itertools.count(77)
        self.capturing = 0  # a cudaStreamCaptureStatus

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            failed = self.fails.get(name)
            status = getattr(self.cudaError_t, failed or "cudaSuccess")
            if failed:
                said = name == "cudaGetDeviceCount"
                return (status, None) if said else (status,)
            if name == "cudaMalloc":
                return status, next(self.allocated)
            if name == "cudaStreamCreateWithFlags":
                return status, next(self.streams)
            if name == "cudaMallocHost":
                memory = ctypes.create_string_buffer(*arguments)
                self.pinned[ctypes.addressof(memory)] = memory
                return status, ctypes.addressof(memory)
            if name == "cudaFreeHost":
                del self.pinned[arguments[0]]
            values = {"cudaGetDeviceCount": self.devices, "cudaGetDevice": 1}
            values |= {"cudaGetErrorString": b"so it says"}
            values |= {"cudaStreamEndCapture": "graph", "cudaGraphInstantiate": "made"}
            values |= {"cudaStreamIsCapturing": self.capturing}
            values |= {"cudaThreadExchangeStreamCaptureMode": 0}
            values |= {"cudaGetDeviceProperties": types.SimpleNamespace(name=b"NVIDIA H200")}
            values |= (
                {"cudaDeviceGetAttribute": {75: 9, 76: 0}.get(arguments[0])} if arguments else {}
            )
            return (status, values[name]) if name in values else (status,)

        if not name.startswith("cuda"):
            raise AttributeError(name)
        return call

    def named(self, name):
        """What was given to the calls of that name."""
        return [arguments for called, *arguments in self.calls if called == name]


class Status:
    def __init__(self, name):
        self.name = name


@pytest.fixture
def cuda(monkeypatch):
    """Puts a Cuda in the place of cuda-python."""

    def install(made: Cuda) -> Cuda:
        bindings = types.ModuleType("cuda.bindings")
        bindings.runtime = made
        monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", made)
        return made

    return install


def test_memory_of_a_gpu_is_asked_for_in_one_stream(cuda):
    fake = cuda(Cuda())
    memory = CudaMemory(1)
    assert (memory.stream, memory.allocate(10)) == (77, 4096)
    array = np.array([1, 2, 3], np.int32)
    memory.upload(array, 4096)
    memory.download(4096, array)
    (pinned, memory_there), (landing, _) = fake.pinned.items()
    assert memory_there.raw[:12] == np.array([1, 2, 3], np.int32).tobytes()
    assert (array == 0).all(), "what is in the pinned memory now"
    assert fake.calls[1:] == [
        ("cudaSetDevice", 1),
        ("cudaThreadExchangeStreamCaptureMode", 1),
        ("cudaStreamCreateWithFlags", 1),
        ("cudaStreamCreateWithFlags", 1),
        ("cudaMalloc", 10),
        ("cudaStreamSynchronize", 77),
        ("cudaMallocHost", 1 << 20),
        ("cudaMemcpyAsync", 4096, pinned, 12, 1, 77),
        ("cudaMallocHost", 1 << 16),
        ("cudaMemcpyAsync", landing, 4096, 12, 2, 77),
        ("cudaStreamSynchronize", 77),
    ]


def test_what_is_brought_back_lands_in_the_same_pinned_memory_if_it_is_small(cuda):
    fake = cuda(Cuda())
    memory = CudaMemory()
    small, large = np.zeros(1 << 14, np.int32), np.zeros((1 << 14) + 1, np.int32)
    for array in (small, small[:1], large):
        memory.download(4096, array)
    ((landing, _),) = fake.pinned.items()
    places = [to for to, *_ in fake.named("cudaMemcpyAsync")]
    assert places == [landing, landing, large.ctypes.data]


def test_who_asks_in_another_thread_leaves_the_stream_alone(cuda):
    """A recording of it would fail."""
    fake = cuda(Cuda())
    memory = CudaMemory()
    fake.calls.clear()
    with futures.ThreadPoolExecutor(1) as pool:
        pool.submit(memory.ask).result()
        assert fake.named("cudaStreamSynchronize") == [[78]] and memory.stream == 77
        fake.fails = {"cudaStreamSynchronize": "cudaErrorStreamCaptureUnsupported"}
        pool.submit(memory.ask).result()
        fake.fails = {"cudaStreamSynchronize": "cudaErrorIllegalAddress"}
        with pytest.raises(DeviceLostError):
            pool.submit(memory.ask).result()


def test_an_upload_leaves_those_under_way_alone(cuda):
    """Until the stream has been waited for, or there is no more pinned memory."""
    fake = cuda(Cuda())
    memory = CudaMemory()

    def uploaded(size: int) -> int:
        """Where in the pinned memory it was."""
        memory.upload(np.zeros(size, np.uint8), 4096)
        (start,) = fake.pinned
        return fake.named("cudaMemcpyAsync")[-1][1] - start

    assert [uploaded(size) for size in (100, 300, 1)] == [0, 256, 768]
    fake.calls.clear()
    memory.wait()
    assert uploaded(5) == 0
    assert uploaded((1 << 20) - 256) == 256, "to the last byte"
    assert len(fake.named("cudaStreamSynchronize")) == 1
    assert uploaded(7) == 0
    assert len(fake.named("cudaStreamSynchronize")) == 2, "nothing of it is needed any more"
    assert uploaded((1 << 20) + 1) == 0
    assert fake.named("cudaMallocHost") == [[1 << 21]] and len(fake.pinned) == 1
    memory.upload(np.zeros(0, np.uint8), 4096)


def test_what_a_memory_had_is_given_back_when_nobody_has_it(cuda):
    """A model that is unloaded leaves none of it behind."""
    fake = cuda(Cuda())
    memory = CudaMemory()
    rows = DeviceRows(memory, rows_library(), PLAIN)
    recorded = memory.record(lambda: None)
    held = stream(PLAIN, np.random.default_rng(0))
    rows.open(held)
    rows.begin([Part(held, 0, 30)])  # makes room anew
    addresses = {4096 * (1 + index) for index in range(len(fake.named("cudaMalloc")))}
    given_back = {address for (address,) in fake.named("cudaFree")}
    assert given_back and given_back < addresses
    fake.calls.clear()
    del memory, rows
    assert not fake.calls, "the recording still needs it"
    del recorded
    names = [name for name, *_ in fake.calls]
    assert names[:5] == [
        "cudaGraphExecDestroy",
        "cudaGetDevice",
        "cudaSetDevice",
        "cudaThreadExchangeStreamCaptureMode",
        "cudaStreamSynchronize",
    ]
    assert names[-4:] == ["cudaFreeHost", *2 * ["cudaStreamDestroy"], "cudaSetDevice"]
    assert fake.named("cudaStreamDestroy") == [[77], [78]]
    freed = [address for (address,) in fake.named("cudaFree")]
    assert len(freed) == len({*freed}) and {*freed} == addresses - given_back
    assert fake.named("cudaSetDevice") == [[0], [1]] and not fake.pinned


def test_work_is_recorded_and_launched_in_its_stream(cuda):
    fake = cuda(Cuda())
    memory = CudaMemory()
    assert (memory.target, memory.model) == ("sm_90", "NVIDIA H200")
    memory.wait()
    fake.calls.clear()
    recorded = memory.record(lambda: memory.copy(1, 2, 3))
    recorded.launch()
    recorded.free()
    assert fake.calls == [
        ("cudaStreamBeginCapture", 77, 1),
        ("cudaMemcpyAsync", 2, 1, 3, 3, 77),
        ("cudaStreamEndCapture", 77),
        ("cudaGraphInstantiate", "graph", 0),
        ("cudaGraphDestroy", "graph"),
        ("cudaGraphLaunch", "made", 77),
        ("cudaGraphExecDestroy", "made"),
    ]
    memory.clear(5, 6)
    assert fake.calls[-1] == ("cudaMemsetAsync", 5, 0, 6, 77)
    fake.calls.clear()
    with pytest.raises(ZeroDivisionError):
        memory.record(lambda: 1 // 0)
    assert [name for name, *_ in fake.calls] == ["cudaStreamBeginCapture", "cudaStreamEndCapture"]


def test_a_recording_of_others_is_ended_if_there_is_one(cuda):
    fake = cuda(Cuda())
    memory = CudaMemory()
    assert not memory.abandon()
    assert not fake.named("cudaStreamEndCapture")
    fake.capturing = 2
    assert memory.abandon()
    assert fake.named("cudaStreamEndCapture") == [[77]]


def test_every_thread_chooses_the_gpu_and_heeds_no_recordings_once(cuda):
    fake = cuda(Cuda())
    memory = CudaMemory(1)
    fake.calls.clear()
    with futures.ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            pool.submit(memory.enter).result()
            memory.enter()
    mode = fake.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    assert fake.calls == [("cudaSetDevice", 1), ("cudaThreadExchangeStreamCaptureMode", mode)]


def test_the_stand_in_has_the_names_of_cuda_python():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    source = (Path(device_memory.__file__)).read_text()
    kinds = ("cudaError_t", "cudaMemcpyKind", "cudaDeviceAttr")
    kinds += ("cudaStreamCaptureMode", "cudaStreamCaptureStatus")
    known = {*dir(runtime), *(name for kind in kinds for name in dir(getattr(runtime, kind)))}
    assert set(re.findall(r"\bcuda[A-Z]\w+", source)) <= known


def test_numbers_of_errors_are_those_of_cuda():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    known = {name: int(getattr(runtime.cudaError_t, name)) for name in device_memory.STICKY}
    assert known == device_memory.STICKY


def test_cuda_python_takes_such_arguments():
    """Where there is no GPU every call says so, but only after it has looked at its arguments."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    without, _ = runtime.cudaGetDeviceCount()
    if without == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU, which would take these calls for real")
    kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    major = runtime.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor
    calls = [
        ("cudaSetDevice", 0),
        ("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking),
        ("cudaMalloc", 10),
        ("cudaMallocHost", 10),
        ("cudaGetDevice",),
        ("cudaFree", 0),
        ("cudaFreeHost", 0),
        ("cudaStreamDestroy", 0),
        ("cudaMemcpyAsync", 4096, 4096, 12, kind, 77),
        ("cudaMemsetAsync", 4096, 0, 12, 77),
        ("cudaStreamSynchronize", 77),
        ("cudaStreamBeginCapture", 77, mode),
        ("cudaStreamIsCapturing", 77),
        ("cudaThreadExchangeStreamCaptureMode", mode),
        ("cudaStreamEndCapture", 77),
        ("cudaGraphInstantiate", runtime.cudaGraph_t(), 0),
        ("cudaGraphLaunch", runtime.cudaGraphExec_t(), 77),
        ("cudaGraphExecDestroy", runtime.cudaGraphExec_t()),
        ("cudaDeviceGetAttribute", major, 0),
        ("cudaGetDeviceProperties", 0),
    ]
    for name, *arguments in calls:
        status, *_ = getattr(runtime, name)(*arguments)
        assert status == without, name


@pytest.mark.parametrize(
    ("devices", "index", "fails", "message"),
    [
        (0, 0, {"cudaGetDeviceCount": "cudaErrorNoDevice"}, "no usable GPU: cudaErrorNoDevice"),
        (2, 2, {}, "there is no GPU 2: this machine has 2"),
        (2, -1, {}, "there is no GPU -1"),
    ],
)
def test_a_gpu_that_is_not_there_is_named(cuda, devices, index, fails, message):
    cuda(Cuda(devices, **fails))
    with pytest.raises(UnavailableError, match=message):
        CudaMemory(index)


def test_errors_after_which_nothing_runs_are_told_from_others(cuda):
    fake = cuda(Cuda())
    memory = CudaMemory()
    fake.fails = {"cudaMalloc": "cudaErrorMemoryAllocation"}
    with pytest.raises(MemoryError, match="there is no more memory for GPU 0"):
        memory.allocate(1 << 50)
    fake.fails = {"cudaStreamSynchronize": "cudaErrorIllegalAddress"}
    for ask in (memory.wait, memory.check):
        with pytest.raises(DeviceLostError, match="cudaStreamSynchronize: cudaErrorIllegalAddress"):
            ask()
    fake.fails = {"cudaStreamSynchronize": "cudaErrorStreamCaptureUnsupported"}
    memory.check()
    with pytest.raises(RuntimeError, match="cudaErrorStreamCaptureUnsupported, so it says"):
        memory.wait()


def test_without_cuda_python_it_says_what_to_install(monkeypatch):
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnavailableError, match=r"pip install 'nuwa-runtime\[gpu\]'"):
        CudaMemory()


def test_calls_are_padded_to_few_sizes():
    sizes = {rows: device_rows.padded(rows) for rows in range(1, 4097)}
    assert all(rows <= size for rows, size in sizes.items())
    assert all(2 * size <= 3 * rows for rows, size in sizes.items() if rows > 1)
    assert all(8 * size <= 9 * rows + 8 for rows, size in sizes.items() if rows > 128)
    made = sorted({*sizes.values()})
    assert made[:14] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    assert made[14:22] == [*range(144, 257, 16)] and len(made) == 14 + 5 * 8
    assert all(device_rows.padded(size) == size for size in made)


def test_spare_sizes_are_powers_of_two():
    sizes = functools.reduce(
        lambda a, n: [*a, device_rows._rounded(n)], (1, 256, 257, 4096, 5000), []
    )
    assert sizes == [256, 256, 512, 4096, 8192]
