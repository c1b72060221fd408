"""TensorRT's engines, built and run on this machine's GPU, against ONNX Runtime's CPU provider.

Each kind of engine in a process of its own: two TensorRTs do not go into one, and where plugins are
registered TensorRT builds no engine without them. Without $NUWA_TEST_ENGINES the tests are those
processes, with it those of that kind of engine.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys

import pytest

from nuwa import plugins_trt
from nuwa.export.bundle import export_bundle
from nuwa.export.engines import EngineOptions, build_engines
from nuwa.runtime.backends.choice import make_backend
from nuwa.runtime.bundle import open_bundle
from nuwa.runtime.core import GenerationRequest
from nuwa.runtime.engine import Engine, cache_slots, condition_slots, load_engine
from nuwa.spec.engines import TENSORRT, TENSORRT_RTX
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

from ..conftest import make_tiny_checkpoint
from ..plugins_trt.needs import gpus, no_engines
from .engine_run import PROMPT, admit, alone, finish

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpus() == 0, reason="no GPU")]

SLOTS = 2
VARIABLE = "NUWA_TEST_ENGINES"
PLUGINS = "plugins"
KIND = os.environ.get(VARIABLE)

of_one_kind = pytest.mark.skipif(KIND is None, reason=f"runs in a process with {VARIABLE}")


@pytest.mark.skipif(KIND is not None, reason=f"{VARIABLE} is set")
@pytest.mark.parametrize("kind", [PLUGINS, TENSORRT, TENSORRT_RTX])
def test_engines(kind):
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", __file__]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-k", "not test_engines"],
        env={**os.environ, VARIABLE: kind},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if not re.search(r"\b\d+ passed", done.stdout):
        reasons = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", done.stdout, re.MULTILINE)
        pytest.skip("; ".join(dict.fromkeys(reasons)))


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """On the GPU and on the CPU. Heads of 32 have kernels."""
    runtime = TENSORRT if KIND == PLUGINS else KIND
    if reason := no_engines(runtime):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("engines")
    make_tiny_checkpoint(folder / "checkpoint", width=128, heads=4)
    export_bundle(folder / "checkpoint", folder / "bundle")
    options = EngineOptions(runtime=runtime, slots=SLOTS, rows=(1, 32))
    if KIND == PLUGINS:
        options = dataclasses.replace(options, plugins=plugins_trt.library())
    build_engines(folder / "bundle", options)
    sizes = {"cache_slots": cache_slots(SLOTS), "condition_slots": condition_slots(SLOTS)}
    made = make_backend(runtime, open_bundle(folder / "bundle"), **sizes)
    assert bool(made._copied) == (KIND != PLUGINS), "plugins write caches in place"
    cpu = load_engine(folder / "bundle", slots=SLOTS, backend="onnxruntime-cpu")
    return Engine(made.bundle, made, slots=SLOTS), made, cpu


@of_one_kind
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("task", [Task.T2I, Task.T2V])
def test_tokens_are_the_cpus(engines, task, guidance):
    """In fp32, but for draws at an edge, which a handful of seeds does not meet."""
    gpu, _, cpu = engines
    for seed in range(4):
        request = GenerationRequest(
            task,
            PROMPT,
            frame_count=3 if task.is_video else 1,
            seed=seed,
            sampling=Sampling(guidance_scale=guidance),
        )
        assert (alone(gpu, request).tokens == alone(cpu, request).tokens).all()


@of_one_kind
def test_steps_are_launched_as_recorded_and_in_any_company(engines):
    gpu, made, _ = engines
    first, second = (GenerationRequest(Task.T2I, PROMPT, seed=seed) for seed in range(2))
    wanted = [alone(gpu, each).tokens for each in (first, second)]
    assert made._recorded and None not in made._recorded.values()
    together = {slot: admit(gpu, each, slot) for slot, each in enumerate((first, second))}
    finish(gpu, together)
    for slot, tokens in enumerate(wanted):
        assert (together[slot].tokens == tokens).all()


@of_one_kind
def test_pixels_and_codes_are_the_cpus(engines):
    gpu, _, cpu = engines
    tokens = alone(cpu, GenerationRequest(Task.T2I, PROMPT)).tokens.reshape(1, 4, 4)
    mine, theirs = (engine.pixels(tokens).astype(int) for engine in (gpu, cpu))
    assert abs(mine - theirs).max() <= 1
    pixels = theirs.astype("uint8")
    assert (gpu.tokens(pixels) == cpu.tokens(pixels)).mean() > 0.9
