"""A graph that does the same to every frame, on as many cores as a call may take.

Inside one frame two threads of ONNX Runtime get little more done than one, for its convolutions are
small; so frames are shared out, a core each. Every frame is a call of its own on one thread, and
what comes out does not depend on the others, nor on how many cores there are.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import wait

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .cores import Cores
from .helpers import Helpers


class FrameGraph:
    """session(threads): the graph, for that many threads inside of a call.

    pool: of one thread less than there are cores, None for one core; several graphs may share it.
    whole: a lone frame that has the machine to itself gets all cores; its result may then differ in
    the last place. `run` is for one thread at a time.
    """

    def __init__(
        self,
        session: Callable[[int], ort.InferenceSession],
        cores: Cores,
        pool: Helpers | None,
        *,
        whole: bool = False,
    ) -> None:
        self._cores, self._pool = cores, pool
        self._one = session(1)
        self._all = session(cores.total) if whole and pool else None
        (self._input,) = (put.name for put in self._one.get_inputs())

    def run(self, frames: npt.NDArray, *, busy: bool) -> npt.NDArray:
        """The graph's only output for frames [F, ...] of its only input; F >= 1.

        busy: others need cores too.
        """
        if self._all is not None and len(frames) == 1 and not busy:
            with self._cores.lend(self._cores.total):
                return self._run(self._all, frames)
        used = min(self._cores.share if busy else self._cores.total, len(frames))
        with self._cores.lend(used):
            own, *others = np.array_split(frames, used)
            pool = self._pool
            if pool and others:
                pool.keep_off()
            made = [pool.submit(self._each, part) for part in others] if pool else []
            try:
                return np.concatenate([self._each(own), *(part.result() for part in made)])
            finally:
                wait(made)  # even if a part has failed, so that cores are not free before they are

    def _each(self, frames: npt.NDArray) -> npt.NDArray:
        return np.concatenate([self._run(self._one, frame[None]) for frame in frames])

    def _run(self, session: ort.InferenceSession, frames: npt.NDArray) -> npt.NDArray:
        return session.run(None, {self._input: frames})[0]
