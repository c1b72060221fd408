"""Runs a server until a signal comes: loads, says when it is ready, drains."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from .notify import READY, STOPPING, notify
from .process import resident_megabytes
from .server import Server

log = logging.getLogger("nuwa.runtime")

DEFAULT_GRACE = 30.0
# Within which a signal is noticed: Python handles it in the main thread, which it does not wake
# from an endless wait if the system has another thread take it.
SIGNAL_SECONDS = 0.1


def serve_until_signal(
    server: Server,
    *,
    load: Callable[[], None] = lambda: None,
    load_seconds: float = 0.0,
    grace: float = DEFAULT_GRACE,
) -> None:
    """Starts, loads, prints one line when ready, and returns after SIGTERM or SIGINT and a drain.

    load: what loads models, in a thread of its own; what it raises comes through, after a drain
    where models have been loaded before. A second signal cuts the drain, SIGHUP loads again what
    has changed. Also returns when nothing can be generated any more, which `server.died` says. Does
    not wait for what is being loaded. Only for the main thread.
    """
    asked = server.asked_to_end
    previous = {}

    def on_signal(number: int, _frame: FrameType | None) -> None:
        # Not from within the handler: it may have interrupted a lock that these need.
        if number == signal.SIGHUP:
            threading.Thread(target=server.reload, name="nuwa-reload", daemon=True).start()
            return
        if asked.is_set():
            threading.Thread(target=server.hasten, daemon=True).start()
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        previous[number] = signal.signal(number, on_signal)
    try:
        server.owns_process = True
        server.start()
        started = time.perf_counter()
        loading = _InThread("nuwa-load", load)
        while not (loading.ended.wait(SIGNAL_SECONDS) or asked.is_set()):
            pass
        failure = loading.failure  # what fails later does so because the server ends
        if failure is not None:
            if server.host.running:  # or it is told at once, by who called this
                log.error("a further bundle could not be loaded, so the server ends: %s", failure)
        elif not loading.ended.is_set():
            log.info("ends while loading")
        elif not asked.is_set():
            _say_ready(server, load_seconds + time.perf_counter() - started)
            notify(READY)
            while not asked.wait(SIGNAL_SECONDS):
                pass
        notify(STOPPING)
        _drain(server, grace)
        if failure is not None:
            raise failure
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _drain(server: Server, grace: float) -> None:
    """Stops, in another thread, so that signals are noticed. Without a model there is nothing to
    give grace to.
    """
    duck, started, running = server.settings.lame_duck, time.perf_counter(), server.host.running
    if not running:
        grace = 0.0
    if grace:
        log.info("draining: %g s more for new calls, then %g s for those at hand", duck, grace)
    stopping = _InThread("nuwa-stop", lambda: server.stop(grace))
    while not stopping.ended.wait(SIGNAL_SECONDS):
        pass
    if stopping.failure is not None:
        raise stopping.failure
    if running:
        log.info("stopped after %.2f s", time.perf_counter() - started)


class _InThread:
    """Calls something in a thread of its own. ended: when it has returned, or raised `failure`."""

    def __init__(self, name: str, call: Callable[[], None]) -> None:
        self.ended = threading.Event()
        self.failure: BaseException | None = None
        self._call = call
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self.failure = error
        self.ended.set()


def _say_ready(server: Server, load_seconds: float) -> None:
    told = []
    for each in server.host.loaded:
        info = each.engine.info
        told.append(f"{each.name} ({', '.join(info.tasks)}) on {info.backend}")
    print(
        f"nuwa: ready on {server.address}: {'; '.join(told)}, loaded in {load_seconds:.2f} s, "
        + (f"metrics on {server.metrics_address}, " if server.metrics_address else "")
        + f"{resident_megabytes():.0f} MB",
        flush=True,
    )
