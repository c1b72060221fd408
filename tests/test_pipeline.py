"""The whole way on a tiny model: checkpoint, bundle, server process without torch, client."""

import os
import re
import signal
import subprocess
import sys

import grpc
import numpy as np
import pytest

from nuwa.runtime import media
from nuwa.runtime.client import Client, ClientError
from nuwa.spec.grid import Grid
from nuwa.spec.palette import voc_palette
from nuwa.spec.plan import decode_plan

PROMPT = "a red digit 3 moves left to right on black"
SEEDS = (0, 1, 2, 3, 2**40)
# The server's process as it is where only the base dependencies are installed.
SERVE = """
import sys
for name in ("torch", "onnx", "onnxscript", "safetensors"):
    sys.modules[name] = None
from nuwa.runtime.cli import main
sys.exit(main(["serve", sys.argv[1], "--port", "0", "--threads", "1"]))
"""


@pytest.fixture(scope="module")
def server(tiny_bundle):
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(tiny_bundle)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    line = process.stdout.readline()
    found = re.search(r"ready on (\S+): tiny .*loaded in [\d.]+ s, \d+ MB", line)
    assert found, line
    yield found.group(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0


@pytest.fixture(scope="module")
def client(server):
    with Client(server) as client:
        yield client


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    from nuwa.training.checkpoint import load_checkpoint

    return load_checkpoint(tiny_checkpoint)


def torch_tokens(checkpoint, frames: int, seed: int, prompt: str = PROMPT, **options):
    """The tokens of PyTorch's reference loop, in raster order."""
    import torch

    from nuwa.training.decode import generate

    ids = torch.from_numpy(checkpoint.text_tokenizer.encode(prompt)[None].astype(np.int64))
    none = torch.from_numpy(checkpoint.text_tokenizer.encode("none")[None].astype(np.int64))
    grid = Grid(frames, 4, 4)
    tokens = generate(checkpoint.nuwa, ids, grid, seeds=[seed], unconditional_1M=none, **options)
    return tokens.numpy().reshape(grid.shape)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("schedule", ["wave", "raster"])
def test_served_tokens_are_pytorchs(client, checkpoint, seed, schedule):
    """The same tokens from PyTorch raster decoding, and over gRPC in waves and in raster order."""
    decoder = checkpoint.config.decoder
    options = {"seed": seed, "schedule": schedule, "include_tokens": True, "temperature": 0.9}
    image = client.generate_image("t2i", PROMPT, **options)
    expected = torch_tokens(checkpoint, 1, seed, kind="raster", temperature=0.9)
    assert (image.tokens == expected[0]).all()
    assert image.timings.steps == decode_plan(decoder, Grid(1, 4, 4), schedule).steps
    clip = client.generate_video("t2v", PROMPT, **options)
    expected = torch_tokens(checkpoint, 3, seed, kind="raster", temperature=0.9)
    assert (clip.tokens == expected).all()
    assert clip.timings.steps == decode_plan(decoder, Grid(3, 4, 4), schedule).steps


def test_guided_and_filtered_tokens_are_pytorchs(client, checkpoint):
    clip = client.generate_video(
        "t2v", PROMPT, seed=7, guidance_scale=2.0, top_k=20, top_p=0.9, include_tokens=True
    )
    expected = torch_tokens(checkpoint, 3, 7, guidance=2.0, top_k=20, top_p=0.9)
    assert (clip.tokens == expected).all()


def test_pixels_are_the_detokenizers(client, checkpoint):
    import torch

    from nuwa.training.vqgan import to_bytes

    clip = client.generate_video("t2v", PROMPT, seed=1, include_tokens=True)
    with torch.no_grad():
        pixels = to_bytes(checkpoint.vqgan.decode(torch.from_numpy(clip.tokens).long())).numpy()
    # Rounding to bytes may tip over where the two runtimes differ in the last bit.
    assert np.abs(clip.frames.astype(int) - pixels).max() <= 1


def test_prediction_keeps_what_is_given(client):
    clip = client.generate_video("t2v", PROMPT, seed=1)
    first = clip.frames[:1]
    predicted = client.generate_video("v2v", video=first, frame_count=3, seed=2)
    assert predicted.frames.shape == clip.frames.shape
    assert (predicted.frames[:1] == first).all()


@pytest.mark.parametrize("kind", ["ids", "colours", "file"])
def test_a_sketch_in_any_form_gives_pytorchs_tokens(client, checkpoint, kind):
    import torch

    from nuwa.training.vqgan import one_hot

    maps = np.random.default_rng(0).integers(0, 5, (3, 4, 4), np.uint8)
    maps = maps.repeat(4, axis=1).repeat(4, axis=2)
    colours = voc_palette(5)[maps]
    given = {
        "ids": (maps[0], maps),
        "colours": (
            media.encode_picture(colours[0], "png"),
            media.encode_animation(colours, "gif"),
        ),
        "file": tuple(
            media.encode_animation(np.repeat(m[..., None], 3, axis=-1), "webp")
            for m in (maps[:1], maps)
        ),
    }[kind]
    with torch.no_grad():
        codes = checkpoint.sketch_vqgan.encode(one_hot(torch.from_numpy(maps), 5)).codes
    visual = codes.reshape(1, -1) + checkpoint.config.image.codebook_size
    options = {"seed": 3, "include_tokens": True, "guidance_scale": 2.0}
    image = client.generate_image("s2i", PROMPT, sketch=given[0], **options)
    expected = torch_tokens(checkpoint, 1, 3, guidance=2.0, visual_BN=visual[:, :16])
    assert (image.tokens == expected[0]).all()
    clip = client.generate_video("s2v", PROMPT, sketch=given[1], **options)
    assert (clip.tokens == torch_tokens(checkpoint, 3, 3, guidance=2.0, visual_BN=visual)).all()


def test_edits_return_what_lies_outside_the_box(client):
    clip = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
    outside = np.ones((16, 16), bool)
    outside[4:16, 0:8] = False
    options = {"mask": [(0, 4, 8, 12)], "seed": 2}
    made = [
        client.generate_image("i2i", image=clip[0], **options).pixels[None],
        client.generate_image("ti2i", PROMPT, image=clip[0], **options).pixels[None],
        client.generate_video("tv2v", PROMPT, video=clip, **options).frames,
    ]
    for frames in made:
        same = frames == clip[: len(frames)]
        assert same[:, outside].all() and not same[:, ~outside].all()


def test_errors_are_clear_and_the_server_serves_on(client):
    attempts = [
        (lambda: client.generate_image("s2i", sketch=np.full((16, 16), 9, np.uint8)), "INVALID"),
        (lambda: client.generate_image("t2i", ""), "INVALID_REQUEST"),
        (lambda: client.generate_image("t2i", PROMPT, temperature=-1.0), "INVALID_REQUEST"),
        (lambda: client.generate_video("t2v", PROMPT, frame_count=99), "INVALID_REQUEST"),
    ]
    for attempt, reason in attempts:
        with pytest.raises(ClientError) as caught:
            attempt()
        assert caught.value.reason.startswith(reason)
        assert caught.value.code in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.FAILED_PRECONDITION,
        )
        assert client.generate_image("t2i", PROMPT, seed=1).pixels.shape == (16, 16, 3)


def test_any_text_is_a_prompt(client):
    for prompt in ("<bos> <eos>", "größer 日本 😀", "x" * 74):
        assert client.generate_image("t2i", prompt, seed=1).pixels.shape == (16, 16, 3)


def test_a_text_that_would_be_cut_is_refused(client):
    with pytest.raises(ClientError, match="4001 tokens; the model reads at most 75") as failure:
        client.generate_image("t2i", "x" * 4000)
    assert list(failure.value.fields) == ["prompt"]
