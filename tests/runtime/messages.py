"""Messages that the tests of the server send, and what they read from its errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from nuwa.runtime.server import Server
from nuwa.v1 import generation_pb2 as pb

PICTURE = np.full((8, 8, 3), 9, np.uint8)
CLIP = np.stack([PICTURE] * 3)
MAPS = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8)


def video(**fields) -> pb.GenerateVideoRequest:
    return pb.GenerateVideoRequest(task=pb.TASK_T2V, prompt="a 3 moves left", **fields)


def image(**fields) -> pb.GenerateImageRequest:
    return pb.GenerateImageRequest(task=pb.TASK_T2I, prompt="a 3", **fields)


def details(error: grpc.RpcError) -> tuple[error_details_pb2.ErrorInfo, dict[str, str]]:
    """ErrorInfo, and the fields of BadRequest."""
    info, fields = error_details_pb2.ErrorInfo(), {}
    for detail in rpc_status.from_call(error).details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            fields = {each.field: each.description for each in bad.field_violations}
        detail.Unpack(info)
    return info, fields


def wait_until_told_to_cancel(server: Server) -> None:
    """The server heard of the client's leaving; the decode thread may not have."""
    wait_until(lambda: all(each.handle.cancelled for each in server.scheduler._running.values()))


def once(condition: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """A thread that acts when the condition holds; if it never does, at last all the same."""

    def wait() -> None:
        try:
            wait_until(condition)
        finally:
            act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)
