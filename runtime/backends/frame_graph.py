"""A graph that does the same to every frame, on as many cores as there are.

Inside one frame two threads of ONNX Runtime get little more done than one, for its convolutions are
small; so several frames are shared out, a core each, and only a frame that has the machine to
itself gets all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .cores import Cores


class FrameGraph:
    """session(threads): the graph, for that many threads inside of a call, 1 or all cores.

    pool: of one thread less than there are cores, None for one core; several graphs may share it.
    `run` is for one thread at a time.
    """

    def __init__(
        self,
        session: Callable[[int], ort.InferenceSession],
        cores: Cores,
        pool: ThreadPoolExecutor | None,
    ) -> None:
        self._session, self._cores, self._pool = session, cores, pool
        self._wide = session(cores.total)

    def run(self, frames: npt.NDArray, *, busy: bool) -> npt.NDArray:
        """The graph's only output for frames [F, ...] of its only input; F >= 1.

        busy: others need cores too.
        """
        used = min(self._cores.share, len(frames)) if busy else self._cores.total
        with self._cores.lend(used):
            if self._pool is None or (len(frames) == 1 and not busy):
                return _run(self._wide, frames)
            own, *others = np.array_split(frames, min(used, len(frames)))
            made = [self._pool.submit(_run, self._narrow, part) for part in others]
            return np.concatenate([_run(self._narrow, own), *(part.result() for part in made)])

    @cached_property
    def _narrow(self) -> ort.InferenceSession:
        return self._session(1)


def _run(session: ort.InferenceSession, frames: npt.NDArray) -> npt.NDArray:
    (put,) = session.get_inputs()
    return session.run(None, {put.name: frames})[0]
