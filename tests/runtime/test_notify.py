"""systemd is told when the server is ready, well and stopping."""

from __future__ import annotations

import os
import socket
import threading

from nuwa.runtime.notify import READY, notify
from nuwa.runtime.server import Server
from nuwa.runtime.until_signal import serve_until_signal

from .fake_engine import FakeEngine


def test_states_arrive_in_order(tmp_path, monkeypatch, capsys):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))
        receiver.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        server = Server(FakeEngine())
        heard = []

        def listen():
            while not heard or heard[-1] != "STOPPING=1":
                heard.append(receiver.recv(100).decode())
                if heard.count("WATCHDOG=1") == 2:
                    server.asked_to_end.set()

        listener = threading.Thread(target=listen)
        listener.start()
        serve_until_signal(server)
        listener.join(10)
    assert heard.index("READY=1") < heard.index("STOPPING=1") == len(heard) - 1
    assert heard.count("READY=1") == 1 and heard.count("WATCHDOG=1") >= 2


def test_a_name_without_a_file(monkeypatch):
    name = f"nuwa-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0" + name)
        receiver.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        notify(READY)
        assert receiver.recv(100) == b"READY=1"


def test_nobody_listens(monkeypatch, tmp_path):
    for address in ("", "relative", str(tmp_path / "missing")):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        notify(READY)
