"""Which options of `nuwa bench` go with which: what would not be heeded is refused."""

from __future__ import annotations

import argparse

from . import arguments

HERE, SERVER, SWEEP, COMPARE = "a bundle or --preset", "--server", "`sweep`", "--compare"
MEASURED = (HERE, SERVER)
# Where each option is heeded. Access to a server, and what of an engine a server has itself, are
# left to arguments.check_place.
PLACES: dict[str, tuple[str, ...]] = {
    "debug": (HERE, SERVER, SWEEP, COMPARE),
    "compare": (COMPARE,),
    "threshold": (HERE, SERVER, COMPARE),
    **dict.fromkeys(
        (
            *("task", "frames", "samples", "rank-by", "schedule", "prompt", "output-format"),
            *("seed", "temperature", "top-k", "top-p", "guidance-scale"),
            *("out", "scores", "profile", "seconds"),
        ),
        (HERE, SERVER, SWEEP),
    ),
    **dict.fromkeys(
        (
            *("against", "baseline", "launches", "loadgen", "no-rates", "in-turns", "instead"),
            *("scenario", "rounds", "least", "queries"),
            *("streams", "outstanding", "rate", "bound", "percentile"),
        ),
        MEASURED,
    ),
    **dict.fromkeys(("server", "metrics", "model"), (SERVER,)),
    **dict.fromkeys(("backend", "threads"), MEASURED),
    **dict.fromkeys(("slots", "queue-size"), (HERE,)),
    **dict.fromkeys(("preset", "precision"), (HERE, SWEEP)),
    **dict.fromkeys(
        ("backends", "threads-of", "slots-of", "buckets-of", "checkpoint", "prefer"), (SWEEP,)
    ),
}
OF_A_SWEEP = {"backend": "backends", "threads": "threads-of", "slots": "slots-of"}
SCENARIOS = {  # options of one scenario alone
    "streams": "multi-stream",
    "outstanding": "offline",
    **dict.fromkeys(("rate", "bound", "percentile"), "server"),
}


def check(args: argparse.Namespace, *, sweep: bool) -> None:
    """ValueError for an option that was said and is not heeded here."""
    place = SWEEP if sweep else COMPARE if args.compare else SERVER if args.server else HERE
    for name in filter(lambda name: said(args, name), PLACES):
        if place not in PLACES[name]:
            of = ", ".join(PLACES[name])
            instead = f"; a sweep has --{OF_A_SWEEP[name]}" if sweep and name in OF_A_SWEEP else ""
            raise ValueError(f"--{name} is of {of}, and not heeded beside {place}{instead}")
        if SCENARIOS.get(name, args.scenario) != args.scenario:
            raise ValueError(f"--{name} is of --scenario {SCENARIOS[name]}, not {args.scenario}")
    if place in MEASURED and said(args, "threshold") and not (args.baseline or args.against):
        raise ValueError("--threshold is of a comparison: of --compare, --baseline and --against")
    if args.compare and args.bundle:
        raise ValueError(f"--compare is of two results, and measures no {args.bundle[0]}")
    arguments.check_place(args)


def said(args: argparse.Namespace, name: str) -> bool:
    """Also as what is the default."""
    return any(word == f"--{name}" or word.startswith(f"--{name}=") for word in args.words)
