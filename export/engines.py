"""Bundle -> TensorRT engines in it: every graph, for some GPUs, all or nothing.

TensorRT builds for the GPU that it runs on; TensorRT-RTX for any, also where there is none. With
the plugin library 3DNA runs as its kernels, without it as the function bodies in the graphs.
"""

from __future__ import annotations

import importlib
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nuwa import plugins_trt
from nuwa.spec.conditions import ConditionLayout
from nuwa.spec.config import ModelConfig
from nuwa.spec.engines import (
    ENGINES,
    MODULES,
    PACKAGES,
    RECORD,
    TENSORRT,
    TENSORRT_RTX,
    EngineKey,
    EngineRecord,
    engine_file,
    graphs_hash,
    version_number,
    widest_sort,
)
from nuwa.spec.files import replacing
from nuwa.spec.manifest import (
    DECODER_STEP,
    MANIFEST,
    BundleError,
    Manifest,
    file_hash,
    graph_file,
)
from nuwa.spec.plan import widest_wave

from .bundle import replace_folder

log = logging.getLogger("nuwa.export")

ROWS = (1, 16, 64, 256)  # upper ends of the ranges that decoder_step gets a profile each for
MOST_FRAMES = 16  # of a call of a tokenizer
CONDITION_SLOTS_AHEAD = 2  # as of runtime/engine.py, which a test compares

Progress = Callable[[str, int, int], None]
Range = tuple[int, int, int]  # least, usual, most


class EngineError(ValueError):
    """Engines cannot be built; the message says why."""


@dataclass(frozen=True)
class EngineOptions:
    """targets: architectures, "sm_89", for TensorRT-RTX; () is this machine's GPU. slots: requests
    that decode side by side; rows: see ROWS; most_rows: that a call may have, which is less to
    build where there are no guided clips, None for as many as such clips of any length have in all
    slots; plugins: the plugin library, None for function bodies; timing_cache: a file that is read
    if it is there, and written; version_compatible: later versions of the same major TensorRT can
    run them.
    """

    runtime: str = TENSORRT_RTX
    targets: tuple[str, ...] = ()
    slots: int = 1
    rows: tuple[int, ...] = ROWS
    most_rows: int | None = None
    plugins: Path | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False

    def __post_init__(self) -> None:
        if self.runtime not in MODULES:
            raise ValueError(f"runtime {self.runtime!r} is not one of {', '.join(MODULES)}")
        if self.slots < 1:
            raise ValueError(f"slots {self.slots} is not at least 1")
        if not self.rows or list(self.rows) != sorted({*self.rows}) or self.rows[0] < 1:
            raise ValueError(f"rows {list(self.rows)} are not rising numbers from 1 on")
        if self.most_rows is not None and self.most_rows < 1:
            raise ValueError(f"most_rows {self.most_rows} is not at least 1")
        for target in self.targets:
            if not re.fullmatch(r"sm_\d{2,3}", target):
                raise ValueError(f"target {target!r} is not an architecture such as sm_89")
        if self.runtime == TENSORRT and self.targets:
            raise ValueError("TensorRT builds for the GPU it runs on; leave --target out")
        if self.runtime == TENSORRT_RTX and self.plugins is not None:
            raise ValueError("TensorRT-RTX takes no plugins; leave --plugins out")
        if self.runtime == TENSORRT_RTX and self.timing_cache is not None:
            raise ValueError("TensorRT-RTX times nothing; leave --timing-cache out")
        if self.runtime == TENSORRT_RTX and self.version_compatible:
            raise ValueError("--version-compatible is for TensorRT; leave it out with TensorRT-RTX")


def check(options: EngineOptions, precision: str) -> None:
    """EngineError if engines of a bundle in this precision cannot be built here, or nowhere."""
    _check_precision(precision)
    trt = _module(options.runtime)
    _plugin_abi(trt, options.plugins)
    for target in options.targets or _own_gpu()[:1]:
        if options.runtime == TENSORRT_RTX:
            _capability(trt, target)


def build_engines(
    bundle: Path, options: EngineOptions, progress: Progress | None = None
) -> tuple[Path, EngineRecord]:
    """Builds the engines of all graphs; their folder and record.

    They appear at once when all are built, instead of those that were there under the same key.
    EngineError if the runtime is missing or refuses; BundleError if `bundle` is none.
    """
    manifest = _manifest(bundle)
    _check_precision(manifest.precision)
    trt = _module(options.runtime)
    logger = _logger(trt)
    plugin_abi = _plugin_abi(trt, options.plugins)
    targets, gpu = options.targets, ""
    if not targets:
        target, model = _own_gpu()
        targets, gpu = (target,), model if options.runtime == TENSORRT else ""
    version = version_number(trt.__version__)
    key = EngineKey(options.runtime, version, targets, plugin_abi, graphs_hash(manifest), gpu)
    folder = bundle / ENGINES / key.name
    folder.parent.mkdir(exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{key.name}.", dir=folder.parent))
    try:
        for index, graph in enumerate(manifest.graphs):
            if progress:
                progress(f"building {graph}", index, len(manifest.graphs))
            path = bundle / graph_file(graph)
            if file_hash(path) != manifest.files[path.name]:
                raise BundleError(
                    f"{path} is not the file that the manifest names; export it again"
                )
            data = _build(trt, logger, path, graph, manifest, options)
            (partial / engine_file(graph)).write_bytes(data)
        record = EngineRecord(
            key=key,
            slots=options.slots,
            rows=tuple(each["T"][2] for each in _size_ranges(DECODER_STEP, manifest, options)),
            version_compatible=options.version_compatible,
            files={path.name: file_hash(path) for path in sorted(partial.iterdir())},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        (partial / RECORD).write_text(record.to_json())
        partial.chmod(0o755)
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder, record


def size_ranges(
    graph: str,
    config: ModelConfig,
    slots: int,
    rows: Sequence[int],
    most_rows: int | None = None,
) -> list[dict]:
    """The profiles of a graph: for each, what its dynamic sizes may be, a Range by name.

    decoder_step has one for each range of rows, and more, each four times as wide, if a wave of a
    guided clip in every slot is wider than the last; with most_rows they end there. What its caches
    hold is fixed by the slots. W ends at what a TopK can sort, which in a large codebook is not all
    codes.
    """
    layout, grid = ConditionLayout.of(config), config.decoder.grid
    cells = grid.height * grid.width
    entries, widest = layout.entries, widest_sort(config.image.codebook_size)
    common = {
        "B": (1, 1, MOST_FRAMES),
        "F": (1, grid.frames, grid.frames),
        "N": (cells, grid.size, grid.size),
    }
    if graph != DECODER_STEP:
        return [common]
    caches, conditions = 2 * slots, slots + CONDITION_SLOTS_AHEAD
    fixed = {"S": (caches,) * 3, "C": (conditions,) * 3}
    columns = {"m": (1, min(32, entries), entries), "W": (1, 1, widest)}
    usual = most_rows or caches * widest_wave(config.decoder)
    rows = sorted({min(each, most_rows or each) for each in rows})
    while rows[-1] < usual:
        rows.append(min(4 * rows[-1], usual))
    least = [1, *(most + 1 for most in rows[:-1])]
    return [
        fixed | columns | {"T": (low, most, most)} for low, most in zip(least, rows, strict=True)
    ]


def _size_ranges(graph: str, manifest: Manifest, options: EngineOptions) -> list[dict]:
    return size_ranges(graph, manifest.config, options.slots, options.rows, options.most_rows)


def _build(
    trt: Any, logger: Any, path: Path, graph: str, manifest: Manifest, options: EngineOptions
) -> bytes:
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    logger.warnings = logging.DEBUG  # of names that function bodies have more than once
    if not parser.parse_from_file(str(path)):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise EngineError(f"{options.runtime} cannot read {path}: {errors}")
    logger.warnings = logging.WARNING
    config = builder.create_builder_config()
    for profile in _profiles(builder, network, _size_ranges(graph, manifest, options)):
        config.add_optimization_profile(profile)
    if options.runtime == TENSORRT_RTX:  # memory that contexts bring: without, none can be recorded
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if hasattr(trt.BuilderFlag, "TF32"):  # would round products of fp32 to 10 bits
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.plugins is not None:
        # Without it outputs are no inputs, and a call copies both caches whole. Open: a report
        # (pytorch/TensorRT#4240) has it that TensorRT does not use aliased plugin I/O as such, and
        # the header says that it may put copies around a plugin. The first thing to measure on a
        # GPU: in `nsys profile` of a step, device-to-device copies of the size of a cache (two a
        # layer would be 89 MB of `base` a sequence); and whether the addresses that `enqueue` gets
        # for outputs 1 and 2 are those of inputs 3 and 4 (layout.h). If not, write caches with
        # TensorScatter, or in an operator before the engine.
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if options.targets:
        config.num_compute_capabilities = len(options.targets)
        for index, target in enumerate(options.targets):
            config.set_compute_capability(_capability(trt, target), index)
    cache = _timing_cache(config, options.timing_cache)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise EngineError(f"{options.runtime} could not build {path}: {logger.last_error}")
    if cache is not None and options.timing_cache is not None:
        with replacing(options.timing_cache) as partial:
            partial.write_bytes(bytes(cache.serialize()))
    return bytes(serialized)


def _profiles(builder: Any, network: Any, ranges: list[dict[str, Range]]) -> Iterator[Any]:
    for sizes in ranges:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            shapes = [
                [
                    size if size >= 0 else sizes[tensor.get_dimension_name(axis)][end]
                    for axis, size in enumerate(tensor.shape)
                ]
                for end in range(3)
            ]
            profile.set_shape(tensor.name, *shapes)
        yield profile


def _timing_cache(config: Any, path: Path | None) -> Any:
    """The cache that a build uses and adds to; None without one.

    TensorRT takes none of another GPU or another version of it; then what a file has is replaced.
    """
    if path is None:
        return None
    if path.exists():
        kept = config.create_timing_cache(path.read_bytes())
        if kept is not None and config.set_timing_cache(kept, False):
            return kept
        log.warning("TensorRT does not take the timing cache %s: it starts from an empty one", path)
    cache = config.create_timing_cache(b"")
    if config.set_timing_cache(cache, False):
        return cache
    log.warning("TensorRT takes no timing cache: %s is not written", path)
    return None


def _check_precision(precision: str) -> None:
    if precision == "int8":
        raise EngineError(
            "TensorRT has no product of a bundle's int8 matrices; export with --precision fp8, "
            "bf16, fp16 or fp32 for engines"
        )


def _manifest(bundle: Path) -> Manifest:
    path = bundle / MANIFEST
    if not path.is_file():
        raise BundleError(f"{bundle} is not a bundle: it has no {MANIFEST}; see `nuwa export`")
    return Manifest.from_json(path.read_text())


def _module(runtime: str) -> Any:
    try:
        return importlib.import_module(MODULES[runtime])
    except ImportError:
        raise EngineError(f"{runtime} is not installed; pip install {PACKAGES[runtime]}") from None


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = "it does not say why"
            self.warnings = logging.WARNING  # the level at which they are logged

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.last_error = message
            elif severity == trt.ILogger.WARNING:
                log.log(self.warnings, "TensorRT: %s", message)

    return Logger()


def _plugin_abi(trt: Any, plugins: Path | None) -> int | None:
    """The version of the plugins that engines of this process have; None if they have none.

    TensorRT's parser takes a plugin for a node that names its namespace wherever one is registered.
    """
    if plugins is not None:
        return _load_plugins(trt, plugins)
    if plugins_trt.registered(trt.get_plugin_registry()):
        raise EngineError(
            "plugins of 3DNA are registered in this process, and TensorRT would build them in; "
            "build engines without plugins in a process of its own"
        )
    return None


def _load_plugins(trt: Any, path: Path) -> int:
    """Registers the library's plugins; its ABI version."""
    import ctypes

    if not path.is_file():
        raise EngineError(f"there is no plugin library {path}")
    if missing := plugins_trt.register(trt.get_plugin_registry(), path):
        raise EngineError(f"TensorRT took no {' and no '.join(missing)} from {path}")
    return ctypes.CDLL(str(path)).nuwa_plugin_abi_version()


def _capability(trt: Any, target: str) -> Any:
    name = target.replace("sm_", "SM")
    known = [each for each in dir(trt.ComputeCapability) if each.startswith("SM")]
    if name not in known:
        choices = ", ".join(each.replace("SM", "sm_") for each in known)
        raise EngineError(f"TensorRT-RTX does not build for {target}; it does for {choices}")
    return getattr(trt.ComputeCapability, name)


def _own_gpu() -> tuple[str, str]:
    """(architecture, name) of this machine's first GPU."""
    import ctypes

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise EngineError(
            "there is no GPU here to build for; name one with --target, such as sm_89"
        ) from None
    major, minor, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    status = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
    for value, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
        status = status or driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    status = status or driver.cuDeviceGetName(name, len(name), device)
    if status:
        raise EngineError(f"the GPU cannot be asked what it is: CUDA error {status}")
    return f"sm_{major.value}{minor.value}", name.value.decode()
