"""Engine.check: what cannot be done is refused, with what is wrong and what is right."""

from __future__ import annotations

import re

import numpy as np
import pytest

from nuwa.runtime.bundle import open_bundle
from nuwa.runtime.core import GenerationRequest, UnsupportedTaskError
from nuwa.runtime.engine import model_info
from nuwa.runtime.errors import FieldError
from nuwa.spec.tasks import Task

from .engine_run import bundle_for, tiny_engine

FRAMES = np.zeros((3, 16, 16, 3), np.uint8)
MASK = np.ones((16, 16), bool)
SKETCH = np.full((3, 16, 16), 4, np.uint8)  # of classes 0 to 4
UNKNOWN = SKETCH.copy()
UNKNOWN[1, 2, 3] = 5
GOOD = {
    Task.T2I: {"prompt": "x"},
    Task.T2V: {"prompt": "x", "frame_count": 3},
    Task.V2V: {"frame_count": 3, "frames": FRAMES[:2]},
    Task.S2I: {"sketch": SKETCH[:1]},
    Task.S2V: {"prompt": "x", "frame_count": 3, "sketch": SKETCH},
    Task.I2I: {"frames": FRAMES[:1], "mask": MASK},
    Task.TI2I: {"prompt": "x", "frames": FRAMES[:1], "mask": MASK},
    Task.TV2V: {"prompt": "x", "frame_count": 3, "frames": FRAMES, "mask": MASK},
}
BAD = [
    (Task.T2I, {"prompt": ""}, "prompt", "prompt is empty; task T2I needs one"),
    (Task.TV2V, {"prompt": " \n"}, "prompt", "prompt is empty; task TV2V needs one"),
    (Task.I2I, {"prompt": "x"}, "prompt", "task I2I takes no prompt; TI2I does"),
    (Task.T2I, {"prompt": "x" * 75}, "prompt", "prompt is 76 tokens; the model reads at most 75"),
    (Task.V2V, {"prompt": "3 " * 80}, "prompt", "prompt is .* tokens; the model reads at most 75"),
    (Task.T2V, {"frame_count": 4}, "frame_count", "frame_count 4 is too large.* makes 1 to 3"),
    (Task.T2I, {"frame_count": 2}, "frame_count", "frame_count 2 is too large; an image is 1"),
    (Task.T2I, {"frames": FRAMES[:1]}, "image", "task T2I takes no image"),
    (Task.T2V, {"frames": FRAMES}, "video", "task T2V takes no video"),
    (Task.V2V, {"mask": MASK}, "mask", "task V2V takes no mask"),
    (Task.T2V, {"sketch": FRAMES[..., 0]}, "sketch", "task T2V takes no sketch"),
    (Task.V2V, {"frames": None}, "video", "video is missing; task V2V needs one"),
    (Task.I2I, {"frames": None}, "image", "image is missing; task I2I needs one"),
    (Task.TV2V, {"mask": None}, "mask", "mask is missing; task TV2V needs one"),
    (Task.V2V, {"frames": FRAMES}, "video", "video has 3 frames.* fewer than the 3 asked"),
    (Task.V2V, {"frames": FRAMES[:0]}, "video", "video has 0 frames; V2V needs at least 1"),
    (Task.TV2V, {"frames": FRAMES[:2]}, "video", "video has 2 frames, not the 3 asked for"),
    (Task.I2I, {"frames": FRAMES}, "image", "image has 3 frames, not the 1 asked for"),
    (Task.I2I, {"frames": FRAMES[:1, :8]}, "image", "image is 16 x 8 pixels.* takes 16 x 16"),
    (Task.V2V, {"frames": FRAMES[:1, :, :9]}, "video", "video is 9 x 16 pixels.* takes 16 x 16"),
    (Task.I2I, {"frames": FRAMES[0]}, "image", r"image is uint8 \[16, 16, 3\], not uint8 \[F"),
    (Task.I2I, {"frames": FRAMES[:1] * 1.0}, "image", "image is float64 .*, not uint8"),
    (Task.I2I, {"mask": MASK[:8]}, "mask", "mask is 16 x 8 pixels; this model takes 16 x 16"),
    (Task.I2I, {"mask": MASK[None]}, "mask", r"mask is bool \[1, 16, 16\], not bool \[H, W\]"),
    (Task.I2I, {"mask": MASK * 255}, "mask", "mask is int64 .*, not bool"),
    (Task.TI2I, {"mask": ~MASK}, "mask", "mask is False everywhere"),
    (Task.S2I, {"sketch": None}, "sketch", "sketch is missing; task S2I needs one"),
    (Task.S2I, {"sketch": SKETCH}, "sketch", "sketch has 3 frames, not the 1 asked for"),
    (Task.S2V, {"sketch": SKETCH[:2]}, "sketch", "sketch has 2 frames, not the 3 asked for"),
    (Task.S2V, {"frame_count": 2}, "sketch", "sketch has 3 frames, not the 2 asked for"),
    (Task.S2I, {"sketch": SKETCH[:1, :8]}, "sketch", "sketch is 16 x 8 pixels.* takes 16 x 16"),
    (Task.S2I, {"sketch": SKETCH[0]}, "sketch", r"sketch is uint8 \[16, 16\], not uint8 \[F, H"),
    (Task.S2I, {"sketch": SKETCH[:1] * 1.0}, "sketch", "sketch is float64 .*, not uint8"),
    (
        Task.S2V,
        {"sketch": UNKNOWN},
        "sketch",
        "sketch has class id 5 at column 3, row 2 of frame 1; this model's class ids are 0 to 4",
    ),
    (Task.S2I, {"frames": FRAMES[:1]}, "image", "task S2I takes no image"),
    (Task.S2V, {"mask": MASK}, "mask", "task S2V takes no mask"),
    (Task.T2I, {"sample_index": -1}, "sampling.sample_index", "sample_index -1 is not in"),
    (Task.T2I, {"sample_index": 2**32}, "sampling.sample_index", "4294967296 is not in"),
]


@pytest.fixture(scope="module")
def engine(tiny_bundle):
    return tiny_engine(tiny_bundle, slots=1)


def test_a_prompt_that_fills_the_text_encoder_passes(engine):
    engine.check(GenerationRequest(Task.T2I, "x" * 74))


@pytest.mark.parametrize("task", GOOD)
def test_a_sensible_request_passes(engine, task):
    engine.check(GenerationRequest(task, **GOOD[task]))


@pytest.mark.parametrize(("task", "change", "field", "message"), BAD)
def test_a_bad_request_is_refused(engine, task, change, field, message):
    with pytest.raises(ValueError, match=message) as caught:
        engine.check(GenerationRequest(task, **(GOOD[task] | change)))
    assert isinstance(caught.value, FieldError) and caught.value.field == field


def test_only_prediction_goes_beyond_the_trained_length(tiny_bundle, tmp_path):
    folder = bundle_for(tiny_bundle, (Task.T2I, Task.T2V), tmp_path / "bundle")
    info = model_info(open_bundle(folder), "none", "nothing")
    assert (info.max_frames, info.max_predicted_frames) == (3, 3)


def test_a_task_that_the_bundle_lacks(plain_bundle):
    engine = tiny_engine(plain_bundle, slots=1)
    for task in (Task.I2I, Task.S2V):
        said = f"this bundle cannot do {task.name}; it can do T2I, T2V, V2V"
        with pytest.raises(UnsupportedTaskError, match=re.escape(said)):
            engine.check(GenerationRequest(task))
