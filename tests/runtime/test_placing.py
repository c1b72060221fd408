"""Threads that help another one are kept off its processor, where there are others."""

from __future__ import annotations

import os
import threading
from concurrent.futures import wait

import pytest

from nuwa.runtime.backends import helpers
from nuwa.runtime.backends.base import Lane
from nuwa.runtime.backends.helpers import Helpers
from nuwa.runtime.bundle import open_bundle

from .backend_kinds import NATIVE, loaded, opened, sequence

PLACES = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1
placed = pytest.mark.skipif(not PLACES, reason="there is one processor, or no say in it")


def threads() -> set[int]:
    return {int(each) for each in os.listdir("/proc/self/task")}


@placed
def test_helpers_leave_the_processor_of_who_asks(monkeypatch):
    usable = os.sched_getaffinity(0)
    before = threads()
    with Helpers(2, "helping") as pool:
        made = threads() - before
        assert len(made) == 2, "they are there before there is work"
        for here in sorted(usable)[:2]:
            monkeypatch.setattr(helpers, "_processor", lambda here=here: here)
            pool.keep_off()
            assert [os.sched_getaffinity(each) for each in made] == [usable - {here}] * 2
            on = [pool.submit(os.sched_getaffinity, 0) for _ in range(8)]
            assert all(each.result() == usable - {here} for each in on)
        assert os.sched_getaffinity(0) == usable, "who asks goes on wherever it may"


def test_where_nobody_has_a_say_helpers_run_anywhere(monkeypatch):
    monkeypatch.setattr(helpers, "_processor", lambda: -1)
    with Helpers(3, "helping") as pool:
        pool.keep_off()
        done = [pool.submit(threading.get_ident) for _ in range(9)]
        wait(done)
        assert all(each.result() for each in done)


@placed
def test_where_it_is_forbidden_helpers_run_anywhere(monkeypatch):
    def forbidden(thread, to):
        raise PermissionError("not here")

    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    with Helpers(2, "helping") as pool:
        pool.keep_off()
        assert pool.submit(int).result() == 0


@placed
def test_one_processor_is_shared(monkeypatch):
    here = min(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: {here})
    moved = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, to: moved.append(to))
    monkeypatch.setattr(helpers, "_processor", lambda: here)
    with Helpers(1, "helping") as pool:
        pool.keep_off()
        assert pool.submit(int).result() == 0 and not moved


@placed
@pytest.mark.parametrize("kind", NATIVE)
def test_threads_of_a_step_are_kept_off_the_one_that_asks_for_it(tiny_bundle, kind):
    bundle, usable = open_bundle(tiny_bundle), os.sched_getaffinity(0)
    before = threads()
    backend = loaded(bundle, kind, threads=3)
    members = [each for each in threads() - before if not _name(each).startswith("nuwa-")]
    # Those that prepare have been kept off already: texts were encoded.
    anywhere = [each for each in members if os.sched_getaffinity(each) == usable]
    assert 2 <= len(anywhere) < len(members)
    backend.step(opened(backend, sequence(bundle, Lane(0, 0, 3))))
    kept = [os.sched_getaffinity(each) for each in anywhere]
    off = [each for each in kept if each != usable]
    assert len(off) == 2 and off[0] == off[1] and len(usable - off[0]) == 1


def _name(thread: int) -> str:
    with open(f"/proc/self/task/{thread}/comm") as file:
        return file.read()
