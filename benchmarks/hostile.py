"""What fuzz.py throws: valid requests and files to begin with, files that lie, and mutations.

Of a draw and its seeds alone, so that each can be had again.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from google.protobuf.message import Message
from PIL import Image

from nuwa.inference import grpc_service_pb2 as kserve
from nuwa.runtime import media
from nuwa.runtime.kserve.tensors import set_parameters
from nuwa.v1 import generation_pb2 as pb

SIDE, FRAMES, CLASSES = 16, 4, 5  # of the pictures that requests give
INTERESTING = (0, 1, 2, 3, 7, 8, 16, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**63 - 1)

Draw = np.random.Generator
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def pictures() -> dict[str, bytes]:
    """Small valid files of every kind that is read."""
    draw = np.random.default_rng(0)
    picture = draw.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    clip = draw.integers(0, 256, (FRAMES, SIDE, SIDE, 3), np.uint8)
    ids = draw.integers(0, CLASSES, (SIDE, SIDE), np.uint8)
    files = {kind: media.encode_picture(picture, kind) for kind in ("png", "webp", "gif")}
    for kind in ("webp", "gif"):
        files[f"animated {kind}"] = media.encode_animation(clip, kind, 8, 1)
    for name, image, options in (
        ("jpeg", Image.fromarray(picture), {"format": "JPEG", "quality": 80}),
        ("progressive jpeg", Image.fromarray(picture), {"format": "JPEG", "progressive": True}),
        ("grey png", Image.fromarray(ids), {"format": "PNG"}),
        ("palette png", Image.fromarray(ids).convert("P"), {"format": "PNG"}),
        ("rgba png", Image.fromarray(picture).convert("RGBA"), {"format": "PNG"}),
        ("interlaced", Image.fromarray(picture), {"format": "GIF", "interlace": True}),
    ):
        file = io.BytesIO()
        image.save(file, **options)
        files[name] = file.getvalue()
    file = io.BytesIO()
    first, *rest = (Image.fromarray(frame) for frame in clip)
    first.save(file, format="PNG", save_all=True, append_images=rest)
    files["animated png"] = file.getvalue()
    return files


def v1_requests(files: dict[str, bytes]) -> tuple[list[bytes], list[bytes]]:
    """Valid requests for an image, and for a clip."""
    raw = pb.RawFrames(data=bytes(3 * SIDE * SIDE), frame_count=1, height=SIDE, width=SIDE)
    ids = pb.RawFrames(data=bytes(SIDE * SIDE), frame_count=1, height=SIDE, width=SIDE)
    boxes = pb.Mask(boxes=pb.BoxList(boxes=[pb.Box(left=1, top=2, width=5, height=6)]))
    drawn = pb.Mask(picture=pb.Media(encoded=files["grey png"]))
    sampling = pb.Sampling(temperature=0.5, top_k=3, top_p=0.9, guidance_scale=2, seed=4)
    output = pb.Output(format=pb.IMAGE_FORMAT_RAW_RGB, scale_factor=2, include_tokens=True)
    images = [
        pb.GenerateImageRequest(task=pb.TASK_T2I, prompt="a 3", sampling=sampling, output=output),
        pb.GenerateImageRequest(task=pb.TASK_S2I, sketch=pb.Media(raw=ids), request_id="mine"),
        pb.GenerateImageRequest(task=pb.TASK_S2I, sketch=pb.Media(encoded=files["palette png"])),
        pb.GenerateImageRequest(
            task=pb.TASK_TI2I, prompt="ein Ä", image=pb.Media(encoded=files["png"]), mask=boxes
        ),
        *(
            pb.GenerateImageRequest(task=pb.TASK_I2I, image=pb.Media(encoded=file), mask=drawn)
            for file in files.values()
        ),
        pb.GenerateImageRequest(
            task=pb.TASK_I2I, image=pb.Media(raw=raw), mask=boxes, sample_count=2, model="fuzz/1"
        ),
    ]
    clips = [
        pb.GenerateVideoRequest(
            task=pb.TASK_T2V, prompt="a 3", frame_count=2, animation_format=1, frames_per_second=4
        ),
        pb.GenerateVideoRequest(task=pb.TASK_S2V, sketch=pb.Media(encoded=files["animated gif"])),
        *(
            pb.GenerateVideoRequest(
                task=pb.TASK_V2V, video=pb.Media(encoded=files[f"animated {kind}"]), frame_count=9
            )
            for kind in ("png", "webp", "gif")
        ),
        pb.GenerateVideoRequest(
            task=pb.TASK_TV2V, prompt="a 3", video=pb.Media(encoded=files["png"]), mask=boxes
        ),
    ]
    return [each.SerializeToString() for each in images], [
        each.SerializeToString() for each in clips
    ]


def kserve_requests(files: dict[str, bytes]) -> list[bytes]:
    found = []
    text, png = b"a 3", files["png"]
    for task, inputs, parameters in (
        ("t2i", {"PROMPT": ("BYTES", [1], _element(text))}, {"seed": 3, "top_p": 0.5}),
        ("t2v", {"PROMPT": ("BYTES", [1], _element(text))}, {"frame_count": 2, "timeout": 10**6}),
        ("s2i", {"SKETCH": ("UINT8", [SIDE, SIDE], bytes(SIDE * SIDE))}, {"schedule": "wave"}),
        (
            "ti2i",
            {
                "PROMPT": ("BYTES", [1], _element(text)),
                "IMAGE": ("BYTES", [1], _element(png)),
                "MASK": ("BOOL", [SIDE, SIDE], b"\1" * SIDE * SIDE),
            },
            {"sample_count": 2},
        ),
        ("v2v", {"VIDEO": ("UINT8", [2, SIDE, SIDE, 3], bytes(2 * SIDE * SIDE * 3))}, {}),
    ):
        request = kserve.ModelInferRequest(model_name=f"fuzz_{task}", id="mine")
        set_parameters(request.parameters, parameters)
        for name, (datatype, shape, data) in inputs.items():
            request.inputs.add(name=name, datatype=datatype, shape=shape)
            request.raw_input_contents.append(data)
        found.append(request.SerializeToString())
    typed = kserve.ModelInferRequest(model_name="fuzz_t2i")
    typed.inputs.add(
        name="PROMPT", datatype="BYTES", shape=[1], contents={"bytes_contents": [text]}
    )
    return [*found, typed.SerializeToString()]


def _element(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


def bombs() -> Iterator[bytes]:
    """Small files that say that they are huge, or are costly to read."""
    for width, height in ((2**31 - 1, 2**31 - 1), (2**16, 2**16), (20000, 20000), (0, 5)):
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        body = zlib.compress(bytes(2**20), 9)
        yield _SIGNATURE + _chunk(b"IHDR", head) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")
    text = zlib.compress(bytes(2**24), 9)  # a comment that unpacks to 16 MiB
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    yield (
        _SIGNATURE
        + _chunk(b"IHDR", head)
        + _chunk(b"zTXt", b"x\0\0" + text)
        + _chunk(b"IDAT", zlib.compress(bytes((3 * SIDE + 1) * SIDE)))
        + _chunk(b"IEND", b"")
    )
    frame = Image.new("P", (SIDE, SIDE))
    file = io.BytesIO()
    frame.save(
        file,
        format="GIF",
        save_all=True,
        append_images=[Image.new("P", (SIDE, SIDE), n % 255) for n in range(500)],
    )
    yield file.getvalue()
    yield from _costly()


def _costly() -> Iterator[bytes]:
    """Valid but for what lies between the parts that matter, each of which Pillow takes in."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0))
    text = zlib.compress(b"a" * 2**20 + "\U0001f600".encode(), 9)  # a MiB, of which it makes four
    texts = b"".join(_chunk(b"iTXt", b"%d\0\1\0\0\0" % index + text) for index in range(60))
    pixels = _chunk(b"IDAT", zlib.compress(bytes((3 * SIDE + 1) * SIDE)))
    yield _SIGNATURE + head + texts + pixels + _chunk(b"IEND", b"")

    still = pictures()["gif"]
    place = still.index(b"," + struct.pack("<HHHH", 0, 0, SIDE, SIDE))
    screen, frame = still[:place], still[place:-1]
    vast = frame[:5] + struct.pack("<HH", 13_300, 13_300) + frame[9:]
    yield screen + frame + b"!\xf9\4\x08\0\0\0\0" + vast + frame + b";"  # to be filled
    yield screen + (b"!\xfe" + b"\1a" * 1000 + b"\0") * 50 + frame + b";"

    photo = pictures()["jpeg"]
    for more in (
        (b"\xff\xe1\0\x16Exif\0\0" + bytes(14)) * 5000,
        b"\xff" * 100_000,
        b"\xff\xfe\0\2" + bytes(100_000),
    ):
        yield photo[:2] + more + photo[2:]
    photo = pictures()["progressive jpeg"]
    yield photo[:-2] + photo[photo.rindex(b"\xff\xda") : -2] * 1000 + photo[-2:]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def mutated(draw: Draw, seeds: list[bytes]) -> bytes:
    """One of the seeds, changed in up to eight places; now and then as it is."""
    data = bytearray(seeds[draw.integers(len(seeds))])
    for _ in range(int(draw.integers(0, 9))):
        if not data:
            break
        at, kind = int(draw.integers(len(data))), int(draw.integers(8))
        size = int(draw.integers(1, 1 + min(64, len(data))))
        if kind == 0:
            data[at] ^= 1 << int(draw.integers(8))
        elif kind == 1:
            data[at] = int(draw.integers(256))
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = draw.integers(0, 256, size, np.uint8).tobytes()
        elif kind == 4:
            data[at:at] = data[at : at + size] * int(draw.integers(1, 5))
        elif kind == 5:
            del data[at:]
        elif kind == 6:
            other = seeds[draw.integers(len(seeds))]
            start = int(draw.integers(len(other))) if other else 0
            data[at:at] = other[start : start + 4 * size]
        else:
            value = INTERESTING[int(draw.integers(len(INTERESTING)))]
            width = int(draw.choice([1, 2, 4, 8, 10]))
            data[at : at + width] = (
                _varint(value) if width == 10 else (value % 256**width).to_bytes(width, "little")
            )
    return bytes(data)


def swollen(draw: Draw, seeds: list[bytes]) -> bytes:
    """One of the seeds with one small field behind it up to a million times, or with a number, or
    a length, of up to a million bytes.
    """
    number, length = int(draw.integers(1, 20)), int(draw.integers(0, 4))
    if draw.random() < 0.25:
        endless = int(2 ** draw.uniform(0, 20)) * b"\xff"
        kind = int(draw.choice((0, 2)))
        return seeds[draw.integers(len(seeds))] + _varint(number << 3 | kind) + endless
    inner = (b"", b"\x0a", b"\x2a\x00", b"\x0a\x01a")[length]  # with and without a field of its own
    field = _varint(number << 3 | 2) + _varint(len(inner)) + inner
    times = int(2 ** draw.uniform(0, 20))
    return seeds[draw.integers(len(seeds))] + times * field


def restructured(draw: Draw, seeds: list[bytes], kind: type[Message]) -> bytes:
    """One of the seeds, messages of this kind, with up to four of its fields changed; what it is as
    a message stays so.
    """
    message = kind.FromString(seeds[draw.integers(len(seeds))])
    for _ in range(int(draw.integers(1, 5))):
        places = list(_fields(message))
        inside, field = places[draw.integers(len(places))]
        _change(draw, inside, field, seeds)
    return message.SerializeToString()


def _fields(message: Any) -> Iterator[tuple[Any, Any]]:
    """(message, field) of all fields there could be in what is set."""
    for field in message.DESCRIPTOR.fields:
        yield message, field
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for each in value if field.is_repeated else [value]:
            yield from _fields(each)


def _change(draw: Draw, message: Any, field: Any, seeds: list[bytes]) -> None:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        name = ("seed", "top_p", "timeout", "rank_by", "unknown")[draw.integers(5)]
        parameter = value[name]
        chosen = list(parameter.DESCRIPTOR.fields)[draw.integers(5)]
        setattr(parameter, chosen.name, _scalar(draw, chosen, seeds))
    elif field.message_type is not None:
        if field.is_repeated:
            many = int(draw.choice([0, 1, 2, 300]))
            del value[:many]
            for _ in range(many):
                value.add()
        elif draw.random() < 0.5:
            message.ClearField(field.name)
        else:
            value.SetInParent()
    elif field.is_repeated:
        for _ in range(int(draw.choice([1, 2, 300]))):
            value.append(_scalar(draw, field, seeds))
    else:
        setattr(message, field.name, _scalar(draw, field, seeds))


def _scalar(draw: Draw, field: Any, seeds: list[bytes]) -> Any:
    number = INTERESTING[int(draw.integers(len(INTERESTING)))] * int(draw.choice([-1, 1]))
    match field.cpp_type:
        case field.CPPTYPE_STRING if field.type == field.TYPE_BYTES:
            return mutated(draw, [*pictures_once(), *seeds])
        case field.CPPTYPE_STRING:
            texts = ("", "a 3", "\0", "\u202e", "é" * 5000, "../../etc/passwd", "%s%n", "fuzz/2")
            return texts[draw.integers(len(texts))]
        case field.CPPTYPE_BOOL:
            return bool(draw.integers(2))
        case field.CPPTYPE_DOUBLE | field.CPPTYPE_FLOAT:
            values = (0.0, -1.0, 0.5, 1.0, 1e-9, 1e30, float("inf"), float("nan"))
            return values[draw.integers(len(values))]
        case field.CPPTYPE_ENUM:
            return int(draw.integers(-2, 14))
        case field.CPPTYPE_INT32:
            return (number + 2**31) % 2**32 - 2**31
        case field.CPPTYPE_UINT32:
            return number % 2**32
        case field.CPPTYPE_UINT64:
            return number % 2**64
        case _:
            return number


@functools.cache
def pictures_once() -> list[bytes]:
    return list(pictures().values())


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
