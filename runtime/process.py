"""What the operating system says of this process, and what Python does in it."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading

M_ARENA_MAX, ARENAS = -8, 2  # of malloc.h, and how many
NICE = 5  # of threads that compute: a third of a core that others want too


def resident_megabytes() -> float:
    """Memory of this process that is in RAM, in units of 10**6 bytes; 0 where /proc is missing."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return 0.0


def settle() -> None:
    """Has Python's garbage collector leave alone all that there is now.

    For a program that has loaded what it will keep: looking through it, for a tenth of a second, is
    what would keep requests waiting now and then. Collects first, so that nothing is kept for good.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def few_arenas() -> None:
    """Has threads share two pools of memory, where the C library is glibc; before they are started.

    Else they come to have eight a core, and large messages leave pieces in each of them: under
    clients that come and go memory grew by a quarter more, and did not stop.
    """
    _glibc("mallopt", M_ARENA_MAX, ARENAS)


def trim() -> None:
    """Gives memory that is free back to the system, where the C library is glibc."""
    _glibc("malloc_trim", 0)


def _glibc(name: str, *arguments: int) -> None:
    if sys.platform == "linux":
        function = getattr(ctypes.CDLL(None), name, None)
        if function is not None:  # not in musl
            function(*arguments)


def give_way() -> None:
    """Has this thread, and those that it starts, leave a core to others that want it.

    For threads that compute: with as many of them as there are cores, answers to calls would wait
    for the end of their turns. Only on Linux, where priorities are of threads.
    """
    if sys.platform == "linux":
        me = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, me, max(os.getpriority(os.PRIO_PROCESS, me), NICE))
