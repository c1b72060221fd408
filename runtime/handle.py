"""One submitted request as its owner sees it: events to read, a way to cancel.

Knows nothing of slots and steps. One thread reads events; any thread may cancel.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

from .core import CancelledError, Done, Event, Frame, GenerationRequest, Preview, Timings
from .errors import DeadlineExceededError

_PICTURES = (Frame, Preview)  # made once, as every step asks

# gRPC cancels a call at its deadline, which may be a moment before that of its handle.
TOLERANCE = 0.01  # seconds


class Handle:
    """What `Scheduler.submit` returns. Times are those of `time.perf_counter`.

    most_unread: bytes of pixels that may wait for the reader before the request ends with
    CancelledError; None: any number. on_room: see has_room.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        submitted: float,
        deadline: float | None,
        on_cancel: Callable[[Handle], None],
        on_room: Callable[[], None] = lambda: None,
        most_unread: int | None = None,
    ) -> None:
        self.request = request
        self.submitted = submitted
        self.deadline = deadline
        self.cancelled = False
        self.cancelled_at: float | None = None
        self._on_cancel, self._on_room = on_cancel, on_room
        # Several threads emit. One that does may have the garbage collected, and by that leave
        # another reader's iterator, or its own: so it may be entered again.
        self._lock = threading.RLock()
        self._ended = False
        # A slow reader never stops the threads that fill this: it is bounded by the end of its
        # request, and by the number of events, of which a sample has one a frame, a preview and a
        # percent.
        self._most_unread, self._unread = most_unread, 0
        self._frame_bytes_read, self._held_back = 0, False  # whether a sample waits for the reader
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
                size = _bytes(item)
                with self._lock:
                    self._unread -= size
                    self._frame_bytes_read += size if isinstance(item, Frame) else 0
                    had_room, self._held_back = not self._held_back, False
                if not had_room:  # perhaps there is some now
                    self._on_room()
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

    def reason_to_leave(self) -> Exception:
        """Why its reader leaves it before its end: its time is over, or it is wanted no more."""
        seconds = time.perf_counter() - self.submitted
        if self.deadline is not None and self.submitted + seconds >= self.deadline - TOLERANCE:
            return DeadlineExceededError(f"the request was not finished within {seconds:.3g} s")
        return CancelledError("the request was cancelled")

    @property
    def ended(self) -> bool:
        """Whether it is done or has failed: nothing is emitted any more."""
        return self._ended

    def has_room(self, samples: int, size: int) -> bool:
        """For the scheduler: whether one more sample may begin, after so many, of `size` bytes of
        frames each: if no more than may wait for the reader would do so, had all of them come by
        now, or if all of them are read. If not, `on_room` is called when something is read.

        A reader that ranks samples may be slow without any fault of its client's.
        """
        if self._most_unread is None:
            return True
        with self._lock:
            left = samples * size - self._frame_bytes_read
            self._held_back = left > 0 and left + size > self._most_unread
            return not self._held_back

    def emit(self, event: Event) -> None:
        """For the scheduler: hands one event to the reader, unless the request has ended."""
        if self._most_unread is not None and self._unread + _bytes(event) > self._most_unread:
            self.fail(
                CancelledError(
                    f"{self._unread / 1e6:.0f} MB of its frames wait for a reader that is too slow"
                )
            )
            self.cancel()
            return
        self._put(event, last=isinstance(event, Done))

    def fail(self, error: BaseException) -> None:
        """For the scheduler: ends the request, if it has not ended; the reader gets `error`."""
        self._put(error, last=True)

    def _put(self, item: Event | BaseException, *, last: bool) -> None:
        size = _bytes(item)
        with self._lock:
            if not self._ended:
                self._ended = last
                self._unread += size
                self._events.put(item)


def _bytes(item: Event | BaseException) -> int:
    """Of its pixels."""
    return item.pixels.nbytes if isinstance(item, _PICTURES) else 0
