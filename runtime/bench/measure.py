"""A whole measurement: card, warm-up, scenario, and the result that schema.py describes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from . import energy, figures, machine, memory, sensors, server_metrics
from .asking import Asker
from .compare import outstanding
from .describe import (
    describe_card,
    describe_model,
    describe_scenario,
    describe_workload,
    given_frames,
)
from .hardware import Hardware, gpus_in_use
from .observation import OK, Observation
from .running import Settings, run, warmed
from .sampler import Sampler
from .scenarios import workers
from .schema import SCHEMA
from .targets import Target
from .workload import Workload

OTHERS = 0.03  # of the cores' time that others took, from which a note says so
SLOWER = 0.03  # of the last rounds, likewise
COOLED = 2.0  # degrees above those before the rates were measured, that are cool enough
COOL_DOWN_SECONDS = 30.0


def measure(
    target: Target,
    workload: Workload,
    settings: Settings,
    *,
    command: str = "",
    frugal: bool = False,
    metrics_at: str | None = None,
    devices_before: Mapping[int, int] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The result; what is wrong with the request is raised as it is, before anything is measured.

    frugal: for a small machine: rates are measured in little memory, and it may cool down then;
    metrics_at: HOST:PORT of the server's own metrics, which are read before and after;
    devices_before: memory.used_on_devices() before the model was loaded; say: hears what is done.
    """
    began, described, hardware = datetime.now(UTC), machine.describe(), Hardware()
    settings = replace(settings, outstanding=settings.outstanding or outstanding(target.slots))
    asker = Asker(target.client, workload, target.info, target.model)
    gpus = gpus_in_use(hardware.gpus, target.info.backend) if target.local else []
    idle = energy.idle_watts(energy.sources(hardware, gpus)) if target.local else {}
    if metrics_at is not None:
        server_metrics.read(metrics_at)  # or it is told now that it cannot be had
    cold = time.perf_counter()
    with workers(1) as pool:
        pictures = pool.submit(asker.check).result()
    cold = time.perf_counter() - cold
    if settings.rates and target.bundle is not None:
        say("the machine's rates")
    heat = sensors.hottest(hardware)
    takes = describe_card(target, workload, settings, frugal)
    if frugal and takes is not None and takes.rates is not None:
        cool_down(hardware, heat)
    say("warm-up")
    warm_up = {"first_seconds": cold} | warmed(asker, settings.warm_up, settings.at_once)
    target.steps.clear()
    prepared = memory.process_peak(hardware)
    memory.forget_peak()
    before = "" if metrics_at is None else server_metrics.read(metrics_at)
    sampler = Sampler(hardware, gpus=gpus)
    sampler.start()
    try:
        settings.turns.begin()
        say(settings.scenario)
        seen = run(asker, target, settings, warm_up["requests"], say)
        settings.turns.finish()
    finally:
        power = sampler.stop()
    peak = memory.process_peak(hardware)  # before rates are measured again
    interrupted, cut_short = seen.interrupted, []
    if takes is not None and takes.rates is not None and not interrupted:
        say("the machine's rates, again")
        try:
            takes = takes.again()
        except KeyboardInterrupt:  # the run is whole
            interrupted = True
            cut_short.append(
                "Interrupted while the machine's rates were measured again: the floor is of those "
                "before the run, and all else is whole."
            )
    card = {} if takes is None else takes.to_json()
    observed, span = seen.all, figures.counted(seen, settings)
    frames = workload.frame_count(target.info)
    given = given_frames(workload, frames)
    if span is not None:
        power["energy"] = sampler.energy(*span[:2])
    elif settings.in_turns:  # half of it was the other's
        power["energy"] = []
    power |= {"counted_seconds": span[1] - span[0] if span else 0.0, "idle_watts": idle}
    conditions = {
        "celsius": _temperatures(power["seen"]),
        "drift": figures.drift(seen, settings),
        **(sampler.contention(*span[:2]) if span else {}),
    }
    device, device_note = memory.device_peak(power["seen"], gpus, devices_before)
    if settings.in_turns and device_note:  # what is not known to be this process's
        device, device_note = None, "GPU memory is not told: another run had its own meanwhile."
    around = figures.Surroundings(
        card, frames, given, _charged(power), power["own_seconds"] / power["seconds"]
    )
    phases = figures.phases(observed)
    if target.local and "encoding" not in phases:
        phases |= figures.encoding(workload.output_format, pictures)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "when": began.isoformat(timespec="seconds"),
        "command": command,
        "notes": [
            *seen.notes,
            *notes(target, warm_up, power, conditions, seen.asked),
            *([device_note] if device_note else []),
            *([] if takes is None else takes.notes()),
            *cut_short,
        ],
        "machine": described,
        "model": describe_model(target, settings),
        "workload": describe_workload(target, workload),
        "scenario": describe_scenario(settings),
        "card": card,
        "warm_up": warm_up,
        "outcomes": dict(Counter(each.status for each in seen.asked)),
        "metrics": figures.metrics(seen, workload, settings, around),
        "phases": phases,
        "steps": figures.steps(target.steps, card, settings.scenario == "single-stream"),
        "load": seen.load,
        "timeline": {"requests": figures.timeline(observed)},
        "latencies": figures.latencies(observed),
        "memory": {
            "process_peak_bytes": peak if target.local else None,
            "preparing_peak_bytes": prepared if target.local else None,
            "device_peak_bytes": device,
        },
        "power": power if target.local else None,
        "conditions": conditions,
        "rounds": figures.in_rounds(seen, workload, settings, given),
    }
    if figures.beaten(result):
        result["notes"].append(
            "Some of it was faster than its floor: the machine was slower both times that its "
            "rates were measured, and the floor is no floor."
        )
    if metrics_at is not None:
        asked = len(observed) * (settings.streams if settings.scenario == "multi-stream" else 1)
        told, note = counted_meanwhile(metrics_at, before, target.info.name, workload, asked)
        result |= {} if told is None else {"server": told}
        result["notes"] += [note] if note else []
    if settings.in_turns:
        result["turns"] = {"id": settings.turns.id}
    if seen.search is not None:
        result["search"] = seen.search
    if interrupted:
        result["interrupted"] = True
    if seen.loadgen is not None:
        result["loadgen"] = seen.loadgen
    return result


def counted_meanwhile(
    metrics_at: str, before: str, model: str, workload: Workload, asked: int
) -> tuple[dict[str, Any] | None, str]:
    """What the server counted since, None if it does not say; and what must be known of that.

    asked: requests that the figures are of.
    """
    try:
        after = server_metrics.read(metrics_at)
        told = server_metrics.difference(before, after, model, str(workload.task))
    except ValueError as error:  # such as of a server that is gone
        return None, f"What the server counted is not known: {error}."
    note = ""
    if told["requests"] != asked:
        note = (
            f"The server counted {told['requests']} requests meanwhile, {asked} of which are in "
            "the figures: its phases are of all that it was asked."
        )
    return {"metrics_at": metrics_at} | told, note


def cool_down(
    hardware: Hardware, degrees: float | None, seconds: float = COOL_DOWN_SECONDS
) -> None:
    """Waits until the machine is about as cool as it was, but no longer than so long."""
    until = time.perf_counter() + seconds
    while degrees is not None and time.perf_counter() < until:
        now = sensors.hottest(hardware)
        if now is None or now <= degrees + COOLED:
            return
        time.sleep(min(1.0, seconds))


def _temperatures(seen: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {
        name.removesuffix("_celsius"): {
            "before": each["first"],
            "after": each["last"],
            "most": each["most"],
        }
        for name, each in seen.items()
        if name.endswith("_celsius")
    }


def _charged(power: Mapping[str, Any]) -> dict[str, Any] | None:
    """What answers are charged with, and what its source took while nothing was done."""
    found = energy.counted(power["energy"])
    if found is None:
        return None
    idle = [power["idle_watts"].get(name) for name in found["of"].split(" + ")]
    known = [watts for watts in idle if watts is not None]
    return found | ({"idle_watts": sum(known)} if len(known) == len(idle) else {})


def notes(
    target: Target,
    warm_up: Mapping[str, Any],
    power: Mapping[str, Any],
    conditions: Mapping[str, Any],
    observed: list[Observation],
) -> list[str]:
    """What a reader has to know to believe the rest."""
    found = []
    if not target.local:
        found.append("The machine described here is the client's.")
    taken = conditions.get("others_share") or 0.0
    if target.local and taken > OTHERS:
        found.append(
            f"Others took {100 * taken:.0f} % of the cores' time meanwhile "
            f"({conditions['others_cores'] + conditions['stolen_cores']:.2f} cores)."
        )
    if not warm_up["steady"]:
        found.append(f"After {warm_up['requests']} requests latencies were not steady yet.")
    if power.get("throttled"):
        found.append(f"Kept down meanwhile: {', '.join(power['throttled'])}.")
    drift = conditions.get("drift") or {}
    if drift.get("clear") and drift["slower"] > SLOWER:
        hotter = [
            f"{name} went from {each['before']:.0f} to {each['after']:.0f} degrees"
            for name, each in (conditions.get("celsius") or {}).items()
            if each["after"] > each["before"] + COOLED
        ]
        found.append(
            f"The last rounds were {100 * drift['slower']:.0f} % slower than the first"
            f"{': ' + ', '.join(hotter) if hotter else ''}."
        )
    failed = Counter(each.status for each in observed if each.status != OK)
    if failed:
        told = ", ".join(f"{count} {status}" for status, count in failed.most_common())
        found.append(f"Not answered, and not in the figures: {told}.")
    return found
