"""The clients of chaos.py: what they ask for, how they misbehave, and what becomes of it.

Some ask over nuwa.v1, some over streams of the Open Inference Protocol (KServe v2). For a seed both
have to give the same, so that an answer is known by what was asked for, however it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from typing import Any

import grpc
import grpc.aio
import numpy as np

from nuwa.inference import grpc_service_pb2 as inference
from nuwa.inference import grpc_service_pb2_grpc
from nuwa.runtime.kserve.tensors import set_parameters
from nuwa.v1 import generation_pb2 as pb
from nuwa.v1 import generation_pb2_grpc

BAD = 0.3
OVER_KSERVE = 0.3
RIGHT, WRONG = "right", "WRONG"
KINDS = ("cancel", "disconnect", "deadline", "slow reader", "unread answer")
LATE = "late request"  # of a stream of KServe, beside one that has to be right even so
EXPECTED = (  # of who misbehaves: cancelled, too late, or told so at once
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
NOT_SENT = "Internal error from Core"  # of grpc.aio, if a call is over before its request is sent
FAULT = "internal error"  # of a message within a stream, which has no status
OWN = ("grpc.use_local_subchannel_pool", 1)  # a connection that no other channel shares
PROMPTS = {
    "image": "a red 3 on a black background .",
    "clip": "a red 3 on a black background moving up .",
}
V1, KSERVE = "/nuwa.v1.GenerationService", "/inference.GRPCInferenceService"
TASKS = {"image": "t2i", "clip": "t2v"}
SEEDS = 6
FRAMES = 4
SCALE = 8  # of the clips of nuwa.v1, so that they are too large for who does not read
AT_A_TIME = 8
SLOW_READER_TIMEOUT = 2.0

Digests = dict[str, str]  # of answers, by what was asked for


@dataclass(frozen=True)
class Place:
    """Where there is something to ask, and what; frames: the most of a clip."""

    address: str
    model: str
    frames: int


class FailedError(Exception):
    """What a stream answers in place of a result."""


def digest(frames: Iterable[tuple[Any, np.ndarray]]) -> str:
    """Of the tokens and the pixels of each."""
    found = hashlib.sha256()
    for tokens, pixels in frames:
        found.update(np.asarray(tokens, "<i4").tobytes())
        found.update(np.ascontiguousarray(pixels).tobytes())
    return found.hexdigest()


class OverV1:
    """Asks over nuwa.v1."""

    ASKED = ("image", "stream", "clip")
    KINDS = KINDS
    PREFIX = ""  # of what became of requests
    # Of who does not read: a clip is then more than gRPC keeps for the connection.
    WINDOW = 65536

    def __init__(self, channel: grpc.aio.Channel, place: Place) -> None:
        self._channel = channel
        self._stub = generation_pb2_grpc.GenerationServiceStub(channel)

    async def ask(self, kind: str, seed: int, timeout: float = 60.0) -> Digests:
        """A whole answer."""
        if kind == "image":
            answer = await self._stub.GenerateImage(self._image(seed), timeout=timeout)
            return {"image": self._digest([answer.frame])}
        frames = []
        if kind == "stream":
            request = pb.StreamImageRequest(image=self._image(seed), preview_count=4)
            async for event in self._stub.StreamImage(request, timeout=timeout):
                if event.HasField("sample"):
                    frames.append(event.sample.frame)
            return {"image": self._digest(frames)}
        async for event in self._stub.GenerateVideo(self._clip(seed), timeout=timeout):
            if event.HasField("frame"):
                frames.append(event.frame.frame)
        return {"clip": self._digest(frames, SCALE)}

    def begin(self, seed: int) -> Any:
        """A call for a clip."""
        return self._stub.GenerateVideo(self._clip(seed))

    async def begin_slowly(self, seed: int) -> Any:
        """The same, of which one frame has been read."""
        call = self.begin(seed)
        while not (await call.read()).HasField("frame"):
            pass
        return call

    def leave_unread(self, seed: int) -> Any:
        """A call with one answer, which nobody takes: gRPC's own takes it for its caller."""
        request = self._image(seed)
        request.output.scale_factor = SCALE
        return self._channel.unary_stream(f"{V1}/GenerateImage", type(request).SerializeToString)(
            request
        )

    @staticmethod
    def _image(seed: int) -> pb.GenerateImageRequest:
        return pb.GenerateImageRequest(
            task=pb.TASK_T2I,
            prompt=PROMPTS["image"],
            sampling=pb.Sampling(seed=seed),
            output=pb.Output(include_tokens=True, format=pb.IMAGE_FORMAT_RAW_RGB),
        )

    @staticmethod
    def _clip(seed: int) -> pb.GenerateVideoRequest:
        return pb.GenerateVideoRequest(
            task=pb.TASK_T2V,
            prompt=PROMPTS["clip"],
            frame_count=FRAMES,
            sampling=pb.Sampling(seed=seed),
            output=pb.Output(
                include_tokens=True, format=pb.IMAGE_FORMAT_RAW_RGB, scale_factor=SCALE
            ),
        )

    @staticmethod
    def _digest(frames: list[pb.Frame], scale: int = 1) -> str:
        """Without the scale; a frame may come in pieces."""
        pieces: dict[int, list[pb.Frame]] = {}
        for frame in frames:
            pieces.setdefault(frame.index, []).append(frame)
        found = []
        for first, *rest in pieces.values():
            data = b"".join(piece.data for piece in (first, *rest))
            pixels = np.frombuffer(data, np.uint8).reshape(first.height, first.width, 3)
            found.append((first.token_grid.tokens, pixels[::scale, ::scale]))
        return digest(found)


class OverKServe:
    """Asks over a stream of KServe v2."""

    ASKED = ("image", "clip", "both")
    KINDS = (*KINDS, LATE)
    PREFIX = "kserve "
    WINDOW = 1024  # clips are not scaled here

    def __init__(self, channel: grpc.aio.Channel, place: Place) -> None:
        self._channel = channel
        self._stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        self._place = place

    async def ask(self, kind: str, seed: int, timeout: float = 60.0) -> Digests:
        """Whole answers: to one request, or to two side by side."""
        asked = ("image", "clip") if kind == "both" else (kind,)
        found, failed = await self._answers([self._request(each, seed) for each in asked], timeout)
        if failed:
            raise FailedError("; ".join(failed.values()))
        return found

    async def ask_beside_late(self, seed: int, seconds: float) -> Digests:
        """A clip, in a stream with a request for another one in so short a time."""
        late = self._request("clip", seed, timeout=1 + round(1e6 * seconds))
        late.id = LATE
        found, failed = await self._answers([late, self._request("clip", seed)], 60.0)
        problems = [told for name, told in failed.items() if name != LATE or FAULT in told]
        if problems:
            raise FailedError("; ".join(problems))
        return {"clip": found["clip"]}

    def begin(self, seed: int, **parameters: int) -> Any:
        """A stream in which a clip is asked for, and which goes on."""
        return self._stub.ModelStreamInfer(_kept_open(self._request("clip", seed, **parameters)))

    async def begin_slowly(self, seed: int) -> Any:
        """The same with the longest clip, of which one frame has been read."""
        call = self.begin(seed, frame_count=self._place.frames)
        await call.read()
        return call

    def leave_unread(self, seed: int) -> Any:
        """A call for a clip in one answer, which nobody takes."""
        request = self._request("clip", seed)
        return self._channel.unary_stream(f"{KSERVE}/ModelInfer", type(request).SerializeToString)(
            request
        )

    def _request(self, what: str, seed: int, **parameters: int) -> inference.ModelInferRequest:
        text, clip = PROMPTS[what].encode(), what == "clip"
        request = inference.ModelInferRequest(
            model_name=f"{self._place.model}_{TASKS[what]}", id=what
        )
        request.inputs.add(name="PROMPT", datatype="BYTES", shape=[1])
        request.raw_input_contents.append(len(text).to_bytes(4, "little") + text)
        for name in ("VIDEO" if clip else "IMAGE", "TOKENS"):
            request.outputs.add(name=name)
        frames = {"frame_count": FRAMES} if clip else {}
        set_parameters(request.parameters, {"seed": seed} | frames | parameters)
        return request

    async def _answers(
        self, requests: Sequence[inference.ModelInferRequest], timeout: float
    ) -> tuple[Digests, dict[str, str]]:
        """(answers, messages of the requests that failed), both by the requests' ids."""
        found: dict[str, list[tuple[Any, np.ndarray]]] = {each.id: [] for each in requests}
        failed = {}
        async for each in self._stub.ModelStreamInfer(iter(requests), timeout=timeout):
            response = each.infer_response
            if each.error_message:
                failed[response.id] = each.error_message
                continue
            data = [
                np.frombuffer(raw, dtype).reshape(output.shape)
                for raw, dtype, output in zip(
                    response.raw_output_contents, ("u1", "<i4"), response.outputs, strict=True
                )
            ]
            found[response.id] += zip(data[1], data[0], strict=True)
        return {name: digest(frames) for name, frames in found.items()}, failed


async def _kept_open(*requests: Any) -> AsyncIterator[Any]:
    """The requests of a client that would go on."""
    for request in requests:
        yield request
    await asyncio.Event().wait()


Over = OverV1 | OverKServe


async def misbehave(place: Place, over: Over, how: str, seed: int, draw: random.Random) -> str:
    """One request that does not end well; what became of it."""
    delay = draw.uniform(0.0, 0.4)
    try:
        if how == "deadline":
            await over.ask("clip", seed, timeout=delay + 0.001)
        elif how == "cancel":
            await asyncio.wait_for(over.ask("clip", seed), delay)
        elif how == "disconnect":
            async with grpc.aio.insecure_channel(place.address, [OWN]) as channel:
                call = type(over)(channel, place).begin(seed)
                await asyncio.wait([asyncio.create_task(call.read())], timeout=delay)
        else:
            options = [("grpc.http2.lookahead_bytes", over.WINDOW), ("grpc.http2.bdp_probe", 0)]
            async with grpc.aio.insecure_channel(place.address, [*options, OWN]) as channel:
                slow = type(over)(channel, place)
                reads = how == "slow reader"
                call = await slow.begin_slowly(seed) if reads else slow.leave_unread(seed)
                await asyncio.sleep(SLOW_READER_TIMEOUT * draw.uniform(0.5, 2.0))
                call.cancel()
    except grpc.aio.AioRpcError as error:
        if error.code() not in EXPECTED and error.details() != NOT_SENT:
            return f"{how}: {error.code().name}"
    except FailedError as error:
        if FAULT in str(error):
            return f"{how}: {error}"
    except (TimeoutError, asyncio.CancelledError):
        pass
    return how


async def behave(over: Over, kind: str, seed: int, expected: Digests, draw: random.Random) -> str:
    """One request, and whether its answer is right."""
    if kind == LATE:
        assert isinstance(over, OverKServe), "nuwa.v1 has one request a call"
        found = await over.ask_beside_late(seed, draw.uniform(0.0, 0.4))
    else:
        found = await over.ask(kind, seed)
    right = all(told == expected[f"{what} {seed}"] for what, told in found.items())
    return (LATE if kind == LATE else RIGHT) if right else WRONG


async def client(
    place: Place, requests: int, seed: int, expected: Digests, told: Queue[str]
) -> None:
    draw, room = random.Random(seed), asyncio.Semaphore(AT_A_TIME)
    async with grpc.aio.insecure_channel(place.address, [OWN]) as channel:
        both = OverV1(channel, place), OverKServe(channel, place)

        async def one() -> None:
            async with room:
                over, number = both[draw.random() < OVER_KSERVE], draw.randrange(SEEDS)
                bad = draw.random() < BAD
                kind = draw.choice(over.KINDS if bad else over.ASKED)
                try:
                    if bad and kind != LATE:
                        became = await misbehave(place, over, kind, number, draw)
                    else:
                        became = await behave(over, kind, number, expected, draw)
                    told.put(over.PREFIX + became)
                except (grpc.aio.AioRpcError, FailedError) as error:
                    status = isinstance(error, grpc.aio.AioRpcError)
                    told.put(over.PREFIX + (error.code().name if status else str(error)))
                    await asyncio.sleep(0.05)

        await asyncio.gather(*(one() for _ in range(requests)))


def run_client(
    place: Place, requests: int, seed: int, expected: Digests, told: Queue[str], done: Event
) -> None:
    asyncio.run(client(place, requests, seed, expected, told))
    done.set()


async def find_place(address: str) -> Place:
    """The server's first model."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        model = (await stub.GetModel(pb.GetModelRequest())).model
        return Place(address, model.name, model.max_frame_count)


async def references(place: Place) -> Digests:
    """What requests give, asked over nuwa.v1 one at a time."""
    found: Digests = {}
    async with grpc.aio.insecure_channel(place.address) as channel:
        over = OverV1(channel, place)
        for seed in range(SEEDS):
            for kind in ("image", "clip"):
                answer = await over.ask(kind, seed)
                found |= {f"{what} {seed}": told for what, told in answer.items()}
    return found
