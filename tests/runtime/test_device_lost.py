"""The CUDA backend, on the CPU as its device, when ONNX Runtime says that a call of CUDA failed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nuwa.runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda
from nuwa.runtime.bundle import open_bundle
from nuwa.runtime.errors import DeviceLostError

SAID = (
    "Non-zero status code returned while running MatMul node. Name:'n' Status Message: CUDA "
    "failure {}: what it means ; GPU=0 ; hostname=h ; expr=cudaStreamSynchronize(stream); "
)
CALLS = {
    "step": lambda backend: backend.step([]),
    "encode_text": lambda backend: backend.encode_text(np.zeros((1, 4), np.int32), [0], 0),
    "tokenize": lambda backend: backend.tokenize(np.zeros((1, 3, 16, 16), np.uint8)),
    "tokenize_sketch": lambda backend: backend.tokenize_sketch(np.zeros((1, 16, 16), np.uint8)),
    "detokenize": lambda backend: backend.detokenize(np.zeros((1, 4, 4), np.int32)),
}


class Failing:
    """A session of which every call fails, and what it says then."""

    def __init__(self, session, said: str) -> None:
        self.io_binding, self.said = session.io_binding, said

    def run(self, *arguments) -> None:
        raise RuntimeError(self.said)

    run_with_iobinding = run


@pytest.fixture
def backend(tiny_bundle):
    """Its tokens are on the host, as without cuda-python, which could be asked."""
    return OnnxRuntimeCuda(
        open_bundle(tiny_bundle),
        cache_slots=1,
        condition_slots=1,
        threads=1,
        device="cpu",
        kernels=Path("nowhere.so"),
    )


@pytest.fixture
def fail(backend, monkeypatch):
    monkeypatch.setattr(backend, "_run", lambda batch: backend._decoder.run())
    monkeypatch.setattr("nuwa.runtime.backends.onnxruntime_cuda.assemble", lambda *_: None)

    def say(said: str) -> None:
        for name in ("_text", "_tokenizer", "_sketches", "_detokenizer", "_decoder"):
            setattr(backend, name, Failing(getattr(backend, name), said))

    return say


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", [700, 719, 214])
def test_after_some_errors_the_device_is_lost(backend, fail, call, number):
    fail(SAID.format(number))
    with pytest.raises(DeviceLostError, match=f"GPU 0 is lost to this process .*{number}: what"):
        CALLS[call](backend)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("said", [SAID.format(2), SAID.format(70), "not enough rows: 700"])
def test_after_others_it_is_not(backend, fail, call, said):
    fail(said)
    with pytest.raises(RuntimeError) as raised:
        CALLS[call](backend)
    assert str(raised.value) == said
