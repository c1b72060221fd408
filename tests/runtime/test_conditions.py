"""Files of requests are judged by what they state: no frame is decoded that a task cannot use."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from nuwa.runtime import conditions, media
from nuwa.runtime.errors import FieldError
from nuwa.runtime.media import Limits
from nuwa.spec.tasks import Task
from nuwa.v1 import generation_pb2 as pb

from .fake_engine import FakeEngine
from .messages import CLIP, PICTURE

LONG = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8)
INFO = FakeEngine().info
BOX = pb.Mask(boxes=pb.BoxList(boxes=[pb.Box(width=4, height=4)]))


def apng(frames: np.ndarray) -> bytes:
    file = io.BytesIO()
    first, *others = map(Image.fromarray, frames)
    first.save(file, "PNG", save_all=True, append_images=others)
    return file.getvalue()


def files(frames: np.ndarray) -> dict[str, bytes]:
    made = {kind: media.encode_animation(frames, kind) for kind in media.ANIMATION_FORMATS}
    return made | {"png": apng(frames)}


def read(task: Task, **given) -> conditions.Conditions:
    kind = pb.GenerateVideoRequest if task.is_video else pb.GenerateImageRequest
    picture = "video" if task.is_video else "image"
    return conditions.read(kind(**given), picture, task, INFO, Limits())


@pytest.fixture
def unopened(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("the file was opened"))


@pytest.mark.parametrize("kind", ["webp", "gif", "png"])
def test_clips_are_refused_for_their_length_undecoded(kind, unopened):
    assert INFO.max_frames == 10
    too_long = pb.Media(encoded=files(LONG)[kind])
    for task, field in ((Task.V2V, "video"), (Task.S2V, "sketch")):
        with pytest.raises(FieldError, match="has 11 frames; the model takes 10 at most") as error:
            read(task, **{field: too_long})
        assert error.value.field == field
    with pytest.raises(FieldError, match="image has 11 frames; task I2I takes one"):
        read(Task.I2I, image=too_long, mask=BOX)


def test_a_mask_of_many_frames_is_refused_undecoded(monkeypatch):
    picture = pb.Media(encoded=media.encode_picture(PICTURE, "png"))
    mask = pb.Mask(picture=pb.Media(encoded=files(LONG)["gif"]))
    opened, read_file = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(1) or read_file(*a, **k))
    with pytest.raises(FieldError, match="has 11 frames; a mask is one picture") as error:
        read(Task.I2I, image=picture, mask=mask)
    assert error.value.field == "mask.picture.encoded" and opened == [1]  # the image


def test_the_size_is_told_before_the_length(unopened):
    wide = np.zeros((11, 8, 9, 3), np.uint8)
    with pytest.raises(FieldError, match="video is 9 x 8 pixels; this model takes 8 x 8"):
        read(Task.V2V, video=pb.Media(encoded=files(wide)["webp"]))


@pytest.mark.parametrize("kind", ["webp", "png"])
def test_clips_the_model_takes_are_read_whole(kind):
    frames = LONG[:10]
    found = read(Task.V2V, video=pb.Media(encoded=files(frames)[kind])).frames
    np.testing.assert_array_equal(found, frames)


def test_raw_frames_are_counted_too():
    raw = pb.RawFrames(data=CLIP.tobytes(), frame_count=3, height=8, width=8)
    with pytest.raises(FieldError, match="image has 3 frames; task I2I takes one"):
        read(Task.I2I, image=pb.Media(raw=raw), mask=BOX)
