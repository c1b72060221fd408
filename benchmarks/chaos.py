"""Clients that behave badly: `python benchmarks/chaos.py BUNDLE --requests 10000`.

Client processes ask a server process for images, images with previews, and clips. Of their requests
30 % are cancelled, cut off with their connection, given a deadline that is too short, or not read;
now and then a whole client process is killed. Every answer that arrives is compared with what the
same request gave when the server was quiet. In the end no slot may be taken, nothing may wait,
memory may not grow any more in the second half (it does while threads come to be and the
allocator's pools fill), cancellations must have had their effect within a step and 20 ms (p95 of
both, by the server's own histograms), and some of those who do not read must have been cut off, by
the server's log. The last line is JSON; exit status 1 if something does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import multiprocessing
import os
import queue
import random
import signal
import sys
import time
from collections import Counter
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from hardware import hardware
from server_process import ServerProcess

from nuwa.v1 import generation_pb2 as pb
from nuwa.v1 import generation_pb2_grpc

BAD = 0.3
KINDS = ("cancel", "disconnect", "deadline", "slow reader")
EXPECTED = (  # of who misbehaves: cancelled, too late, or told so at once
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
ASKED = ("image", "stream", "clip")
# Of who does not read: a clip is then more than gRPC keeps for the connection.
SMALL_WINDOW = [
    ("grpc.http2.lookahead_bytes", 65536),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
PROMPT = "a red 3 on a black background"
SEEDS = 6
CLIENTS, AT_A_TIME = 4, 8
KILLED_EVERY = 5.0  # seconds
SLOW_READER_TIMEOUT = 2.0
LATE = 0.020  # seconds that a cancellation may take beside a step
MOST_GROWTH = 0.005  # of memory, in 1000 requests of the second half, by a line through it
QUEUES = 4 * CLIENTS  # of clients, the latest, that are read
READINGS = 60  # of memory, that are kept

Stub = generation_pb2_grpc.GenerationServiceStub


def image(seed: int) -> pb.GenerateImageRequest:
    return pb.GenerateImageRequest(
        task=pb.TASK_T2I,
        prompt=f"{PROMPT} .",
        sampling=pb.Sampling(seed=seed),
        output=pb.Output(include_tokens=True, format=pb.IMAGE_FORMAT_RAW_RGB),
    )


def clip(seed: int, frames: int = 4) -> pb.GenerateVideoRequest:
    return pb.GenerateVideoRequest(
        task=pb.TASK_T2V,
        prompt=f"{PROMPT} moving up .",
        frame_count=frames,
        sampling=pb.Sampling(seed=seed),
        output=pb.Output(include_tokens=True, format=pb.IMAGE_FORMAT_RAW_RGB, scale_factor=8),
    )


def digest(frames: list[pb.Frame]) -> str:
    found = hashlib.sha256()
    for frame in frames:
        found.update(str(list(frame.token_grid.tokens)).encode())
    return found.hexdigest()


async def ask(stub: Any, kind: str, seed: int, timeout: float | None = 60.0) -> str:
    """The tokens of a whole answer, as a digest."""
    if kind == "image":
        return digest([(await stub.GenerateImage(image(seed), timeout=timeout)).frame])
    frames = []
    if kind == "stream":
        request = pb.StreamImageRequest(image=image(seed), preview_count=4)
        async for event in stub.StreamImage(request, timeout=timeout):
            if event.HasField("sample"):
                frames.append(event.sample.frame)
        return digest(frames)
    async for event in stub.GenerateVideo(clip(seed), timeout=timeout):
        frame = event.frame.frame
        if event.HasField("frame") and frame.chunk_index == 0:
            frames.append(frame)
    return digest(frames)


async def misbehave(address: str, stub: Any, how: str, seed: int, draw: random.Random) -> str:
    """One request that does not end well; what became of it."""
    delay = draw.uniform(0.0, 0.4)
    try:
        if how == "deadline":
            await ask(stub, "clip", seed, timeout=delay + 0.001)
        elif how == "cancel":
            await asyncio.wait_for(ask(stub, "clip", seed), delay)
        elif how == "disconnect":
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(address, options) as channel:
                call = Stub(channel).GenerateVideo(clip(seed))
                await asyncio.wait([asyncio.create_task(call.read())], timeout=delay)
        else:
            async with grpc.aio.insecure_channel(address, SMALL_WINDOW) as channel:
                call = Stub(channel).GenerateVideo(clip(seed))
                while not (await call.read()).HasField("frame"):
                    pass
                await asyncio.sleep(SLOW_READER_TIMEOUT * draw.uniform(0.5, 2.0))
                call.cancel()
    except grpc.aio.AioRpcError as error:
        if error.code() not in EXPECTED:
            return f"{how}: {error.code().name}"
    except (TimeoutError, asyncio.CancelledError):
        pass
    return how


async def client(
    address: str, requests: int, seed: int, expected: dict[str, str], told: Queue
) -> None:
    draw, room = random.Random(seed), asyncio.Semaphore(AT_A_TIME)
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options) as channel:
        stub = Stub(channel)

        async def one() -> None:
            async with room:
                number, kind = draw.randrange(SEEDS), draw.choice(ASKED)
                if draw.random() < BAD:
                    told.put(await misbehave(address, stub, draw.choice(KINDS), number, draw))
                    return
                try:
                    found = await ask(stub, kind, number)
                    told.put("right" if found == expected[f"{kind} {number}"] else "WRONG")
                except grpc.aio.AioRpcError as error:
                    told.put(error.code().name)
                    await asyncio.sleep(0.05)

        await asyncio.gather(*(one() for _ in range(requests)))


def run_client(
    address: str, requests: int, seed: int, expected: dict[str, str], told: Queue, done: Event
) -> None:
    asyncio.run(client(address, requests, seed, expected, told))
    done.set()


async def references(address: str) -> dict[str, str]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = Stub(channel)
        return {
            f"{kind} {seed}": await ask(stub, kind, seed) for kind in ASKED for seed in range(SEEDS)
        }


def drive(server: ServerProcess, requests: int) -> tuple[Counter, list[float], int]:
    """(what became of requests, memory on the way, clients killed)."""
    expected = asyncio.run(references(server.address))
    spawn = multiprocessing.get_context("spawn")
    counts, memory = Counter(), []
    draw, started, killed, clients = random.Random(0), 0, 0, []
    next_kill = time.monotonic() + KILLED_EVERY
    queues: list[Queue] = []
    while sum(counts.values()) < requests:
        while len(clients) < CLIENTS:
            # A queue of its own: who is killed while it writes would leave a common one locked.
            done, told = spawn.Event(), spawn.Queue()
            queues.append(told)
            share = max(AT_A_TIME, requests // (4 * CLIENTS))
            arguments = (server.address, share, started, expected, told, done)
            process = spawn.Process(target=run_client, args=arguments, daemon=True)
            process.start()
            clients.append((process, done))
            started += 1
        for told in queues:
            with contextlib.suppress(queue.Empty):
                while True:
                    counts[told.get(timeout=0.001)] += 1
        if time.monotonic() > next_kill:
            victim, done = draw.choice(clients)
            if victim.is_alive() and not done.is_set():
                os.kill(victim.pid, signal.SIGKILL)
                killed += 1
            next_kill = time.monotonic() + KILLED_EVERY
        clients = [(process, done) for process, done in clients if process.is_alive()]
        queues = queues[-QUEUES:]
        memory.append(server.resident_megabytes)
        time.sleep(0.2)
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.process.returncode}")
    for process, _ in clients:
        process.kill()
    return counts, memory, killed


def growth(memory: list[float], requests: int) -> float:
    """Megabytes in 1000 requests, of the line through the second half of the readings."""
    half = memory[len(memory) // 2 :]
    at = np.linspace(0.0, requests / 2 / 1000, len(half))
    return float(np.polyfit(at, half, 1)[0])


def percentile(metrics_text: str, name: str, share: float) -> float:
    """Within the bucket that holds it, as Prometheus' histogram_quantile."""
    buckets = []
    for line in metrics_text.splitlines():
        if line.startswith(f"{name}_bucket"):
            bound = line.partition('le="')[2].partition('"')[0]
            buckets.append((float(bound), float(line.rpartition(" ")[2])))
    wanted = share * buckets[-1][1] if buckets else 0.0
    low = below = 0.0
    for bound, count in buckets:
        if wanted and count >= wanted:
            return low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    return 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=10_000, help="(%(default)s)")
    parser.add_argument("--slots", type=int, default=4, help="(%(default)s)")
    args = parser.parse_args()
    settings = {
        "slots": args.slots,
        "queue_size": 64,
        "slow_reader_timeout": SLOW_READER_TIMEOUT,
    }
    started = time.perf_counter()
    with ServerProcess(args.bundle, **settings) as server:
        counts, memory, killed = drive(server, args.requests)
        end = time.monotonic() + 30
        while any(server.gauges().values()) and time.monotonic() < end:
            time.sleep(0.2)
        left, text = server.gauges(), server.metrics_text()
        again = asyncio.run(references(server.address)) == asyncio.run(references(server.address))
        cut, status = server.log_text().count("its reader took nothing"), server.stop()
    step = percentile(text, "nuwa_step_duration_seconds", 0.95)
    cancel = percentile(text, "nuwa_cancel_latency_seconds", 0.95)
    grown, median = growth(memory, sum(counts.values())), float(np.median(memory))
    holds = {
        "nothing is left": not any(left.values()),
        "answers are right": set(counts) <= {"right", *KINDS} and counts["right"] > 0,
        "memory is flat": grown <= median * MOST_GROWTH,
        "cancelled within a step and 20 ms (p95)": 0 < cancel <= step + LATE,
        "who does not read is cut off": cut > 0,
        "it serves on, and ends when told": again and status == 0,
    }
    report = {
        "requests": sum(counts.values()),
        "outcomes": dict(counts),
        "clients_killed": killed,
        "readers_cut_off": cut,
        "left": left,
        "megabytes": {"median": median, "peak": max(memory), "growth_in_1000_requests": grown},
        "megabytes_on_the_way": [
            round(float(part[-1]), 1) for part in np.array_split(memory, READINGS) if len(part)
        ],
        "cancel_p95": cancel,
        "step_p95": step,
        "seconds": time.perf_counter() - started,
        "settings": settings,
        "holds": holds,
        "hardware": hardware(2),
    }
    print(json.dumps(report))
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
