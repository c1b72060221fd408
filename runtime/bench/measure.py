"""A whole measurement: card, warm-up, scenario, and the result that schema.py describes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from nuwa.spec.known import known_cells
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

from ..bundle import open_bundle
from . import card as cards
from . import figures, machine, rates
from .asking import Asker
from .observation import OK, Observation
from .running import Settings, run, warmed
from .schema import SCHEMA
from .targets import Target
from .workload import GIVEN_FRAMES, Workload

BUSY = 0.3  # load average for each core from which a note says so


def measure(
    target: Target,
    workload: Workload,
    settings: Settings,
    *,
    command: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The result; what is wrong with the request is raised as it is, before anything is measured.

    say: hears what is being done.
    """
    began, described = datetime.now(UTC), machine.describe()
    settings = replace(settings, outstanding=settings.outstanding or 2 * (target.slots or 4))
    asker = Asker(target.client, workload, target.info, target.model)
    cold = time.perf_counter()
    asker.check()
    cold = time.perf_counter() - cold
    say("the machine's rates")
    card = describe_card(target, workload, settings)
    say("warm-up")
    warm_up = {"first_seconds": cold} | warmed(asker, settings.warm_up, settings.at_once)
    target.steps.clear()
    machine.forget_peak()
    say(settings.scenario)
    sampler = machine.Sampler()
    sampler.start()
    try:
        seen = run(asker, target, settings, warm_up["requests"])
    finally:
        power = sampler.stop()
    observed = seen.all
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "when": began.isoformat(timespec="seconds"),
        "command": command,
        "notes": [*seen.notes, *notes(target, described, warm_up, power, observed)],
        "machine": described,
        "model": describe_model(target, settings),
        "workload": describe_workload(target, workload),
        "scenario": describe_scenario(settings),
        "card": card,
        "warm_up": warm_up,
        "outcomes": dict(Counter(each.status for each in observed)),
        "metrics": figures.metrics(seen, workload, settings, card.get("floor_seconds")),
        "phases": figures.phases(observed) | figures.encoding(asker),
        "steps": figures.steps(target.steps, card),
        "load": seen.load,
        "timeline": {"requests": figures.timeline(observed)},
        "memory": memory(target, power),
        "power": power if target.local else None,
        "rounds": figures.in_rounds(seen, workload, settings),
    }
    if seen.loadgen is not None:
        result["loadgen"] = seen.loadgen
    return result


def describe_card(target: Target, workload: Workload, settings: Settings) -> dict[str, Any]:
    """What a generation must move and compute, and how long that takes at this machine's rates.

    Empty where the bundle's folder is not known; without rates and floor where these were not
    asked for, or for what is not computed by this machine's processor.
    """
    if target.bundle is None:
        return {}
    manifest, task = open_bundle(target.bundle, verify=False).manifest, workload.task
    sampling = target.info.sampling.get(task, Sampling())
    frames = workload.frame_count(target.info)
    query = workload.query(0, target.info)
    grid, known = manifest.config.decoder.grid, None
    if task.needs_mask:
        known = known_cells(query.options["mask"], grid.height, grid.width)
    made = cards.card(
        manifest,
        task,
        frames=frames,
        samples=workload.samples,
        guidance=workload.sampling.get("guidance_scale", sampling.guidance_scale),
        schedule=workload.schedule,
        given_frames=min(GIVEN_FRAMES, frames - 1) if task is Task.V2V else 0,
        known=known,
    )
    found = made.to_json()
    if not settings.rates or not target.local or not target.info.backend.endswith("cpu"):
        return found
    quota = machine.cpu_quota(machine.Hardware())
    threads = target.threads or machine.usable_cores() or 1
    if quota is not None:
        threads = max(1, min(threads, int(quota)))
    measured = rates.measure(
        cards.products(manifest.config),
        made.row_counts,
        threads=threads,
        working_set=made.weights_bytes,
    )
    return found | cards.floor(made, measured).to_json() | {"rates": measured.to_json()}


def describe_model(target: Target, settings: Settings) -> dict[str, Any]:
    info = target.info
    evaluation, reason = None, "the bundle's folder is not known"
    if target.bundle is not None:
        by_task, told = cards.evaluation_of(target.bundle, settings.evaluation)
        reason = told or ""
        if by_task is not None:
            evaluation = {
                f"{task} {name}": score["model"]
                for task, result in by_task.items()
                for name, score in result["scores"].items()
            }
    return {
        "name": info.name,
        "bundle_hash": info.bundle_hash,
        "precision": info.precision,
        "backend": info.backend,
        "parameters": info.parameter_count,
        "evaluation": evaluation,
        "evaluation_note": reason,
    }


def describe_workload(target: Target, workload: Workload) -> dict[str, Any]:
    return {
        "task": str(workload.task),
        "frames": workload.frame_count(target.info),
        "samples": workload.samples,
        "schedule": workload.schedule,
        "sampling": asdict(target.info.sampling.get(workload.task, Sampling()))
        | dict(workload.sampling),
        "output_format": workload.output_format,
        "prompts": [workload.prompt(number) for number in range(len(workload.prompts) or 6)],
        "seed": workload.seed,
        "target": target.title,
        "slots": target.slots,
        "threads": target.threads,
    }


def describe_scenario(settings: Settings) -> dict[str, Any]:
    """Its name and what of the settings it heeds."""
    of_scenario: dict[str, dict[str, Any]] = {
        "multi-stream": {"streams": settings.streams},
        "offline": {"outstanding": settings.outstanding},
        "server": {
            "rate": settings.rate,
            "slo_seconds": settings.bound,
            "slo_quantile": f"{settings.share:g}",
        },
    }
    extent = settings.extent
    return {
        "name": settings.scenario,
        "driven_by": "LoadGen" if settings.loadgen is not None else "nuwa bench",
        "seconds": extent.seconds,
        "rounds": extent.rounds,
        "least": extent.least,
        "most": extent.most,
        **of_scenario.get(settings.scenario, {}),
    }


def memory(target: Target, power: Mapping[str, Any]) -> dict[str, Any]:
    """Of this process, with the engine if it is in it, while it was measured."""
    seen = power.get("seen") or {}
    devices = [
        each["most"] for name, each in seen.items() if name.endswith("_process_bytes") and each
    ]
    peak = machine.peak_memory()["peak_process_bytes"]
    return {
        "process_peak_bytes": peak if target.local else None,
        "device_peak_bytes": max(devices, default=None) if target.local else None,
    }


def notes(
    target: Target,
    described: Mapping[str, Any],
    warm_up: Mapping[str, Any],
    power: Mapping[str, Any],
    observed: list[Observation],
) -> list[str]:
    """What a reader has to know to believe the rest."""
    found = []
    if not target.local:
        found.append("The machine described here is the client's.")
    load, cores = described.get("load_average"), described.get("cores") or 1
    if load and load[0] > BUSY * cores:
        found.append(f"The machine was busy before: load average {load[0]:.2f} on {cores} cores.")
    if not warm_up["steady"]:
        found.append(f"After {warm_up['requests']} requests latencies were not steady yet.")
    if power.get("throttled"):
        found.append(f"Kept down meanwhile: {', '.join(power['throttled'])}.")
    failed = Counter(each.status for each in observed if each.status != OK)
    if failed:
        told = ", ".join(f"{count} {status}" for status, count in failed.most_common())
        found.append(f"Not answered, and not in the figures: {told}.")
    return found
