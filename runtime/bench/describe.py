"""What is measured, in the words of a result: model, workload, scenario, and the card with floors.

docs/bench-result.md says what each field is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from nuwa.spec.known import known_cells
from nuwa.spec.sampling import Sampling
from nuwa.spec.tasks import Task

from ..bundle import open_bundle, read_manifest
from . import card as cards
from . import device_rates, machine, rates
from .floor import floor
from .hardware import Hardware
from .running import Settings
from .targets import Target
from .workload import Workload, frames_sent

NOT_ASKED = "No floor: rates were not asked for."
ELSEWHERE = (
    "No floor: the machine that measures need not be the server's. Measured in process there, "
    "there is one."
)
BYTES_ONLY = (
    "The floor is of moving bytes alone: products were measured in {measured}, and the bundle "
    "computes in {own}."
)
APART = 0.1  # of the rates before a run and after it, from which a note says so


def given_frames(workload: Workload, frames: int) -> int:
    """Of a clip's frames those that the client sent, which come back first."""
    return frames_sent(frames) if workload.task is Task.V2V else 0


Measure = Callable[[int], tuple[rates.Rates | None, str]]  # (repeats) -> (rates, what to know)


@dataclass(frozen=True)
class Described:
    """What a generation must move and compute, and how long that takes at this machine's rates.

    rates: None where these were not asked for or cannot be had, as `note` says; at_once:
    generations that can share a step; measure: how they are measured, again.
    """

    card: cards.Card
    rates: rates.Rates | None
    note: str
    at_once: float
    measure: Measure

    def again(self) -> Described:
        """With the faster rates of both times."""
        if self.rates is None:
            return self
        after, _ = self.measure(rates.REPEATS_AGAIN)
        return self if after is None else replace(self, rates=rates.faster(self.rates, after))

    def notes(self) -> list[str]:
        """For the result, beside that of the floor."""
        apart = 0.0 if self.rates is None else rates.apart(self.rates)
        if apart <= APART:
            return []
        return [
            f"The machine's rates before and after the run were {100 * apart:.0f} % apart; the "
            "floor is of the faster ones."
        ]

    def to_json(self) -> dict[str, Any]:
        if self.rates is None:
            return self.card.to_json() | {"floor_note": self.note}
        least, note = floor(self.card, self.rates), self.note
        together = {"generations": self.at_once, "seconds": least.together(self.at_once)}
        if least.products_seconds is None:
            own = self.card.products_precision
            note = BYTES_ONLY.format(measured=self.rates.precision, own=own)
        return (
            self.card.to_json()
            | least.to_json()
            | {"floor_together": together, "rates": self.rates.to_json()}
            | ({"floor_note": note} if note else {})
        )


def describe_card(
    target: Target, workload: Workload, settings: Settings, frugal: bool = False
) -> Described | None:
    """With rates as they are now; None where the bundle's folder is not known."""
    if target.bundle is None:
        return None
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
        given_frames=given_frames(workload, frames),
        known=known,
        backend=target.info.backend,
        prompt=all(workload.prompt(number).strip() for number in range(len(workload.prompts) or 1)),
    )
    shapes, at_once = cards.products(manifest.config), _at_once(target, workload, settings)

    def measure(repeats: int) -> tuple[rates.Rates | None, str]:
        return _rates(target, settings, shapes, made, frugal, repeats, at_once)

    measured, note = measure(rates.REPEATS)
    return Described(made, measured, note, at_once, measure)


def _rates(
    target: Target,
    settings: Settings,
    shapes: cards.Shapes,
    made: cards.Card,
    frugal: bool,
    repeats: int,
    at_once: float,
) -> tuple[rates.Rates | None, str]:
    """(of what computes, what to know of them), or (None, why there are none).

    at_once: generations that can share a step.
    """
    if not settings.rates:
        return None, NOT_ASKED
    if not target.local:
        return None, ELSEWHERE
    if not target.info.backend.endswith("cpu"):
        tf32 = "tensorrt" in target.info.backend
        try:
            shared = math.ceil(at_once * made.row_counts[-1])  # rows of a step with all slots full
            found = device_rates.measure(
                shapes,
                [*made.row_counts, shared],
                precision=made.products_precision,
                working_set=made.weights_bytes,
                tf32=tf32,
                frugal=frugal,
                repeats=repeats,
            )
        except Exception as error:  # CUDA's and ONNX Runtime's are of no common kind
            return None, f"No floor: the GPU's rates could not be measured: {error}"
        return found, ""
    quota = machine.cpu_quota(Hardware())
    threads = target.threads or machine.usable_cores()
    if quota is not None:
        threads = max(1, min(threads, int(quota)))
    found = rates.measure(
        shapes,
        made.row_counts,
        threads=threads,
        working_set=made.weights_bytes,
        repeats=repeats,
        frugal=frugal,
    )
    return found, ""


def _at_once(target: Target, workload: Workload, settings: Settings) -> float:
    """Generations that can share a step."""
    samples = target.slots or 1
    if settings.scenario == "multi-stream":
        samples = min(samples, settings.streams * workload.samples)
    elif settings.scenario == "single-stream":
        samples = min(samples, workload.samples)
    return samples / workload.samples


def describe_model(target: Target, settings: Settings) -> dict[str, Any]:
    info = target.info
    evaluation, reason, contents = None, "the bundle's folder is not known", None
    if target.bundle is not None:
        contents = read_manifest(target.bundle).contents_hash
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
        "contents_hash": contents,
        "precision": info.precision,
        "backend": info.backend,
        "runs_on": info.runs_on or None,
        "parameters": info.parameter_count,
        "evaluation": evaluation,
        "evaluation_note": reason,
    }


def describe_workload(target: Target, workload: Workload) -> dict[str, Any]:
    frames = workload.frame_count(target.info)
    return {
        "task": str(workload.task),
        "frames": frames,
        **({"given_frames": given} if (given := given_frames(workload, frames)) else {}),
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
