"""Restarts under load: `python benchmarks/restarts.py BUNDLE --restarts 100`.

Clients stream clips, and ask for images in one call, more of them than there are slots, while the
server is told to end (SIGTERM) and started anew on the same port, again and again: what had a slot
has to come whole, and so has what was waiting for one. Then servers are killed
(kill -9) while they work on an image: its client has to see UNAVAILABLE, and the same request with
the same request_id has to get the same tokens from the server after. The last line is JSON; exit
status 1 if something does not hold.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
from hardware import hardware
from server_process import ServerProcess

from nuwa.v1 import generation_pb2 as pb
from nuwa.v1 import generation_pb2_grpc

Stub = generation_pb2_grpc.GenerationServiceStub

PROMPT = "a red 3 on a black background"
STREAMS, CALLS, SLOTS = 4, 3, 4  # clients of each kind, and what the server has
GRACE, LAME_DUCK = 20.0, 0.2
WAITED = 0.25  # seconds before the signal, by which a request is in the server's queue
KILLS = 10


class Load:
    """Clients that ask for one after the other, until they are stopped.

    told_at: when the server was told to end.
    """

    def __init__(self, address: str, frames: int) -> None:
        self.ended: Counter[str] = Counter()
        self._address, self._frames = address, frames
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.told_at = float("inf")
        asks = [self._stream] * STREAMS + [self._call] * CALLS
        self._threads = [threading.Thread(target=self._run, args=(ask,)) for ask in asks]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, ask: Callable[[Stub], str]) -> None:
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
        ]
        with grpc.insecure_channel(self._address, options) as channel:
            stub = Stub(channel)
            while not self._stop.is_set():
                how = ask(stub)
                with self._lock:
                    self.ended[how] += 1
                if not how.startswith("whole"):
                    time.sleep(0.05)

    def _call(self, stub: Stub) -> str:
        request = pb.GenerateImageRequest(task=pb.TASK_T2I, prompt=f"{PROMPT} .", sample_count=4)
        sent = time.perf_counter()
        try:
            stub.GenerateImage(request, timeout=60)
        except grpc.RpcError as error:
            return self._failed(error, sent)
        return "whole image"

    def _failed(self, error: grpc.RpcError, sent: float) -> str:
        waiting = sent + WAITED < self.told_at < time.perf_counter()
        return f"{'WAITING, ' if waiting else ''}{error.code().name}"

    def _stream(self, stub: Stub) -> str:
        request = pb.GenerateVideoRequest(
            task=pb.TASK_T2V, prompt=f"{PROMPT} moving up .", frame_count=self._frames
        )
        accepted, sent = False, time.perf_counter()
        try:
            for event in stub.GenerateVideo(request, timeout=60):
                accepted = accepted or event.HasField("accepted")
                if event.HasField("done"):
                    return "whole clip"
        except grpc.RpcError as error:
            return f"{'ACCEPTED, ' if accepted else ''}{self._failed(error, sent)}"
        return "ENDED EARLY"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def restart(bundle: Path, restarts: int, frames: int) -> tuple[Counter, list[int], list[float]]:
    """(how streams ended, exit statuses, seconds that ending took)."""
    port = free_port()
    settings = {"slots": SLOTS, "grace": GRACE, "lame_duck": LAME_DUCK}
    server = ServerProcess(bundle, port, **settings)
    load, statuses, seconds = Load(server.address, frames), [], []
    try:
        for _ in range(restarts):
            time.sleep(0.5)
            begun = load.told_at = time.perf_counter()
            statuses.append(server.stop())
            seconds.append(time.perf_counter() - begun)
            server = ServerProcess(bundle, port, **settings)
    finally:
        load.close()
        server.stop()
    return load.ended, statuses, seconds


def tokens(address: str, request_id: str, started: threading.Event | None = None) -> list[int]:
    """Of an image without a seed of its own, in several samples so that it takes a while."""
    request = pb.GenerateImageRequest(
        task=pb.TASK_T2I,
        prompt=f"{PROMPT} .",
        request_id=request_id,
        sample_count=16,
        output=pb.Output(include_tokens=True),
    )
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = Stub(channel).GenerateImage.future(request, timeout=60, wait_for_ready=True)
        if started is not None:
            started.set()
        answer = call.result()
    return [token for sample in answer.samples for token in sample.frame.token_grid.tokens]


def kill(bundle: Path, kills: int) -> tuple[Counter, int]:
    """(what clients of killed servers saw, how many retries got the same tokens)."""
    seen, same = Counter(), 0
    for number in range(kills):
        request_id = f"request-{number}"
        with ServerProcess(bundle) as server:
            expected = tokens(server.address, request_id)
        server, started = ServerProcess(bundle), threading.Event()

        def ask(address: str = server.address, started: threading.Event = started) -> None:
            try:
                tokens(address, request_id, started)  # noqa: B023  joined before it changes
                seen["answered"] += 1
            except grpc.RpcError as error:
                seen[error.code().name] += 1

        client = threading.Thread(target=ask)
        client.start()
        started.wait()
        time.sleep(0.1)
        server.stop(signal.SIGKILL)
        client.join()
        with ServerProcess(bundle) as server:
            same += tokens(server.address, request_id) == expected
    return seen, same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--restarts", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--kills", type=int, default=KILLS, help="(%(default)s)")
    parser.add_argument("--frames", type=int, default=10, help="of a clip (%(default)s)")
    args = parser.parse_args()
    ended, statuses, seconds = restart(args.bundle, args.restarts, args.frames)
    seen, same = kill(args.bundle, args.kills)
    holds = {
        "accepted requests come whole": set(ended) == {"whole clip", "whole image", "UNAVAILABLE"},
        "servers end well": set(statuses) <= {0},
        "ends within its grace": max(seconds, default=0.0) < GRACE,
        "killed: UNAVAILABLE": set(seen) <= {"UNAVAILABLE", "answered"},
        "killed: retried to the same tokens": same == args.kills,
    }
    report = {
        "restarts": args.restarts,
        "ended": dict(ended),
        "slowest_end_seconds": max(seconds, default=0.0),
        "kills": args.kills,
        "clients_of_killed": dict(seen),
        "same_tokens": same,
        "holds": holds,
        "hardware": hardware(2),
    }
    print(json.dumps(report))
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
