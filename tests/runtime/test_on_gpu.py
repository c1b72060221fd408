"""ONNX Runtime's CUDA provider against its CPU provider, on a machine that has both."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from nuwa.export.bundle import export_bundle
from nuwa.runtime.backends import onnxruntime_cpu, onnxruntime_cuda
from nuwa.runtime.backends.device_rows import DeviceRows
from nuwa.runtime.bundle import open_bundle
from nuwa.runtime.core import GenerationRequest
from nuwa.runtime.engine import Engine, cache_slots, condition_slots, load_engine
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

from ..conftest import make_tiny_checkpoint
from .engine_run import PROMPT, admit, alone, finish

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in ort.get_available_providers(),
        reason="this ONNX Runtime has no CUDA provider",
    ),
]


@pytest.fixture(scope="module", params=["function bodies", "operators"])
def engines(request, tiny_bundle, tmp_path_factory):
    """On the GPU, as it serves, and on the CPU. Heads of 32 have kernels, the tiny model's none."""
    folder = tiny_bundle
    if request.param == "operators":
        folder = tmp_path_factory.mktemp("wide")
        make_tiny_checkpoint(folder / "checkpoint", width=128, heads=4)
        export_bundle(folder / "checkpoint", folder / "bundle")
        folder = folder / "bundle"
    bundle = open_bundle(folder)
    library = onnxruntime_cuda._operators(bundle.manifest.config, 0)
    assert (library is not None) == (request.param == "operators"), "were they built?"
    made = onnxruntime_cuda.OnnxRuntimeCuda(
        bundle, cache_slots=cache_slots(2), condition_slots=condition_slots(2)
    )
    assert isinstance(made._rows, DeviceRows), "were they built, and is cuda-python installed?"
    assert made._decoder.get_providers()[0] == "CUDAExecutionProvider"
    assert made._step.recording, "is all of the graph on the GPU, and ONNX Runtime 1.31 or later?"
    cpu = load_engine(folder, slots=2, backend="onnxruntime-cpu")
    return Engine(bundle, made, slots=2), cpu


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("task", [Task.T2I, Task.T2V])
def test_tokens_are_the_cpus(engines, task, guidance):
    """In fp32, but for draws at an edge, which a handful of seeds does not meet."""
    for seed in range(4):
        request = GenerationRequest(
            task,
            PROMPT,
            frame_count=3 if task.is_video else 1,
            seed=seed,
            sampling=Sampling(guidance_scale=guidance),
        )
        gpu, cpu = (alone(engine, request).tokens for engine in engines)
        assert (gpu == cpu).all()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_halves_give_nearly_the_cpus_logits(tmp_path, precision):
    make_tiny_checkpoint(tmp_path / "checkpoint", width=128, heads=4)
    logits = []
    for kind, backend in (
        (precision, onnxruntime_cuda.OnnxRuntimeCuda),
        ("fp32", onnxruntime_cpu.OnnxRuntimeCpu),
    ):
        export_bundle(tmp_path / "checkpoint", tmp_path / kind, precision=kind)
        bundle = open_bundle(tmp_path / kind)
        sizes = {"cache_slots": cache_slots(1), "condition_slots": condition_slots(1)}
        made = backend(bundle, **sizes, logits=True)
        engine = Engine(bundle, made, slots=1)
        admit(engine, GenerationRequest(Task.T2I, PROMPT), 0)
        engine.step()
        logits.append(made.logits)
    most = {"fp16": 5e-3, "bf16": 4e-2}[precision] * np.abs(logits[1]).max()
    assert 0 < np.abs(logits[0] - logits[1]).max() < most


def test_a_recorded_step_fits_any_company(engines):
    """Of the same size, it is launched for other rows than it was recorded with."""
    gpu, _ = engines
    requests = [GenerationRequest(Task.T2I, PROMPT, seed=seed) for seed in range(2)]
    wanted = [alone(gpu, each).tokens for each in requests]
    for _ in range(2):
        runs = {slot: admit(gpu, each, slot) for slot, each in enumerate(requests)}
        finish(gpu, runs)
        for slot, tokens in enumerate(wanted):
            assert (runs[slot].tokens == tokens).all()


def test_pixels_and_codes_are_the_cpus(engines):
    codes = np.random.default_rng(2).integers(0, 64, (64, 4, 4), np.int32)
    gpu, cpu = (engine.pixels(codes).astype(int) for engine in engines)
    assert np.abs(gpu - cpu).max() <= 1
    pixels = cpu.astype(np.uint8)
    assert (engines[0].tokens(pixels) == engines[1].tokens(pixels)).mean() > 0.99
