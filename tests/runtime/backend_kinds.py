"""Backends of every kind with a tiny model, and sequences for them, for tests."""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from nuwa import plugins_trt
from nuwa.runtime.backends import native_library
from nuwa.runtime.backends.base import Lane, Part
from nuwa.runtime.backends.device_rows import DeviceRows
from nuwa.runtime.backends.host_tokens import HostTokens
from nuwa.runtime.backends.native_cpu import NativeCpu
from nuwa.runtime.backends.native_library import LEVELS
from nuwa.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from nuwa.runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda
from nuwa.runtime.backends.step_batch import CrossColumns, StepBatch, assemble
from nuwa.runtime.backends.tensorrt import TensorRt, TensorRtRtx
from nuwa.runtime.bundle import Bundle, open_bundle
from nuwa.runtime.sequence import Sequence
from nuwa.spec.conditions import ConditionLayout, visual_neighbours
from nuwa.spec.grid import Extent
from nuwa.spec.manifest import PRECISIONS
from nuwa.spec.philox import uniforms
from nuwa.spec.plan import decode_plan
from nuwa.spec.sampling import Sampling

from ..plugins_trt.native_rows import rows_library
from . import fake_tensorrt
from .fake_tensorrt import PLUGIN_ABI, FakeTensorRt, FakeTensorRtx, plugin_library, with_engines

SLOTS, CONDITIONS = 6, 4
PROMPTS = ("none", "a red digit 3 moves left to right on black", "word " * 30, "no " * 99)

NATIVE = tuple(f"native level {level}" for level in LEVELS)
# The CUDA backend with the CPU as its device, and tokens there, or on the host without kernels.
ON_A_DEVICE, WITHOUT_KERNELS = "onnxruntime on a device", "onnxruntime on a device without kernels"
# TensorRT with ONNX files as its engines: caches in place, or copied back.
WITH_PLUGINS, WITHOUT_PLUGINS = "tensorrt with plugins", "tensorrt-rtx"
KINDS = ("onnxruntime", ON_A_DEVICE, WITHOUT_KERNELS, WITH_PLUGINS, WITHOUT_PLUGINS, *NATIVE)

OTHER_MODELS = {
    "wide": {"visual": False, "codes": 70, "width": 64, "heads": 2},
    "heads of 48": {"width": 96, "heads": 2},
    "heads of 64": {"width": 64, "heads": 1},
    "heads of 128": {"width": 128, "heads": 1},
    "two extents": {
        "visual": True,
        "extents": (Extent(3, 3, 3), Extent(1, 3, 3)),
        "relative_bias": False,
    },
    "fp16": {"width": 64, "heads": 2},  # so that all graphs fit the widest vectors
    "bf16": {"width": 64, "heads": 2},
    "int8": {},
}


def made_as(kind: str, bundle, **arguments):
    """A backend of one of KINDS; skips the test where the machine cannot have it."""
    if kind == "onnxruntime":
        return OnnxRuntimeCpu(bundle, **arguments)
    if kind in (ON_A_DEVICE, WITHOUT_KERNELS):
        if bundle.manifest.precision == "int8":
            pytest.skip("the CUDA backend takes no int8 bundles")
        if bundle.manifest.precision == "bf16":
            pytest.skip("the CPU, which is its device here, has no operators of bf16")
        kernels = rows_library() if kind == ON_A_DEVICE else Path("nowhere.so")
        made = OnnxRuntimeCuda(bundle, **arguments, device="cpu", kernels=kernels)
        assert isinstance(made._rows, DeviceRows if kind == ON_A_DEVICE else HostTokens)
        made.caches, made.conditions = seen(made._caches), seen(made._conditions)
        return made
    if kind in (WITH_PLUGINS, WITHOUT_PLUGINS):
        if bundle.manifest.precision == "bf16":
            pytest.skip("ONNX Runtime, which runs its graphs here, has no operators of bf16")
        return made_on_tensorrt(kind, bundle, **arguments)
    level = int(kind.split()[-1])
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler, so no native decoder")
    if level > native_library.load(0).nuwa_best_level():
        pytest.skip(f"this machine cannot run level {level}")
    return NativeCpu(bundle, **arguments, level=level)


def made_on_tensorrt(kind: str, bundle, *, cache_slots: int, **arguments):
    engined = with_all_engines(bundle.path, cache_slots // 2)
    registry = mock.patch.object(fake_tensorrt, "REGISTRY", fake_tensorrt.IPluginRegistry())
    arguments |= {"cache_slots": cache_slots, "kernels": rows_library()}
    arguments["memory"] = fake_tensorrt.Memory
    if kind == WITHOUT_PLUGINS:
        made = TensorRtRtx(engined, module=FakeTensorRtx, **arguments)
    else:
        with registry, mock.patch.object(plugins_trt, "library", plugin_library):
            made = TensorRt(engined, module=FakeTensorRt, **arguments)
    assert bool(made._copied) == (kind == WITHOUT_PLUGINS)
    made.caches, made.conditions = (
        {name: at(each.address, each.shape, each.dtype) for name, each in tensors.items()}
        for tensors in (made._caches, made._conditions)
    )
    return made


@functools.cache
def with_all_engines(path: Path, slots: int) -> Bundle:
    """A copy of a bundle, with engines of both kinds."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(path, folder, dirs_exist_ok=True)
    with_engines(folder, "tensorrt", slots=slots, plugin_abi=PLUGIN_ABI)
    with_engines(folder, "tensorrt-rtx", slots=slots)
    return open_bundle(folder)


def at(address: int, shape: tuple[int, ...], kind) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), kind).reshape(shape)


def seen(values: dict) -> dict[str, np.ndarray]:
    """The memory of OrtValues on the CPU."""
    arrays = {}
    for name, value in values.items():
        kind = np.dtype({"tensor(float)": "f4", "tensor(float16)": "f2"}[value.data_type()])
        arrays[name] = at(value.data_ptr(), value.shape(), kind)
    return arrays


def loaded(bundle, kind: str, threads: int = 1, logits: bool = True):
    """A backend whose condition slots hold PROMPTS, and volumes of random ids if it sees any."""
    made = made_as(
        kind,
        bundle,
        cache_slots=SLOTS,
        condition_slots=CONDITIONS,
        threads=threads,
        spinning=False,
        logits=logits,
    )
    ids = np.stack([bundle.text_tokenizer.encode(prompt) for prompt in PROMPTS])
    layout = ConditionLayout.of(bundle.manifest.config)
    made.encode_text(ids, range(CONDITIONS), layout.text)
    made.encode_text(ids[:1].repeat(CONDITIONS, axis=0), range(CONDITIONS), layout.none)
    made.text_lengths = [bundle.text_tokenizer.used(row) for row in ids]
    if bundle.manifest.config.visual is not None:
        for slot in range(CONDITIONS):
            made.encode_visual(*volume(bundle.manifest.config, slot), slot)
    return made


def volume(config, seed: int) -> tuple[np.ndarray, ...]:
    """A clip of random visual ids, as encode_visual takes it."""
    grid = config.decoder.grid
    ids = np.random.default_rng(seed).integers(0, config.visual_ids, grid.size, np.int32)
    return ids, grid.coordinates(), visual_neighbours(config, grid)


def sequence(
    bundle, *lanes: Lane, seed: int = 0, calls: int = 0, visual=None, known=None, **sampling
) -> Sequence:
    """A clip that has `calls` of its calls behind it."""
    config = bundle.manifest.config
    plan = decode_plan(config.decoder, config.decoder.grid)
    draw = functools.partial(uniforms, seed, 0)
    given = random_tokens(seed, plan.grid.size)
    known = np.zeros(plan.grid.size, bool) if known is None else known
    made = Sequence(plan, lanes, Sampling(**sampling), draw, given, known, config.bos, visual)
    for _ in range(calls):
        made.advance(made.width)
    return made


def random_tokens(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 64, count, np.int32)


def opened(backend, *sequences: Sequence) -> list[Part]:
    """Their next parts, once the backend has them; what they are fed is random, of one seed."""
    for each in sequences:
        backend.open(each.stream)
        held(backend, each)[:] = random_tokens(7, each.stream.held)
    return [each.part() for each in sequences]


def held(backend, made: Sequence) -> np.ndarray:
    """The tokens that a backend holds of a sequence."""
    rows = getattr(backend, "_rows", backend)
    if isinstance(rows, HostTokens):
        return rows.held(made.stream)
    tokens = rows._streams[made.stream].tokens
    if isinstance(rows, DeviceRows):
        rows.memory.wait()
        memory = (ctypes.c_int32 * made.stream.held).from_address(tokens)
        return np.frombuffer(memory, np.int32)
    return tokens


def drawn(backend, *sequences: Sequence) -> list[list[int]]:
    """What the last call drew for each."""
    staged = [(each.part(), each.stream.rows) for each in sequences]
    return [
        held(backend, each)[rows.place[part.first : part.first + part.count]].tolist()
        for each, (part, rows) in zip(sequences, staged, strict=True)
    ]


def batch_of(bundle, *sequences: Sequence) -> StepBatch:
    config = bundle.manifest.config
    columns = CrossColumns(config)
    parts = [each.part() for each in sequences]
    return assemble(
        parts,
        lambda stream: random_tokens(7, stream.held),
        config.image.codebook_size,
        columns,
    )


def other_bundle(name: str, folder: Path) -> Bundle:
    """One of OTHER_MODELS, exported: of another architecture, or another type of storage."""
    from nuwa.export.bundle import export_bundle

    from ..conftest import make_tiny_checkpoint

    make_tiny_checkpoint(folder / "checkpoint", **OTHER_MODELS[name])
    precision = name if name in PRECISIONS else "fp32"
    export_bundle(folder / "checkpoint", folder / "bundle", precision=precision)
    return open_bundle(folder / "bundle")
