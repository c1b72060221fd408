"""harness.cc from Python: a plugin library that is called as TensorRT calls it.

The library and the harness are built with nvcc and TensorRT's headers, those of TENSORRT_ROOT or of
the wheel kernel-lens; what happens where either is missing is in needs.py.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
from ctypes import byref, c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .calls import Sizes
from .calls import Tensors as Arrays
from .needs import lacking, tools

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "plugins_trt"
TYPES = {"fp32": 0, "fp16": 1, "int8": 2, "int32": 3, "bf16": 7, "int64": 8}  # DataType
FIELDS = {"float32": 1, "int32": 5, "int64": 10}  # PluginFieldType
INPUTS = {
    "NearbyAttention": ("query", "key", "value", "slot", "neighbours", "bias"),
    "CachedNearbyAttention": (
        *("query", "key_new", "value_new", "key", "value"),
        *("slot", "write_index", "neighbours", "bias"),
    ),
}
_INDICES = ("slot", "write_index", "neighbours")


def headers() -> Path:
    """TensorRT's."""
    if root := os.environ.get("TENSORRT_ROOT"):
        inner = Path(root) / "include"
        return inner if (inner / "NvInfer.h").exists() else Path(root)
    found = importlib.util.find_spec("kernel_lens")
    if found is None or not found.submodule_search_locations:
        lacking("no TensorRT headers: set TENSORRT_ROOT, or install kernel-lens")
    return Path(found.submodule_search_locations[0]) / "include" / "tensorrt"


def built_library(architectures: str = "90") -> Path:
    """The plugin library, built for these architectures if it is not up to date."""
    return built("nuwa_plugins", architectures, TENSORRT_ROOT=headers())


def built(target: str, architectures: str, **options: object) -> Path:
    """A library of plugins_trt by its target in CMake."""
    tools("nvcc", "cmake")
    folder = BUILD / architectures.replace(";", "_")
    options |= {"CMAKE_CUDA_ARCHITECTURES": architectures, "CMAKE_BUILD_TYPE": "Release"}
    for command in (
        ["cmake", "-S", ROOT, "-B", folder, *(f"-D{name}={on}" for name, on in options.items())],
        ["cmake", "--build", folder, "--target", target],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "plugins_trt" / f"lib{target}.so"


def visible(library: Path) -> set[str]:
    """The functions that a library shows."""
    done = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    )
    return {line.split()[2] for line in done.stdout.splitlines() if line.split()[1] == "T"}


def built_harness() -> Path:
    source, target = Path(__file__).with_name("harness.cc"), BUILD / "libharness.so"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        tools("nvcc")
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-std=c++17", "-O1", "-Xcompiler", "-fPIC,-Wno-deprecated-declarations", "-shared"]
        command = ["nvcc", *flags, "-isystem", headers(), "-o", target, source, "-ldl"]
        subprocess.run(command, check=True, timeout=300)
    return target


@dataclass(frozen=True)
class Tensors:
    """Types and shapes of a plugin's inputs; -1 is a size that is not known."""

    types: list[int]
    shapes: list[tuple[int, ...]]

    @property
    def arguments(self) -> tuple:
        ranks = [len(shape) for shape in self.shapes]
        sizes = [size for shape in self.shapes for size in shape]
        return (
            len(self.types),
            (c_int * len(self.types))(*self.types),
            (c_int * len(ranks))(*ranks),
            (c_int64 * len(sizes))(*sizes),
        )


def tensors(
    name: str,
    storage: str = "fp16",
    *,
    rows: int = -1,
    slots: int = 4,
    entries: int = 90,
    columns: int = 27,
    heads: int = 4,
    head_dim: int = 64,
    bias: bool = True,
    **changed: tuple[int, ...],
) -> Tensors:
    """Inputs of an operator that fit each other, except those whose shape is given."""
    width = heads * head_dim
    shapes = {
        "query": (rows, width),
        "key_new": (rows, width),
        "value_new": (rows, width),
        "key": (slots, entries, width),
        "value": (slots, entries, width),
        "slot": (rows,),
        "write_index": (rows,),
        "neighbours": (rows, columns),
        "bias": (heads, columns),
    } | changed
    names = [each for each in INPUTS[name] if bias or each != "bias"]
    kinds = [TYPES["int32" if each in _INDICES else storage] for each in names]
    return Tensors(kinds, [shapes[each] for each in names])


def tensors_of(name: str, storage: str, sizes: Sizes) -> Tensors:
    """Inputs of an operator that has a call of these sizes."""
    return tensors(
        name,
        storage,
        rows=sizes.rows,
        slots=sizes.slots,
        entries=sizes.entries,
        columns=sizes.neighbours,
        heads=sizes.heads,
        head_dim=sizes.head_dim,
        bias=sizes.bias,
    )


def inputs_of(name: str, sizes: Sizes) -> list[str]:
    """Their names, in order."""
    return [each for each in INPUTS[name] if sizes.bias or each != "bias"]


class Harness:
    """The creators of a library, and its plugins as opaque numbers."""

    def __init__(self, library: Path) -> None:
        self.c = ctypes.CDLL(str(built_harness()))
        for function in ("open", "create", "round_trip", "clone", "attach"):
            getattr(self.c, f"harness_{function}").restype = c_void_p
        for function in ("log", "name", "identity", "output_shapes", "metadata"):
            getattr(self.c, f"harness_{function}").restype = c_char_p
        self.c.harness_workspace.restype = c_int64
        count = c_int()
        first = self.c.harness_open(str(library).encode(), byref(count))
        assert first, self.log()
        creators = ctypes.cast(first, ctypes.POINTER(c_void_p))[: count.value]
        self.creators = {self.c.harness_name(c_void_p(c)).decode(): c_void_p(c) for c in creators}

    def log(self) -> str:
        return self.c.harness_log().decode()

    def create(self, name: str, heads=4, kind: str = "int32", field: str | None = "heads"):
        """A plugin, or None; heads: a number, or several."""
        values = np.atleast_1d(np.array(heads, kind))
        made = self.c.harness_create(
            self.creators[name],
            None if field is None else field.encode(),
            FIELDS[kind],
            c_void_p(values.ctypes.data),
            len(values),
            0,
        )
        return None if made is None else c_void_p(made)

    def outputs(self, name: str) -> int:
        return 3 if name == "CachedNearbyAttention" else 1

    def configure(self, plugin: c_void_p, name: str, given: Tensors) -> int:
        return self.c.harness_configure(plugin, *given.arguments, self.outputs(name))

    def workspace(self, plugin: c_void_p, name: str, given: Tensors) -> int:
        return self.c.harness_workspace(plugin, *given.arguments, self.outputs(name))

    def shape_change(self, plugin: c_void_p, name: str, given: Tensors) -> int:
        return self.c.harness_shape_change(plugin, *given.arguments, self.outputs(name))

    def supports(self, plugin: c_void_p, name: str, types: list[int], formats=None) -> bool:
        """Whether every tensor's type is taken, as TensorRT asks: one after the other."""
        outputs = self.outputs(name)
        kinds = (c_int * len(types))(*types)
        layouts = (c_int * len(types))(*(formats or [0] * len(types)))
        inputs = len(types) - outputs
        return all(
            self.c.harness_supports(plugin, position, inputs, outputs, kinds, layouts)
            for position in range(len(types))
        )

    def attached(self, name: str, heads: int, tactic: int = 0) -> c_void_p:
        """A plugin as it runs in TensorRT: a copy that belongs to a context."""
        made = self.create(name, heads)
        assert made is not None, self.log()
        assert self.c.harness_set_tactic(made, tactic) == 0
        plugin = c_void_p(self.c.harness_attach(made))
        self.c.harness_delete(made)
        return plugin

    def enqueue(
        self,
        name: str,
        storage: str,
        sizes: Sizes,
        kept: Arrays,
        *,
        in_place: bool = True,
        tactic: int = 0,
    ) -> list[np.ndarray]:
        """Runs a call on a GPU; the outputs, as stored."""
        inputs = [np.ascontiguousarray(kept[each]) for each in inputs_of(name, sizes)]
        outputs = [np.empty_like(kept["query"])]
        if self.outputs(name) > 1:
            outputs += [np.empty_like(kept["key"]), np.empty_like(kept["value"])]
        plugin = self.attached(name, sizes.heads, tactic)
        status = self.c.harness_enqueue(
            plugin,
            *tensors_of(name, storage, sizes).arguments,
            (c_void_p * len(inputs))(*(array.ctypes.data for array in inputs)),
            len(outputs),
            (c_void_p * len(outputs))(*(array.ctypes.data for array in outputs)),
            (c_int64 * len(outputs))(*(array.nbytes for array in outputs)),
            c_int(in_place),
        )
        self.c.harness_delete(plugin)
        assert status == 0, f"error {status}: {self.log()}"
        return outputs

    def launch(
        self, plugin: c_void_p, given: Tensors, inputs: list[int], outputs: list[int], stream: int
    ) -> None:
        """Puts a call onto a stream; inputs, outputs: addresses on the GPU."""
        status = self.c.harness_launch(
            plugin,
            *given.arguments,
            (c_void_p * len(inputs))(*inputs),
            len(outputs),
            (c_void_p * len(outputs))(*outputs),
            c_void_p(stream),
        )
        assert status == 0, f"error {status}: {self.log()}"
