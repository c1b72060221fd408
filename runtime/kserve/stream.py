"""One bidirectional call of the Open Inference Protocol: its requests, and their answers."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc

from nuwa.inference import grpc_service_pb2 as pb

from ..convert import MAX_REQUEST_ID_LENGTH
from ..core import QueueFullError
from ..errors import FieldError, ShuttingDownError
from ..interceptor import Unreadable

log = logging.getLogger("nuwa.runtime")

CALLS_PER_STREAM = 16  # generations of one stream at a time
UNSENT_ANSWERS = 16  # of one stream, before its generations wait for the client to read


class Failure:
    def __init__(self, request_id: str, error: Exception) -> None:
        self.request_id, self.error = request_id, error


class Stream:
    """One bidirectional call: requests are answered side by side, each in a thread of its own.

    Answers wait in a bounded queue until the client reads them; the engine never waits for that.
    answer(request, context): an iterator, which begins when it is asked; kept(error, request_id):
    what waits there in place of an error, which may hold all of its request.
    """

    def __init__(
        self,
        answer: Callable[[pb.ModelInferRequest, grpc.ServicerContext], Iterator],
        context: grpc.ServicerContext,
        kept: Callable[[Exception, str], Exception],
    ) -> None:
        self._answer, self._context, self._kept = answer, context, kept
        self._pool = futures.ThreadPoolExecutor(CALLS_PER_STREAM + 1, "nuwa-stream")
        self._queue: queue.Queue[Any] = queue.Queue(UNSENT_ANSWERS)
        self._lock = threading.Lock()
        self._open = 1  # the reader, and requests that are being answered
        self._reading = True
        self._dismissed = False
        self._closed = threading.Event()

    def start(self, requests: Iterator[Any]) -> None:
        """Begins to read requests; answers() gives what becomes of them."""
        self._pool.submit(self._read, requests)

    def answers(self) -> Iterator[Any]:
        """Until all requests are answered; Failure for those that cannot be.

        ShuttingDownError at the end of a stream that was dismissed.
        """
        while (answer := self._queue.get()) is not None:
            yield answer
        if self._dismissed:
            raise ShuttingDownError("the server is shutting down; the stream has no more answers")

    def dismiss(self) -> None:
        """Takes no more requests: the stream ends once those at hand are answered, however long its
        client would keep it open.
        """
        with self._lock:
            if not self._reading:
                return
            self._reading, self._dismissed = False, True
            self._pool.submit(self._finish_one)

    def close(self) -> None:
        """Lets threads that still have answers throw them away.

        Does not wait for them: the one that reads ends with the call, which is not over yet.
        """
        self._closed.set()
        with self._lock:
            self._reading = False  # so that nobody dismisses it any more
            self._pool.shutdown(wait=False)

    def _read(self, requests: Iterator[Any]) -> None:
        """Takes requests until the client has sent its last one, or is gone."""
        try:
            for request in requests:
                if self._closed.is_set():
                    return
                failure = self._take(request)
                del request  # it may be large, and what follows waits for the client
                if failure is not None:
                    self._put(failure)
        except Exception:
            log.debug("a stream ended", exc_info=True)  # how the iterator says that it is over
        finally:
            with self._lock:
                reading, self._reading = self._reading, False
            if reading:
                self._finish_one()

    def _take(self, request: Any) -> Failure | None:
        """Has it answered; or why not."""
        if isinstance(request, Unreadable):
            return self._failure(request.error)
        if len(request.id) > MAX_REQUEST_ID_LENGTH:  # or it would be in answers that wait
            problem = f"id is not at most {MAX_REQUEST_ID_LENGTH} printable ASCII characters"
            return self._failure(FieldError("id", problem))
        with self._lock:
            dismissed, busy = self._dismissed, self._open > CALLS_PER_STREAM
            self._open += not (dismissed or busy)
        if dismissed:
            return self._failure(ShuttingDownError("the server is shutting down"), request.id)
        if busy:
            problem = f"a stream has at most {CALLS_PER_STREAM} requests at a time"
            return self._failure(QueueFullError(problem), request.id)
        # Without the request, which the pool would keep until this has ended.
        self._pool.submit(self._serve, request.id, self._answer(request, self._context))
        return None

    def _serve(self, request_id: str, answers: Iterator) -> None:
        try:
            failure = self._put_all(request_id, answers)
            if failure is not None:
                self._put(failure)
        finally:
            self._finish_one()

    def _put_all(self, request_id: str, answers: Iterator) -> Failure | None:
        """Why there are no more of them, if that is a failure."""
        try:
            for answer in answers:
                self._put(answer)
        except Exception as error:
            return self._failure(error, request_id)
        return None

    def _failure(self, error: Exception, request_id: str = "") -> Failure:
        return Failure(request_id, self._kept(error, request_id))

    def _finish_one(self) -> None:
        with self._lock:
            self._open -= 1
            last = not self._open
        if last:
            self._put(None)

    def _put(self, answer: Any) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(answer, timeout=0.1)
                return
            except queue.Full:
                continue
