"""One submitted request as its owner sees it: events to read, a way to cancel.

Knows nothing of slots and steps. One thread reads events; any thread may cancel.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

from .core import Done, Event, Frame, GenerationRequest, Timings


class Handle:
    """What `Scheduler.submit` returns. Times are those of `time.perf_counter`."""

    def __init__(
        self,
        request: GenerationRequest,
        *,
        submitted: float,
        deadline: float | None,
        on_cancel: Callable[[Handle], None],
    ) -> None:
        self.request = request
        self.submitted = submitted
        self.deadline = deadline
        self.cancelled = False
        self.cancelled_at: float | None = None
        self._on_cancel = on_cancel
        self._lock = threading.Lock()  # several threads emit
        self._ended = False
        # Unbounded, so that a slow reader never stops the threads; each sample makes at most one
        # event a frame, a preview and a percent, which bounds it in fact
        # (samples.MAX_REQUEST_PIXELS).
        self._events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()

    def cancel(self) -> None:
        """Stops the request within one decode step; harmless when it is finished.

        A reader of `events` then gets CancelledError.
        """
        if not self.cancelled:
            self.cancelled_at = time.perf_counter()
        self.cancelled = True
        self._on_cancel(self)

    def events(self) -> Iterator[Event]:
        """Accepted, Progress, Preview and Frame of every sample as they happen, then one Done.

        Raises what ended the request instead: CancelledError (DeadlineExceededError where that was
        the reason), ShuttingDownError or EngineError. Leaving the iterator early cancels.
        """
        try:
            while True:
                item = self._events.get()
                last = isinstance(item, Done | BaseException)
                if last:
                    self._events.put(item)  # a second reading must end too, not block for ever
                if isinstance(item, BaseException):
                    raise item
                yield item
                if last:
                    return
        finally:
            self.cancel()

    def result(self) -> tuple[list[Frame], Timings]:
        """Waits for the end; frames by sample, then by index. Raises as `events` does."""
        frames = []
        timings = Timings()
        for event in self.events():
            if isinstance(event, Frame):
                frames.append(event)
            elif isinstance(event, Done):
                timings = event.timings
        return sorted(frames, key=lambda frame: (frame.sample_index, frame.index)), timings

    @property
    def ended(self) -> bool:
        """Whether it is done or has failed: nothing is emitted any more."""
        return self._ended

    def emit(self, event: Event) -> None:
        """For the scheduler: hands one event to the reader, unless the request has ended."""
        self._put(event, last=isinstance(event, Done))

    def fail(self, error: BaseException) -> None:
        """For the scheduler: ends the request, if it has not ended; the reader gets `error`."""
        self._put(error, last=True)

    def _put(self, item: Event | BaseException, *, last: bool) -> None:
        with self._lock:
            if not self._ended:
                self._ended = last
                self._events.put(item)
