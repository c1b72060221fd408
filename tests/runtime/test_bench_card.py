"""The card of a generation against schedules and figures worked out by hand; rates and floors.

The smallest model has 2 layers of width 32 on a grid of 2 frames of one cell, 64 codes. A layer's
matrices have 32 * (96 + 32 + 32 + 32 + 128) + 64 * 32 = 12288 numbers, the head's 2048: 26624 in
all, 106496 bytes in fp32. An entry of a cache is a key and a value of a layer, 2 * 32 * 4 = 256
bytes. Position 0 sees itself, position 1 both; a text has two tokens at least.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nuwa.runtime.backends.device_memory import HostMemory
from nuwa.runtime.bench import describe, device_rates, measure, rates
from nuwa.runtime.bench.card import (
    HALF,
    Card,
    Step,
    Storage,
    card,
    evaluation_of,
    products,
    storage_of,
)
from nuwa.runtime.bench.floor import Floor, FloorOfAny, FloorOfRows, floor, of_any_rows
from nuwa.runtime.bench.rates import Measurement, Rates
from nuwa.runtime.bench.running import Settings
from nuwa.runtime.bench.scenarios import Extent as bench_extent
from nuwa.runtime.bench.targets import IN_PROCESS, Target
from nuwa.runtime.bench.workload import Workload
from nuwa.runtime.bundle import manifest_hash
from nuwa.runtime.client import LocalClient
from nuwa.spec.conditions import visual_window
from nuwa.spec.config import (
    PRESETS,
    DecoderConfig,
    ModelConfig,
    TextConfig,
    VisualConfig,
    VQGANConfig,
)
from nuwa.spec.grid import Extent, Grid
from nuwa.spec.manifest import MANIFEST, Manifest
from nuwa.spec.plan import RollingPlan, completion_plan, decode_plan
from nuwa.spec.tasks import Task

from .fake_engine import FakeEngine

WEIGHTS, HEAD, ENTRY, LAYERS = 106496, 8192, 256, 2  # bytes of all matrices, of the head's


def manifest_of(config: ModelConfig, **changes) -> Manifest:
    manifest = Manifest(
        name=config.name,
        config=config,
        tasks=tuple(Task),
        precision="fp32",
        opset=20,
        cache_entries=2,
        files={},
        parity={},
        parameter_count=123456,
        licence="CC0-1.0",
        training_data="none",
        created="2026-01-02T03:04:05+00:00",
    )
    return dataclasses.replace(manifest, **changes)


def small(cells: int = 1, frames: int = 2, extents: tuple[Extent, ...] = (Extent(3, 3, 3),)):
    """The smallest model, or one of more cells a side."""
    image = VQGANConfig(
        resolution=4 * cells,
        base_channels=32,
        channel_multipliers=(1, 1, 1),
        attention_resolutions=(),
        codebook_size=64,
    )
    return ModelConfig(
        name="small",
        image=image,
        text=TextConfig(vocabulary_size=300, width=32, layers=1, heads=2, mask_padding=True),
        decoder=DecoderConfig(
            grid=Grid(frames, cells, cells),
            width=32,
            layers=LAYERS,
            heads=2,
            ff_multiplier=2,
            extents=extents,
        ),
        sketch=dataclasses.replace(image, channels=5),
        visual=VisualConfig(layers=1, heads=4, ff_multiplier=2),
    )


SMALL = manifest_of(small())


def step_bytes(made: Card) -> list[int]:
    return [step.bytes for step in made.steps]


def test_bytes_and_flops_of_a_clip_worked_out_by_hand():
    made = card(SMALL, Task.T2V, frames=2)
    assert made.parameters == 123456
    assert made.weights_bytes == WEIGHTS
    assert made.flops_per_row == 2 * 26624
    assert made.cache_bytes == LAYERS * 2 * ENTRY
    assert [(step.rows, step.drawn) for step in made.steps] == [(1, 1), (1, 1)]
    cache_and_text = [LAYERS * ENTRY * (1 + 2), LAYERS * ENTRY * (2 + 2)]
    assert step_bytes(made) == [WEIGHTS + each for each in cache_and_text]
    assert made.bytes == 2 * WEIGHTS + sum(cache_and_text)
    assert made.flops == 2 * made.flops_per_row


def test_guidance_doubles_rows_and_caches_and_reads_a_second_text():
    made = card(SMALL, Task.T2V, frames=2, guidance=3.0)
    assert [step.rows for step in made.steps] == [2, 2]
    assert step_bytes(made)[0] == WEIGHTS + LAYERS * ENTRY * (2 * 1 + 2 * 2)
    assert made.cache_bytes == 2 * LAYERS * 2 * ENTRY
    assert made.flops == 2 * card(SMALL, Task.T2V, frames=2).flops
    assert card(SMALL, Task.T2V, frames=2, guidance=3.0, prompt=False).lanes == 1
    assert card(SMALL, Task.S2I, guidance=3.0).lanes == 1, "it has no prompt"
    assert card(SMALL, Task.S2I, guidance=3.0, prompt=True).lanes == 2


def test_samples_multiply_rows_and_caches_and_share_weights_and_texts():
    made = card(SMALL, Task.T2V, frames=2, guidance=3.0, samples=3, text_length=9)
    assert [(step.rows, step.drawn) for step in made.steps] == [(6, 6), (6, 6)]
    assert step_bytes(made)[1] == WEIGHTS + LAYERS * ENTRY * (6 * 2 + 9 + 2)
    assert made.cache_bytes == card(SMALL, Task.T2V, frames=2, guidance=3.0).cache_bytes


def test_a_text_whose_padding_counts_is_read_whole():
    config = small()
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, mask_padding=False))
    made = card(manifest_of(config), Task.T2I)
    assert step_bytes(made) == [WEIGHTS + LAYERS * ENTRY * (1 + 77)]


@pytest.mark.parametrize(
    "precision, weights, entry",
    [
        ("fp16", WEIGHTS // 2, ENTRY // 2),
        ("int8", WEIGHTS // 4, ENTRY),
        ("fp8", WEIGHTS // 4, ENTRY // 2),
    ],
)
def test_precision_decides_the_size_of_numbers(precision, weights, entry):
    made = card(dataclasses.replace(SMALL, precision=precision), Task.T2I)
    assert made.weights_bytes == weights
    assert step_bytes(made) == [weights + LAYERS * entry * (1 + 2)]
    assert card(SMALL, Task.T2I, precision=precision) == made


@pytest.mark.parametrize(
    ("precision", "backend", "processor", "stored"),
    [
        ("fp16", "native-cpu", "x86_64", Storage(2, 4, "fp32")),
        ("fp16", "native-cpu", "aarch64", Storage(2, 4, "fp32")),
        ("fp16", "onnxruntime-cpu", "x86_64", Storage(4, 2, "fp32")),
        ("fp16", "onnxruntime-cpu", "aarch64", Storage(2, 2, "fp16")),
        ("fp16", "onnxruntime-cuda", "x86_64", Storage(2, 2, "fp16")),
        ("bf16", "native-cpu", "x86_64", Storage(2, 4, "bf16")),
        ("bf16", "onnxruntime-cpu", "x86_64", Storage(4, 4, "fp32")),
        ("bf16", "onnxruntime-cuda", "x86_64", Storage(2, 2, "bf16")),
        ("int8", "native-cpu", "x86_64", Storage(1, 4, "int8")),
        ("fp32", "onnxruntime-cpu", "x86_64", Storage(4, 4, "fp32")),
        ("fp8", "tensorrt", "x86_64", Storage(1, 2, "bf16")),
        ("fp16", "", "x86_64", Storage(2, 2, "fp16")),
    ],
)
def test_backends_store_numbers_of_their_own(precision, backend, processor, stored):
    assert storage_of(precision, backend, processor) == stored


def test_a_backend_that_computes_in_fp32_has_the_floor_of_fp32s_products():
    half = dataclasses.replace(SMALL, precision="fp16")
    made, whole = card(half, Task.T2I, backend="native-cpu"), card(SMALL, Task.T2I)
    assert (made.precision, made.products_precision) == ("fp16", "fp32")
    assert (2 * made.weights_bytes, made.cache_bytes) == (whole.weights_bytes, whole.cache_bytes)
    slow = Rates(measured(1e9), {1: measured(1e6)}, precision="fp32")
    assert floor(made, slow).seconds == floor(whole, slow).products_seconds > 0
    assert floor(card(half, Task.T2I), slow).products_seconds is None


def test_onnx_runtime_computes_fp16_in_fp32_on_this_processor():
    """What storage_of says of it: weights are converted once, when they are loaded."""
    onnx = pytest.importorskip("onnx")
    if platform.machine() in HALF:
        pytest.skip("this processor has products of fp16")
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        ort.InferenceSession(
            device_rates._graph([(8, 8)], "fp16"), options, providers=["CPUExecutionProvider"]
        )
        graph = onnx.load(f"{folder}/optimized.onnx").graph
    assert [each.data_type for each in graph.initializer] == [onnx.TensorProto.FLOAT]


def test_a_sketch_is_seen_where_its_window_is():
    assert step_bytes(card(SMALL, Task.S2I)) == [WEIGHTS + LAYERS * ENTRY * (1 + 2 + 1)]
    wide = manifest_of(small(4, 3))
    with_sketch, without = (card(wide, task, frames=3) for task in (Task.S2V, Task.T2V))
    window, plan = (
        visual_window(wide.config, Grid(3, 4, 4)),
        decode_plan(wide.config.decoder, Grid(3, 4, 4)),
    )
    for step, (seen, unseen) in enumerate(zip(with_sketch.steps, without.steps, strict=True)):
        looked_at = {entry for row in plan.call(step).position for entry in window[row]} - {-1}
        assert seen.bytes - unseen.bytes == LAYERS * ENTRY * len(looked_at)


def test_nothing_is_drawn_where_all_is_given():
    waves = card(SMALL, Task.V2V, frames=2, given_frames=1)
    assert [(step.rows, step.drawn) for step in waves.steps] == [(2, 1)], "merged into one"
    assert waves.one_by_one_steps == 2
    made = card(SMALL, Task.V2V, frames=2, given_frames=1, schedule="raster")
    assert [(step.rows, step.drawn) for step in made.steps] == [(1, 0), (1, 1)]
    assert step_bytes(made)[0] == WEIGHTS - HEAD + LAYERS * ENTRY * (1 + 2)
    assert made.steps[0].flops == 2 * (26624 - 2048)


@pytest.mark.parametrize(
    "preset, task, frames, waves, one_by_one",
    [
        ("base", Task.T2I, 1, 41, 441),
        ("sprites", Task.T2V, 10, 33, 640),
        ("sprites", Task.TI2I, 1, 15, 64),
    ],
)
def test_steps_are_those_of_the_schedules(preset, task, frames, waves, one_by_one):
    manifest = manifest_of(PRESETS[preset], tasks=tuple(PRESETS[preset].tasks))
    made = card(manifest, task, frames=frames)
    decoder = manifest.config.decoder
    plan = decode_plan(decoder, Grid(frames, decoder.grid.height, decoder.grid.width))
    assert [step.rows for step in made.steps] == np.diff(plan.bounds).tolist()
    assert (len(made.steps), made.wave_steps, made.one_by_one_steps) == (waves, waves, one_by_one)
    alone = card(manifest, task, frames=frames, schedule="raster")
    assert [step.rows for step in alone.steps] == [1] * one_by_one
    assert alone.flops == made.flops
    assert alone.bytes > made.bytes


def test_a_clip_beyond_the_trained_length_has_the_steps_of_its_plan():
    manifest = manifest_of(PRESETS["sprites"])
    made = card(manifest, Task.V2V, frames=30, given_frames=2)
    plan = RollingPlan(manifest.config.decoder, 30, 2)
    rows = [len(plan.call(step).position) for step in range(plan.steps)]
    assert [step.rows for step in made.steps] == rows
    assert sum(rows) == 30 * 64
    assert sum(step.drawn for step in made.steps) == 28 * 64
    assert made.one_by_one_steps == 30 * 64


def test_known_cells_merge_steps():
    manifest = manifest_of(small(4, 3))
    known = np.zeros((4, 4), bool)
    known[:, :3] = True
    made = card(manifest, Task.TV2V, frames=3, known=known)
    plan = completion_plan(manifest.config.decoder, Grid(3, 4, 4), np.tile(known.reshape(-1), 3))
    assert [step.rows for step in made.steps] == np.diff(plan.bounds).tolist()
    assert sum(step.drawn for step in made.steps) == 3 * 4
    assert made.wave_steps < card(manifest, Task.TV2V, frames=3).wave_steps


def test_layers_of_other_windows_read_their_own_entries():
    narrow, wide = Extent(1, 1, 1), Extent(3, 3, 3)
    mixed, one, other = (
        card(manifest_of(small(extents=extents)), Task.T2V, frames=2).steps[1].bytes
        for extents in ((narrow, wide), (narrow,), (wide,))
    )
    assert other - one == LAYERS * ENTRY
    assert mixed - one == ENTRY


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"frames": 3}, "3 frames"),
        ({"samples": 0}, "samples 0"),
        ({"given_frames": 1}, "given_frames 1"),
        ({"precision": "fp4"}, "fp4"),
        ({"schedule": "spiral"}, "spiral"),
        ({"task": Task.V2V}, "given_frames 0"),
        ({"task": Task.V2V, "given_frames": 2, "frames": 2}, "fewer than the 2"),
        ({"task": Task.T2I, "frames": 2}, r"\[1, 1\]"),
        ({"task": Task.I2I, "known": np.zeros((2, 2), bool)}, r"known is \[2, 2\]"),
    ],
)
def test_what_cannot_be_asked_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        card(SMALL, **({"task": Task.T2V, "frames": changes.get("frames", 1)} | changes))


def test_a_task_that_the_bundle_cannot_do_is_refused():
    config = dataclasses.replace(small(), sketch=None)
    with pytest.raises(ValueError, match="task s2i is not one of t2i"):
        card(manifest_of(config), Task.S2I)


def test_json_has_what_the_table_shows():
    made = card(SMALL, Task.T2V, frames=2, guidance=2.0).to_json()
    assert json.loads(json.dumps(made)) == made
    assert made["task"] == "t2v"
    assert (made["steps"], made["wave_steps"], made["one_by_one_steps"]) == (2, 2, 2)
    assert made["rows_per_step"] == [2, 2]
    assert made["generation_flops"] == 4 * 2 * 26624


def measured(value: float) -> Measurement:
    """Of which the best repeat counts, not the median."""
    return Measurement(value / 2, best=value, repeats=3, spread=0.1)


def test_floor_worked_out_by_hand():
    clip = card(SMALL, Task.T2V, frames=2)
    products_of = {1: measured(1e6)}
    made = floor(clip, Rates(measured(1e5), products_of))  # by bytes: 53248 FLOP take 0.05 s
    assert made.seconds == pytest.approx((108032 + 108544) / 1e5)
    assert made.bytes_seconds == made.seconds
    assert made.products_seconds == pytest.approx(2 * 53248 / 1e6)
    assert made.blas_seconds == made.seconds
    (by_rows,) = made.by_rows
    assert (by_rows.rows, by_rows.steps) == (1, 2)
    assert by_rows.seconds == pytest.approx(108288 / 1e5)

    made = floor(clip, Rates(measured(1e7), products_of))  # by products
    assert made.seconds == made.products_seconds == pytest.approx(2 * 53248 / 1e6)


def test_floor_sums_the_slower_of_both_step_by_step():
    """The step of one row is bound by bytes, that of four by products."""
    made = dataclasses.replace(
        card(SMALL, Task.T2I),
        weights_bytes=800,
        head_bytes=100,
        first_frame_steps=1,
        steps=(Step(1, 1, 1000, 10.0), Step(4, 4, 1000, 400.0)),
    )
    least = floor(made, Rates(measured(100.0), {1: measured(0.5), 4: measured(20.0)}))
    by_rows = (FloorOfRows(1, 1, 10.0, 10.0 / 0.5), FloorOfRows(4, 1, 20.0, 20.0))
    assert least == Floor(
        seconds=10.0 + 20.0,
        bytes_seconds=10.0 + 10.0,
        products_seconds=0.5 + 20.0,  # BLAS is slow at one row; another library need not be
        blas_seconds=20.0 + 20.0,
        first_frame_seconds=10.0,
        weights_seconds=8.0 + 8.0,
        by_rows=by_rows,
        of_any=FloorOfAny(8.0, (1000 - 800) / 4 / 100, 10.0 / 20.0),
    )
    assert least.of_any.seconds(1) == 8.5
    assert least.of_any.seconds(40) == 28.0, "by bytes"
    told = json.loads(json.dumps(least.to_json()))
    assert of_any_rows(told["floor_of_any_rows"]) == least.of_any
    assert least.together(1) == max(20.0, 20.5)
    assert least.together(2) == 20.5, "products: weights are read once for two"
    assert least.together(0.5) == 4.0 + 32.0
    assert least.to_json()["floor_by_rows"][1] == {
        "rows": 4,
        "steps": 1,
        "seconds": 20.0,
        "blas_seconds": 20.0,
    }


def test_floor_takes_products_only_at_their_own_precision():
    clip = card(SMALL, Task.T2V, frames=2, precision="int8")
    made = floor(clip, Rates(measured(1e9), {1: measured(1.0)}, precision="fp32"))
    assert made.seconds == made.bytes_seconds == pytest.approx(clip.bytes / 1e9)
    assert (made.products_seconds, made.blas_seconds) == (None, None)
    assert made.by_rows[0].blas_seconds is None
    assert made.to_json()["floor_products_seconds"] is None
    for precision in ("bf16", "fp8"):  # fp8 is multiplied as bf16
        clip = card(SMALL, Task.T2V, frames=2, precision=precision)
        made = floor(clip, Rates(measured(1e9), {1: measured(1.0)}, precision="bf16"))
        assert made.products_seconds is not None


def test_a_floor_holds_for_generations_that_share_steps():
    """Of two clips side by side: each of their steps has its rows, and weights are read once."""
    one = card(SMALL, Task.T2V, frames=2)
    steps = tuple(
        Step(2 * each.rows, 2, 2 * each.bytes - one.weights_bytes, 2 * each.flops)
        for each in one.steps
    )
    both = dataclasses.replace(one, steps=steps)
    for products_of in ({1: measured(1e6)}, {1: measured(1e12)}):
        rates_of = Rates(measured(1e5), products_of)
        of_one, of_both = floor(one, rates_of), floor(both, rates_of)
        assert 2 * of_one.together(2) <= of_both.seconds * (1 + 1e-9)
        for each in of_both.by_rows:
            assert of_one.of_any.seconds(each.rows) <= each.seconds * (1 + 1e-9)


def test_the_first_frame_is_that_which_was_made():
    assert card(SMALL, Task.T2V, frames=2).first_frame_steps == 1
    assert card(SMALL, Task.V2V, frames=2, given_frames=1).first_frame_steps == 1
    alone = card(SMALL, Task.V2V, frames=2, given_frames=1, schedule="raster")
    assert alone.first_frame_steps == 2
    wide = manifest_of(small(4, 3))
    made = card(wide, Task.T2V, frames=3)
    plan = decode_plan(wide.config.decoder, Grid(3, 4, 4))
    last = max(step for step in range(plan.steps) if (plan.call(step).position < 16).any())
    assert made.first_frame_steps == last + 1 < plan.steps
    assert floor(made, Rates(measured(1e5), {})).first_frame_seconds == pytest.approx(
        sum(step_bytes(made)[: last + 1]) / 1e5
    )


def test_rates_without_products_make_a_floor_of_bytes():
    clip = card(SMALL, Task.T2V, frames=2)
    made = floor(clip, Rates(measured(1e5), {}, precision="fp32"))
    assert made.seconds == made.bytes_seconds and made.products_seconds is None
    assert made.of_any.row_products_seconds == 0.0


def test_rates_are_the_faster_ones_where_there_are_several():
    table = Rates(measured(100.0), {2: measured(5.0), 8: measured(9.0)}, read=measured(300.0))
    assert table.bytes_per_second == 300.0
    assert [table.flops_per_second(rows) for rows in (1, 2, 3, 8, 99)] == [5.0, 5.0, 9.0, 9.0, 9.0]
    assert table.most_flops_per_second == 9.0


def test_rates_in_json_are_as_the_table_reads_them():
    told = Rates(measured(100.0), {2: measured(5.0)}, about={"threads": 2}).to_json()
    assert told["copy_bytes_per_second"] == 50.0
    assert told["copy_best_bytes_per_second"] == 100.0
    (product,) = told["gemm"]
    assert product["rows"] == 2
    assert (product["flops_per_second"], product["best_flops_per_second"]) == (2.5, 5.0)
    assert (product["repeats"], product["spread"]) == (3, 0.1)
    assert told["gemm_precision"] == "fp32" and told["threads"] == 2
    assert "read_bytes_per_second" not in told


def test_a_measurement_is_the_median_the_best_and_the_spread():
    made = Measurement.of(12.0, [1.0, 2.0, 3.0, 4.0, 2.0])
    assert made == Measurement(6.0, 12.0, 5, (12.0 - 3.0) / 6.0)


def test_this_machine_has_rates(monkeypatch):
    monkeypatch.setattr(rates, "LEAST_COPIED", 1 << 16)
    monkeypatch.setattr(rates, "SHORTEST", 1e-5)
    monkeypatch.setattr(rates, "copied_bytes", lambda hardware: 1 << 16)
    shapes = products(small())
    made = rates.measure(shapes, range(1, 40), threads=2, working_set=5000, repeats=3)
    assert made.copy.value > 0 and made.read is not None and made.read.value > 0
    assert len(made.products) <= rates.MOST_SIZES + 1
    assert {1, 39, rates.MANY_ROWS} <= set(made.products)
    assert all(each.value > 0 and each.repeats == 3 for each in made.products.values())
    assert "numpy" in made.about["gemm_by"]
    json.dumps(made.to_json())
    assert floor(card(SMALL, Task.T2V, frames=2), made).seconds > 0


def test_rates_of_a_numpy_whose_blas_has_its_own_threads(monkeypatch):
    monkeypatch.setattr(rates, "_openblas", lambda: None)
    monkeypatch.setattr(rates, "copied_bytes", lambda hardware: 1 << 16)
    made = rates.measure([(8, 8)], [1], threads=2, working_set=1 << 28, repeats=1)
    assert made.about["gemm_threads"] == "those of BLAS"
    assert made.products[1].best > 0


def test_blas_gets_its_threads_back():
    found = rates._openblas()
    if found is None:
        pytest.skip("this numpy has no OpenBLAS")
    before = found[0]()
    with rates.blas_threads(1) as single:
        assert single and found[0]() == 1
    assert found[0]() == before


BEFORE = Rates(measured(100.0), {2: measured(5.0), 8: measured(9.0)}, read=measured(300.0))
AFTER = Rates(measured(110.0), {2: measured(4.0), 8: measured(12.0)}, read=measured(290.0))


def test_a_floor_is_of_the_faster_rates_of_before_and_after():
    both = rates.faster(BEFORE, AFTER)
    assert (both.copy, both.read) == (AFTER.copy, BEFORE.read)
    assert both.products == {2: BEFORE.products[2], 8: AFTER.products[8]}
    told = both.to_json()
    assert told["before_and_after"] == {
        "best_bytes_per_second": [300.0, 290.0],
        "gemm_best_flops_per_second": [9.0, 12.0],
    }
    assert rates.apart(both) == pytest.approx(1 / 3) and rates.apart(BEFORE) == 0
    without = Rates(measured(100.0), {})
    assert rates.faster(without, without).about["before_and_after"] == {
        "best_bytes_per_second": [100.0, 100.0]
    }


def test_rates_are_measured_again_after_the_run(monkeypatch):
    """Another process was in the way before: without the second time the floor were too slow."""
    monkeypatch.setattr(describe, "open_bundle", lambda *_, **__: SimpleNamespace(manifest=SMALL))
    monkeypatch.setattr(measure, "describe_model", lambda *_: {})
    found, asked = iter([BEFORE, AFTER]), []

    def measured_now(*args, **named):
        asked.append(named["repeats"])
        return next(found)

    monkeypatch.setattr(rates, "measure", measured_now)
    engine = FakeEngine()
    info = dataclasses.replace(engine.info, backend="native-cpu")
    with LocalClient(engine) as client:
        target = Target(client, info, IN_PROCESS, Path("nowhere"), 1, None)
        short = Settings(extent=bench_extent(0.1, rounds=1), warm_up=1)
        result = measure.measure(target, Workload(Task.T2I), short)
    assert asked == [rates.REPEATS, rates.REPEATS_AGAIN]
    least = floor(card(SMALL, Task.T2I, backend="native-cpu"), rates.faster(BEFORE, AFTER))
    assert result["card"]["floor_seconds"] == least.seconds
    assert result["metrics"]["latency"]["floor"] == least.seconds
    assert result["card"]["rates"]["before_and_after"]["gemm_best_flops_per_second"] == [9.0, 12.0]
    (note,) = (note for note in result["notes"] if "before and after" in note)
    assert "were 33 % apart" in note


def test_few_sizes_are_apart_in_ratio():
    assert rates.few_of([3, 1, 3, 2]) == [1, 2, 3]
    assert rates.few_of(range(1, 65), 4) == [1, 4, 16, 64]


def test_copies_are_larger_than_the_caches_and_smaller_than_memory(monkeypatch):
    monkeypatch.setattr(rates, "last_level_cache", lambda hardware: 1 << 28)
    monkeypatch.setattr(rates, "memory_bytes", lambda hardware: None)
    assert rates.copied_bytes(None) == 1 << 30
    monkeypatch.setattr(rates, "memory_bytes", lambda hardware: 1 << 32)
    assert rates.copied_bytes(None) == 1 << 29


def test_where_memory_is_short_little_is_copied(monkeypatch):
    monkeypatch.setattr(rates, "last_level_cache", lambda hardware: 4 << 20)
    monkeypatch.setattr(rates, "available_bytes", lambda hardware: 1 << 32)
    assert rates.frugal_bytes(None) == 8 << 20, "and as much for the target: four times the cache"
    monkeypatch.setattr(rates, "available_bytes", lambda hardware: 1 << 27)
    assert rates.frugal_bytes(None) == 4 << 20
    monkeypatch.setattr(rates, "SHORTEST", 1e-5)
    made = rates.measure([(8, 8)], [1], threads=1, working_set=1 << 40, repeats=1, frugal=True)
    assert made.about["copied_bytes"] == 4 << 20
    assert made.about["working_set_bytes"] == (1 << 27) // rates.FRUGAL_SHARE


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rates_of_a_device_on_a_stand_in(monkeypatch, precision):
    monkeypatch.setattr(device_rates, "COPIED", 1 << 16)
    memory = HostMemory()
    made = device_rates.measure(
        products(small()),
        [1, 4],
        precision=precision,
        working_set=1 << 12,
        repeats=2,
        device="cpu",
        memory=memory,
    )
    assert made.read.best > 0 and made.about["working_set_bytes"] == 1 << 12
    assert made.copy.best > 0 and made.about["copied_bytes"] == 1 << 16
    assert set(made.products) == {1, 4, rates.MANY_ROWS} and made.precision == precision
    assert not memory._arrays, "what was allocated is freed"
    json.dumps(made.to_json())


class Timed:
    """Products each of which takes a second, of however many rows."""

    _precision = "fp16"
    read = device_rates._Products.read

    def __init__(self, shapes, *_):
        self.flops = 2.0 * sum(inputs * outputs for inputs, outputs in shapes)

    def rate(self, rows, repeats):
        return measured(self.flops * rows)


def test_a_floor_of_a_device_is_of_the_fastest_there_is(monkeypatch):
    """Of steps that all slots share, and of weights that its cache holds."""
    monkeypatch.setattr(device_rates, "_Products", Timed)
    sizes = []

    def copy(memory, size, repeats):
        sizes.append(size)
        return measured(800.0 if size < 1000 else 100.0)

    monkeypatch.setattr(device_rates, "copy_bandwidth", copy)
    given = {"precision": "fp16", "working_set": 1000, "memory": HostMemory()}
    made = device_rates.measure([(10, 10)], [4, 40, 2000], **given)
    assert sizes == [device_rates.COPIED, 500], "source and target are as much as is read"
    assert set(made.products) == {4, 40, 256, 512, 1024, 2000}
    assert made.most_flops_per_second == 200.0 * 2000 and made.bytes_per_second == 800.0
    made = device_rates.measure([(100, 100)], [1], **given)
    assert made.bytes_per_second == 2 * 100 * 100, "of a product that has read all of it"


def test_rows_of_a_device_are_those_of_all_slots(monkeypatch):
    asked = {}

    def rates_of(shapes, rows, **named):
        asked.update(named, rows=list(rows))
        raise RuntimeError("no GPU")

    monkeypatch.setattr(device_rates, "measure", rates_of)
    made = card(SMALL, Task.T2I)
    info = SimpleNamespace(backend="onnxruntime-cuda")
    target = SimpleNamespace(local=True, info=info)
    found, note = describe._rates(target, Settings(), [], made, False, 1, at_once=8.0)
    assert found is None and "no GPU" in note
    assert asked["rows"][-1] == 8 * max(made.row_counts)
    assert asked["working_set"] == made.weights_bytes


def test_a_device_whose_products_cannot_be_measured_has_its_bandwidth(monkeypatch):
    monkeypatch.setattr(device_rates, "FRUGAL_COPIED", 1 << 12)
    made = device_rates.measure(
        [(8, 8)],
        [1],
        precision="int8",
        working_set=64,
        frugal=True,
        repeats=1,
        device="cpu",
        memory=HostMemory(),
    )
    assert made.read is not None and made.products == {} and made.precision == "none"
    assert "no graph of int8" in made.about["gemm_by"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / MANIFEST).write_text("{}")
    return folder


def write_report(path: Path, bundle_hash: str, **tasks) -> None:
    report = {
        "evaluator": "sprites",
        "split": "test",
        "samples": 64,
        "judge": {},
        "about": {"bundle_hash": bundle_hash},
        "tasks": {task: {"asks": "", "scores": scores} for task, scores in tasks.items()},
    }
    path.write_text(json.dumps(report))


def test_scores_of_this_bundle_are_found_beside_it(bundle):
    figures = {"model": 0.9, "low": 0.8, "high": 0.95, "intervals": {}, "samples": 64}
    write_report(bundle / "evaluation-a.json", manifest_hash(bundle), t2i={"joint": figures})
    write_report(bundle / "report.json", manifest_hash(bundle), t2i={"joint": 0.1}, t2v={"fvd": 7})
    scores, reason = evaluation_of(bundle)
    assert reason is None
    assert scores["t2i"] == {
        "report": "evaluation-a.json",
        "evaluator": "sprites",
        "split": "test",
        "samples": 64,
        "scores": {"joint": {"model": 0.9, "low": 0.8, "high": 0.95, "samples": 64}},
    }
    assert scores["t2v"]["scores"] == {"fvd": {"model": 7}}


def test_scores_of_another_bundle_do_not_count(bundle, tmp_path):
    assert evaluation_of(bundle) == (
        None,
        f"{bundle} has none of evaluate*.json, evaluation*.json, report.json",
    )
    write_report(tmp_path / "scores.json", "f" * 64, t2i={"joint": 0.9})
    scores, reason = evaluation_of(bundle, tmp_path / "scores.json")
    assert scores is None
    assert (
        reason == f"scores.json is of bundle {'f' * 12}, this one is {manifest_hash(bundle)[:12]}"
    )
    write_report(tmp_path / "scores.json", manifest_hash(bundle), t2i={"joint": 0.9})
    scores, reason = evaluation_of(bundle, tmp_path / "scores.json")
    assert reason is None and list(scores) == ["t2i"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"about": {}}', '{"about": null, "tasks": 3}'])
def test_what_is_no_report_is_told(bundle, text):
    (bundle / "report.json").write_text(text)
    assert evaluation_of(bundle) == (None, "report.json is no report of `nuwa evaluate`")
