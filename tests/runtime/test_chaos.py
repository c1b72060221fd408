"""The clients of benchmarks/chaos.py: both protocols, all they do wrong, and what they notice."""

from __future__ import annotations

import asyncio
import importlib.util
import random
import sys
import time
from pathlib import Path

import grpc.aio
import pytest

from .messages import wait_until

PATH = Path(__file__).parents[2] / "benchmarks" / "chaos_client.py"
BOTH = ("OverV1", "OverKServe")


@pytest.fixture(scope="module")
def chaos():
    with pytest.MonkeyPatch.context() as patch:
        spec = importlib.util.spec_from_file_location("chaos_client", PATH)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "chaos_client", module)  # for its dataclass
        spec.loader.exec_module(module)
        patch.setattr(module, "SLOW_READER_TIMEOUT", 0.1)
        yield module


def over(chaos, server, protocol: str, do):
    """What do(place, over) gives, over this protocol."""

    async def main():
        place = await chaos.find_place(server.address)
        async with grpc.aio.insecure_channel(server.address) as channel:
            return await do(place, getattr(chaos, protocol)(channel, place))

    return asyncio.run(main())


@pytest.mark.parametrize("protocol", BOTH)
def test_answers_are_right_over_both_and_wrong_ones_are_seen(chaos, server, protocol):
    async def do(place, over):
        expected = await chaos.references(place)
        draw = random.Random(0)
        for kind in over.ASKED:
            assert await chaos.behave(over, kind, 2, expected, draw) == chaos.RIGHT
            shifted = {"image 2": expected["image 3"], "clip 2": expected["clip 3"]}
            assert await chaos.behave(over, kind, 2, shifted, draw) == chaos.WRONG
        return expected

    expected = over(chaos, server, protocol, do)
    assert len(set(expected.values())) == 2 * chaos.SEEDS


@pytest.fixture
def slow(engine):
    """An engine that takes a third of a second for a clip of four frames."""
    step = engine.step

    def slow_step(until=None):
        time.sleep(0.02)
        return step()

    engine.step = slow_step
    return engine


@pytest.mark.parametrize("protocol", BOTH)
@pytest.mark.parametrize(
    "how", ["cancel", "disconnect", "deadline", "slow reader", "unread answer"]
)
def test_whoever_misbehaves_leaves_nothing_behind(chaos, slow, server, protocol, how):
    async def do(place, over):
        return [await chaos.misbehave(place, over, how, 1, random.Random(n)) for n in range(3)]

    assert over(chaos, server, protocol, do) == [how] * 3
    wait_until(lambda: server.intake.open_calls == 0)
    wait_until(lambda: server.scheduler.active == server.scheduler.queued == 0)


def test_a_late_request_leaves_the_one_beside_it_alone(chaos, slow, server):
    async def do(place, over):
        expected = {"clip 1": (await over.ask("clip", 1))["clip"], "clip 2": "another"}
        draws = [random.Random(n) for n in range(3)]
        found = [await chaos.behave(over, chaos.LATE, 1, expected, draw) for draw in draws]
        return [*found, await chaos.behave(over, chaos.LATE, 2, expected, draws[0])]

    assert over(chaos, server, "OverKServe", do) == [chaos.LATE] * 3 + [chaos.WRONG]
    ended = {
        outcome: server.metrics.registry.get_sample_value(
            "nuwa_requests_total", {"model": "fake", "task": "t2v", "outcome": outcome}
        )
        for outcome in ("deadline", "deadline_too_short")
    }
    assert any(ended.values()), "some were late, or told so at once"


class Patient(random.Random):
    """Draws a deadline that is not missed."""

    def uniform(self, a: float, b: float) -> float:
        return 60.0


def test_a_fault_within_a_stream_is_told(chaos, engine, server):
    async def do(place, over):
        engine.step_error = RuntimeError("a fault")
        with pytest.raises(chaos.FailedError, match="internal error"):
            await over.ask("image", 1)
        engine.step_error = RuntimeError("a fault")
        return await chaos.misbehave(place, over, "deadline", 1, Patient())

    assert "deadline: internal error" in over(chaos, server, "OverKServe", do)
