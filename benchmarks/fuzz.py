"""Throws hostile messages and files at what reads them: `python benchmarks/fuzz.py`.

Mutations of valid requests (nuwa.v1 and the Open Inference Protocol), files and manifests go to the
functions that read them, and some of the requests to a server over gRPC. Whatever comes, there has
to be an error of the kinds that clients are told of, in bounded time and memory; anything else is
printed with what caused it, and the exit status is 1. Repeatable: case i follows from the seed.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message
from hardware import hardware
from hostile import (
    CLASSES,
    FRAMES,
    SIDE,
    bombs,
    kserve_requests,
    mutated,
    pictures,
    restructured,
    swollen,
    v1_requests,
)

from nuwa.inference import grpc_service_pb2 as kserve
from nuwa.runtime import convert, media
from nuwa.runtime.core import (
    GenerationRequest,
    ModelInfo,
    Pixels,
    SlotStep,
    UnsupportedTaskError,
    Until,
)
from nuwa.runtime.errors import FieldError, NotFoundError
from nuwa.runtime.host import Host
from nuwa.runtime.kserve.models import find
from nuwa.runtime.kserve.requests import read_request
from nuwa.runtime.media import Limits, MediaError
from nuwa.runtime.scheduler import Scheduler
from nuwa.runtime.server import Server
from nuwa.runtime.wire import reader
from nuwa.spec.manifest import BundleError, Manifest
from nuwa.spec.tasks import Task
from nuwa.v1 import generation_pb2 as pb

LIMITS = Limits(max_bytes=2**20, max_pixels=2**20, max_frames=64)
TOLD = (FieldError, UnsupportedTaskError, NotFoundError, MediaError, BundleError)
STATUSES = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
SLOWEST = 5.0  # seconds for one case
MOST_GROWTH = 512  # MiB of memory at its peak
SHARE_OF_MESSAGES = 0.8  # of requests that stay messages; the rest are any bytes
SHARE_OF_SWOLLEN = 0.02  # of requests that are tried as many small fields
OVER_GRPC = 50  # every so many requests go to a server too


class StillEngine:
    """Generates black frames at once: what is tried here is what comes before."""

    slots = 4
    room = 4
    rankers: dict[str, Any] = {}
    info = ModelInfo(
        name="fuzz",
        bundle_hash="0" * 64,
        tasks=tuple(Task),
        height=SIDE,
        width=SIDE,
        max_frames=FRAMES,
        max_predicted_frames=20,
        codebook_size=64,
        sketch_classes=CLASSES,
        parameter_count=1,
        precision="fp32",
        licence="none",
        backend="none",
        rankers=(),
        sampling={},
    )

    def __init__(self) -> None:
        self.requests: dict[int, GenerationRequest] = {}

    def check(self, request: GenerationRequest) -> None:
        """Takes everything."""

    def prepare(self, request: GenerationRequest) -> Any:
        return Nothing(request)

    def admit(self, prepared: Any, slot: int, sample_index: int) -> None:
        self.requests[slot] = prepared.request

    def step(self, until: Until | None = None) -> list[SlotStep]:
        tokens = np.zeros((2, 2), np.int32)
        return [
            SlotStep(slot, 1, 1, tuple((f, tokens) for f in range(request.frame_count)), True)
            for slot, request in self.requests.items()
        ]

    def unfinished(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((2, 2), np.int32), np.zeros((2, 2), bool)

    def release(self, slot: int) -> None:
        self.requests.pop(slot, None)

    def tokens(self, pixels: Pixels) -> np.ndarray:
        return np.zeros((len(pixels), 2, 2), np.int32)

    def pixels(self, tokens: np.ndarray) -> Pixels:
        return np.zeros((len(tokens), SIDE, SIDE, 3), np.uint8)


@dataclass
class Nothing:
    request: GenerationRequest

    def close(self) -> None:
        """Holds nothing."""


@dataclass(frozen=True)
class Target:
    """read(data): what is tried; seeds: valid inputs, of `kind` if they are messages; method: where
    it goes over gRPC.
    """

    name: str
    seeds: list[bytes]
    read: Callable[[bytes], Any]
    method: str | None = None
    kind: type[Message] | None = None


def targets(manifest: bytes) -> list[Target]:
    files, info = pictures(), StillEngine.info
    images, clips = v1_requests(files)
    read_image, read_video, read_infer = (
        reader(kind.FromString)
        for kind in (pb.GenerateImageRequest, pb.GenerateVideoRequest, kserve.ModelInferRequest)
    )
    host = Host(lambda path: StillEngine(), lambda engine, name: Scheduler(engine))
    host.add(StillEngine())

    def infer(data: bytes) -> None:
        request = read_infer(data)
        model = find(host, request.model_name, request.model_version)
        read_request(request, model, info, LIMITS)

    def image(data: bytes) -> None:
        convert.read_image_request(read_image(data), info, LIMITS)

    def video(data: bytes) -> None:
        convert.read_video_request(read_video(data), info, LIMITS)

    def file(data: bytes) -> None:
        problem: MediaError | None = None
        for read in (
            lambda: media.stated_shape(data, LIMITS),
            lambda: media.decode_mask(data, LIMITS),
            lambda: media.decode_class_map(data, CLASSES, LIMITS),
            lambda: media.decode_clip(data, LIMITS),
        ):
            try:
                read()
                problem = None
            except MediaError as error:
                problem = error
        if problem is not None:
            raise problem

    found = [
        Target(
            "image request",
            images,
            image,
            "/nuwa.v1.GenerationService/GenerateImage",
            pb.GenerateImageRequest,
        ),
        Target(
            "clip request",
            clips,
            video,
            "/nuwa.v1.GenerationService/GenerateVideo",
            pb.GenerateVideoRequest,
        ),
        Target(
            "infer request",
            kserve_requests(files),
            infer,
            "/inference.GRPCInferenceService/ModelInfer",
            kserve.ModelInferRequest,
        ),
        Target("file", [*files.values(), *bombs()], file),
    ]
    if manifest:
        found.append(Target("manifest", [manifest], lambda data: Manifest.from_json(_text(data))))
    return found


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BundleError("not UTF-8") from None


def run(count: int, seed: int, manifest: bytes) -> tuple[dict[str, Any], list[str]]:
    """(report, faults)."""
    tried, faults = targets(manifest), []
    outcomes: dict[str, Counter] = {each.name: Counter() for each in tried}
    slowest, started = 0.0, time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for each in tried:
        for data in each.seeds:  # the valid ones must be, or nothing is tried
            _one(each, data)
    with (
        Server(StillEngine(), max_media_bytes=2**20, max_media_pixels=2**20) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        calls = {each.name: _call(channel, each) for each in tried if each.method}
        for case in range(count):
            draw = np.random.default_rng((seed, case))
            target = tried[case % len(tried)]
            if target.kind is not None and draw.random() < SHARE_OF_SWOLLEN:
                data = swollen(draw, target.seeds)
            elif target.kind is not None and draw.random() < SHARE_OF_MESSAGES:
                data = restructured(draw, target.seeds, target.kind)
            else:
                data = mutated(draw, target.seeds)
            begun = time.perf_counter()
            try:
                outcome = _one(target, data)
            except Exception as error:
                outcome = "fault"
                faults.append(f"case {case}, {target.name}: {type(error).__name__}: {error}")
            if target.method and case // len(tried) % OVER_GRPC == 0:
                status = calls[target.name](data)
                outcomes[target.name][f"gRPC {status.name}"] += 1
                if status not in STATUSES:
                    faults.append(f"case {case}, {target.name}: status {status.name}")
            seconds = time.perf_counter() - begun
            slowest = max(slowest, seconds)
            if seconds > SLOWEST:
                faults.append(f"case {case}, {target.name}: {seconds:.1f} s")
            outcomes[target.name][outcome] += 1
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if growth > MOST_GROWTH:
        faults.append(f"memory grew by {growth:.0f} MiB at its peak")
    return {
        "cases": count,
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "slowest_case_seconds": slowest,
        "peak_growth_mib": growth,
        "faults": len(faults),
        "outcomes": {name: dict(found.most_common()) for name, found in outcomes.items()},
    }, faults


def _one(target: Target, data: bytes) -> str:
    try:
        target.read(data)
    except TOLD as error:
        return type(error).__name__
    return "read"


def _call(channel: grpc.Channel, target: Target) -> Callable[[bytes], grpc.StatusCode]:
    """Sends bytes as they are."""
    assert target.method is not None, "only requests are sent"
    streamed = target.method.endswith("GenerateVideo")
    make = channel.unary_stream if streamed else channel.unary_unary
    method = make(target.method, lambda data: data, lambda data: data)

    def call(data: bytes) -> grpc.StatusCode:
        try:
            answer = method(data, timeout=20)
            if streamed:
                list(answer)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    return call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="cases (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--bundle", help="folder whose manifest is mutated too")
    args = parser.parse_args()
    manifest = b""
    if args.bundle:
        with open(f"{args.bundle}/manifest.json", "rb") as file:
            manifest = file.read()
    report, faults = run(args.count, args.seed, manifest)
    report["hardware"] = hardware(1)
    for fault in faults[:20]:
        print(fault, file=sys.stderr)
    print(json.dumps(report, indent=2))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
