"""A client that speaks just enough HTTP/2 to take no answer: its window is 0, and stays so."""

from __future__ import annotations

import contextlib
import gzip
import socket
import struct
import threading
from collections.abc import Iterable

DATA, HEADERS, RST_STREAM, SETTINGS = 0, 1, 3, 4
END_STREAM, ACK, END_HEADERS = 1, 1, 4
MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 3, 4
REFUSED_STREAM = 7


class RawClient:
    """settings: what the server announced; ended: error codes by stream, of those that it reset."""

    def __init__(self, address: str) -> None:
        host, port = address.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)), timeout=20)
        self._next = 1
        self.settings: dict[int, int] = {}
        self.ended: dict[int, int] = {}
        self.greeted = threading.Event()
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self._send(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.greeted.wait(20)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._reader.join(20)

    def call(
        self,
        method: str,
        messages: Iterable[bytes] = (b"",),
        *,
        end: bool = True,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> int:
        """The stream of a call that sends these, packed by gzip; end: whether it has no more."""
        stream, self._next = self._next, self._next + 2
        headers = (
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("grpc-encoding", "gzip"),
            *metadata,
        )
        # Fields that are no part of any table, whose texts are not packed: RFC 7541, 6.2.2.
        block = b"".join(b"\0" + _text(name) + _text(value) for name, value in headers)
        self._send(HEADERS, END_HEADERS, stream, block)
        packed = [gzip.compress(each) for each in messages]
        data = b"".join(struct.pack(">BI", 1, len(each)) + each for each in packed)
        assert len(data) < 2**16, "what every server takes at once"
        for at in range(0, len(data), 2**14):
            last = end and at + 2**14 >= len(data)
            self._send(DATA, END_STREAM if last else 0, stream, data[at : at + 2**14])
        return stream

    def _send(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        head = len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4)
        self._socket.sendall(head + payload)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # how the end of the connection shows
            self._read_frames()

    def _read_frames(self) -> None:
        file = self._socket.makefile("rb")
        while len(head := file.read(9)) == 9:
            payload = file.read(int.from_bytes(head[:3]))
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:])
            if kind == SETTINGS and not flags & ACK:
                self.settings |= dict(struct.iter_unpack(">HI", payload))
                self._send(SETTINGS, ACK, 0, b"")
                self.greeted.set()
            elif kind == RST_STREAM:
                self.ended[stream] = int.from_bytes(payload)


def _text(value: str) -> bytes:
    assert len(value) < 127
    return bytes([len(value)]) + value.encode()
