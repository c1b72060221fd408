"""Memory of a device by address, and the stream in which all work of a decode thread is ordered.

HostMemory is the same on the CPU: tests run there what otherwise runs on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import threading
import weakref
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import DeviceLostError, UnavailableError

ALIGNMENT = 256  # of what is allocated, and of what TensorRT reads and writes
_LEAST_STAGING = 1 << 20  # bytes of pinned memory: what a stream stages, and what a step sends up
_LANDING = 1 << 16  # bytes of pinned memory: what a step answers, and the tokens of a clip

# After these a process can do nothing more with the GPU: every later call fails the same way. With
# the numbers that cudaError_t gives them. An unknown error is of the driver or of the GPU itself,
# which this process cannot mend either.
STICKY = {
    "cudaErrorECCUncorrectable": 214,
    "cudaErrorNvlinkUncorrectable": 220,
    "cudaErrorContained": 226,
    "cudaErrorIllegalAddress": 700,
    "cudaErrorLaunchTimeout": 702,
    "cudaErrorAssert": 710,
    "cudaErrorHardwareStackError": 714,
    "cudaErrorIllegalInstruction": 715,
    "cudaErrorMisalignedAddress": 716,
    "cudaErrorInvalidAddressSpace": 717,
    "cudaErrorInvalidPc": 718,
    "cudaErrorLaunchFailure": 719,
    "cudaErrorTensorMemoryLeak": 721,
    "cudaErrorExternalDevice": 911,
    "cudaErrorUnknown": 999,
}


class Recording(Protocol):
    """Work of a stream that can be put into it again, as a whole."""

    def launch(self) -> None: ...

    def free(self) -> None: ...


class DeviceMemory(Protocol):
    """kind and index: of the device, as ONNX Runtime calls them; stream: a cudaStream_t, or 0;
    target: the architecture, "sm_90"; model: what its maker calls it, "NVIDIA H200".

    For one thread, but for `ask` and `enter`. What it allocated it gives back when nobody has it
    any more.
    """

    kind: str
    index: int
    stream: int

    @property
    def target(self) -> str: ...

    @property
    def model(self) -> str: ...

    def allocate(self, size: int) -> int:
        """The address of `size` bytes; MemoryError if there are no more."""

    def free(self, address: int) -> None:
        """Gives memory back that no work in the stream uses any more."""

    def upload(self, array: npt.NDArray, address: int) -> None:
        """Copies a contiguous array there, in order of the stream; the array may change then."""

    def download(self, address: int, array: npt.NDArray) -> None:
        """Fills a contiguous array from there, when all before in the stream is done."""

    def copy(self, address: int, to: int, size: int) -> None:
        """Copies `size` bytes, in order of the stream."""

    def clear(self, address: int, size: int) -> None:
        """Fills `size` bytes with zeros, in order of the stream."""

    def put(self, work: Callable[[], None]) -> None:
        """Calls `work`, which puts something of others into the stream, as it is at this moment."""

    def wait(self) -> None:
        """Until all that is in the stream is done."""

    def check(self) -> None:
        """DeviceLostError if the device is lost, for which it waits for the stream."""

    def ask(self) -> None:
        """DeviceLostError if the device is known to be lost. In any thread: the stream may be being
        recorded, which would fail if somebody else waited for it.
        """

    def record(self, work: Callable[[], None]) -> Recording:
        """What `work` puts into the stream, without doing it; RuntimeError if that cannot be.

        `work` copies and clears on the device and puts; all else would not be in the recording.
        """

    def abandon(self) -> bool:
        """Ends a recording that someone else has begun in the stream and not ended, if there is
        one; whether there was.
        """

    def enter(self) -> None:
        """Before others use the device in this thread: recordings elsewhere do not concern it."""


class HostMemory:
    """DeviceMemory of numpy arrays, where everything is done at once."""

    kind, index, stream, target, model = "cpu", 0, 0, "cpu", "a processor"

    def __init__(self) -> None:
        self._arrays: dict[int, npt.NDArray] = {}
        self._recorded: list[Callable[[], None]] | None = None

    def allocate(self, size: int) -> int:
        self._not_recorded("allocate")
        # Noise, so that what is read before it is written is noticed.
        array = np.full(max(size, 1) + ALIGNMENT, 0x5A, np.uint8)
        address = -(-array.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._arrays[address] = array
        return address

    def free(self, address: int) -> None:
        self._not_recorded("free")
        del self._arrays[address]

    def upload(self, array: npt.NDArray, address: int) -> None:
        self._not_recorded("upload")
        assert array.flags.c_contiguous
        _bytes_at(address, array.nbytes)[:] = array.reshape(-1).view(np.uint8)

    def download(self, address: int, array: npt.NDArray) -> None:
        self._not_recorded("download")
        assert array.flags.c_contiguous
        array.reshape(-1).view(np.uint8)[:] = _bytes_at(address, array.nbytes)

    def copy(self, address: int, to: int, size: int) -> None:
        def work() -> None:
            _bytes_at(to, size)[:] = _bytes_at(address, size)

        self.put(work)

    def clear(self, address: int, size: int) -> None:
        def work() -> None:
            _bytes_at(address, size)[:] = 0

        self.put(work)

    def put(self, work: Callable[[], None]) -> None:
        if self._recorded is None:
            work()
        else:
            self._recorded.append(work)

    def wait(self) -> None:
        self._not_recorded("wait")

    def check(self) -> None:
        """A processor is not lost."""

    def ask(self) -> None:
        """As `check`."""

    def record(self, work: Callable[[], None]) -> Recording:
        self._not_recorded("record")
        recorded: list[Callable[[], None]] = []
        self._recorded = recorded
        try:
            work()
        finally:
            self._recorded = None
        return _HostRecording(tuple(recorded))

    def abandon(self) -> bool:
        """Nobody else records."""
        return False

    def enter(self) -> None:
        """A processor is for all threads."""

    def _not_recorded(self, what: str) -> None:
        assert self._recorded is None, f"{what} while recording, of which a launch would do nothing"


class _HostRecording:
    """What was put, with the addresses and sizes of then."""

    def __init__(self, works: tuple[Callable[[], None], ...]) -> None:
        self._works = works

    def launch(self) -> None:
        for work in self._works:
            work()

    def free(self) -> None:
        self._works = ()


class CudaMemory:
    """DeviceMemory of a GPU, through cuda-python; its stream does not wait for any other.

    Uploads pass through pinned memory, from where the GPU reads while the host goes on, and small
    downloads, for which the driver needs none of its own then. UnavailableError without that
    package, without a driver and where there is no such GPU.
    """

    kind = "cuda"

    def __init__(self, index: int = 0) -> None:
        try:
            runtime: Any = importlib.import_module("cuda.bindings.runtime")
        except ImportError:
            raise UnavailableError(
                "decoding on a GPU needs cuda-python: pip install 'nuwa-runtime[gpu]'"
            ) from None
        self._cuda = runtime
        self.index = index
        self._local = threading.local()
        self.stream = 0
        status, count = runtime.cudaGetDeviceCount()
        if status != runtime.cudaError_t.cudaSuccess:
            raise UnavailableError(f"there is no usable GPU: {self._say(status)}")
        if not 0 <= index < count:
            raise UnavailableError(f"there is no GPU {index}: this machine has {count}")
        self.stream = self._new_stream()
        self._asking = self._new_stream()  # always empty
        self._held: set[int] = set()
        self._staging: list[int] = []  # the address of the pinned memory, if there is some
        self._staging_size = self._staged = 0
        self._landing: list[int] = []  # likewise
        held = ((self.stream, self._asking), self._held, (self._staging, self._landing))
        weakref.finalize(self, _give_back, runtime, index, *held).atexit = False

    def allocate(self, size: int) -> int:
        (address,) = self._call("cudaMalloc", max(size, 1))
        self._held.add(int(address))
        return int(address)

    def free(self, address: int) -> None:
        self._held.remove(address)
        self._call("cudaFree", address)

    def upload(self, array: npt.NDArray, address: int) -> None:
        assert array.flags.c_contiguous
        pinned, size = self._pinned(array.nbytes), array.nbytes
        ctypes.memmove(pinned, array.ctypes.data, size)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, pinned, size, kind, self.stream)

    def download(self, address: int, array: npt.NDArray) -> None:
        assert array.flags.c_contiguous
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        to, size = array.ctypes.data, array.nbytes
        landing = self._landed() if size <= _LANDING else to
        self._call("cudaMemcpyAsync", landing, address, size, kind, self.stream)
        self.wait()
        if landing != to:
            ctypes.memmove(to, landing, size)

    def copy(self, address: int, to: int, size: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", to, address, size, kind, self.stream)

    def clear(self, address: int, size: int) -> None:
        self._call("cudaMemsetAsync", address, 0, size, self.stream)

    def put(self, work: Callable[[], None]) -> None:
        work()

    def wait(self) -> None:
        self._call("cudaStreamSynchronize", self.stream)
        self._staged = 0  # uploads are where they belong

    def check(self) -> None:
        # Every call of CUDA tells of a loss; other errors are for who meets them to tell.
        with contextlib.suppress(RuntimeError):
            self._call("cudaStreamSynchronize", self.stream)

    def ask(self) -> None:
        # As `check`, of a stream in which there is nothing to wait for, and that nobody records.
        with contextlib.suppress(RuntimeError):
            self._call("cudaStreamSynchronize", self._asking)

    def record(self, work: Callable[[], None]) -> Recording:
        """A CUDA graph."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            work()
        except BaseException:
            self._cuda.cudaStreamEndCapture(self.stream)  # which fails too
            raise
        (graph,) = self._call("cudaStreamEndCapture", self.stream)
        try:
            (made,) = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)
        return _CudaGraph(self, made)

    def abandon(self) -> bool:
        none = self._cuda.cudaStreamCaptureStatus.cudaStreamCaptureStatusNone
        (status,) = self._call("cudaStreamIsCapturing", self.stream)
        if status == none:
            return False
        self._cuda.cudaStreamEndCapture(self.stream)  # which says that it has failed
        return True

    def enter(self) -> None:
        if getattr(self._local, "entered", False):
            return
        self._check("cudaSetDevice", self._cuda.cudaSetDevice(self.index)[0])
        _ignore_recordings(self._cuda)
        self._local.entered = True

    def _pinned(self, size: int) -> int:
        """Pinned memory for an upload: that of earlier ones once they are where they belong."""
        if self._staged + size > self._staging_size or not self._staging:
            self.wait()
            if size > self._staging_size or not self._staging:
                self._make_staging(max(_LEAST_STAGING, 1 << (size - 1).bit_length()))
        place = self._staging[0] + self._staged
        self._staged += -(-size // ALIGNMENT) * ALIGNMENT
        return place

    def _make_staging(self, size: int) -> None:
        self._staging_size = 0
        if self._staging:
            self._call("cudaFreeHost", self._staging.pop())
        (address,) = self._call("cudaMallocHost", size)
        self._staging.append(int(address))
        self._staging_size = size

    def _landed(self) -> int:
        """Pinned memory for what a small download brings, until the next one."""
        if not self._landing:
            (address,) = self._call("cudaMallocHost", _LANDING)
            self._landing.append(int(address))
        return self._landing[0]

    def _new_stream(self) -> int:
        (stream,) = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        return int(stream)

    @cached_property
    def target(self) -> str:
        attribute = self._cuda.cudaDeviceAttr
        major, minor = (
            self._call("cudaDeviceGetAttribute", each, self.index)[0]
            for each in (
                attribute.cudaDevAttrComputeCapabilityMajor,
                attribute.cudaDevAttrComputeCapabilityMinor,
            )
        )
        return f"sm_{major}{minor}"

    @cached_property
    def model(self) -> str:
        (properties,) = self._call("cudaGetDeviceProperties", self.index)
        return properties.name.decode()

    def _call(self, name: str, *arguments: Any) -> tuple:
        """What a function of CUDA returns besides its status."""
        self.enter()
        status, *values = getattr(self._cuda, name)(*arguments)
        self._check(name, status)
        return tuple(values)

    def _check(self, name: str, status: Any) -> None:
        if status == self._cuda.cudaError_t.cudaSuccess:
            return
        message = f"{name}: {self._say(status)}"
        if status == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise MemoryError(f"there is no more memory for GPU {self.index} ({message})")
        if status.name in STICKY:
            raise DeviceLostError(f"GPU {self.index} is lost to this process ({message})")
        raise RuntimeError(message)

    def _say(self, status: Any) -> str:
        _, text = self._cuda.cudaGetErrorString(status)
        return f"{status.name}, {text.decode() if isinstance(text, bytes) else text}"


class _CudaGraph:
    """A Recording on a GPU."""

    def __init__(self, memory: CudaMemory, graph: Any) -> None:
        self._memory, self._graph = memory, graph
        self._destroy = weakref.finalize(self, memory._cuda.cudaGraphExecDestroy, graph)
        self._destroy.atexit = False

    def launch(self) -> None:
        self._memory._call("cudaGraphLaunch", self._graph, self._memory.stream)

    def free(self) -> None:
        self._destroy()


def _give_back(
    cuda: Any,
    index: int,
    streams: tuple[int, ...],
    held: set[int],
    pinned: tuple[list[int], ...],
) -> None:
    """Frees what a CudaMemory had, in any thread; of a lost GPU that fails, which harms nobody."""
    _, before = cuda.cudaGetDevice()
    cuda.cudaSetDevice(index)
    _ignore_recordings(cuda)
    for stream in streams:
        cuda.cudaStreamSynchronize(stream)
    for address in held:
        cuda.cudaFree(address)
    for address in itertools.chain(*pinned):
        cuda.cudaFreeHost(address)
    for stream in streams:
        cuda.cudaStreamDestroy(stream)
    if before is not None:
        cuda.cudaSetDevice(before)


def _ignore_recordings(cuda: Any) -> None:
    """ONNX Runtime records in a mode that forbids other threads, unless they say so, to allocate
    and free, and that fails if they do.
    """
    cuda.cudaThreadExchangeStreamCaptureMode(
        cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    )


def _bytes_at(address: int, size: int) -> npt.NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
