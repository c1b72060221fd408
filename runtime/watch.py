"""Looks after a server: tells health checks of a hanging engine, ends waits for slow clients."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from .notify import WATCHDOG, notify

log = logging.getLogger("nuwa.runtime")

INTERVAL = 0.25  # seconds


class Watch:
    """start() and close(). In its thread, every INTERVAL:

    hanging() gives the seconds of the engine's call that has lasted longest; when these become more
    than `patience` on_health(False) is called, and on_health(True) when they no longer are.
    look_after() is called for its effect.
    """

    def __init__(
        self,
        hanging: Callable[[], float],
        patience: float,
        on_health: Callable[[bool], None],
        look_after: Callable[[], None],
    ) -> None:
        self._hanging, self._patience = hanging, patience
        self._on_health, self._look_after = on_health, look_after
        self._well = True
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="nuwa-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Harmless if it was never started."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        while not self._closing.wait(INTERVAL):
            try:
                self.look()
            except Exception:
                log.exception("a look at the server failed")  # the next one may not

    def look(self) -> None:
        """One round."""
        seconds = self._hanging()
        well = seconds <= self._patience
        if well != self._well:
            self._well = well
            if well:
                log.warning("the engine works again")
            else:
                log.error("the engine has not returned for %.1f s; not serving", seconds)
            self._on_health(well)
        if well:
            notify(WATCHDOG)
        self._look_after()
