"""`nuwa bench`: how fast a bundle is on this machine, or a server over the network."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuwa.spec.tasks import parse_task

from ..backends.base import AUTO, BACKENDS
from . import arguments

if TYPE_CHECKING:
    from ..bench.running import Settings
    from ..bench.targets import Target
    from ..bench.workload import Workload

RANDOM = "nuwa.random_bundles"  # entry points: (preset, folder, precision) -> a bundle there
SWEEP = "sweep"
PROFILES: dict[str, dict[str, Any]] = {
    "edge": {"seconds": 30.0, "rounds": 6, "slots": 1, "queue_size": 4, "queries": 2000},
    "server": {"seconds": 120.0, "rounds": 10, "slots": 8, "queue_size": 256, "queries": None},
}
DEFAULTS: dict[str, Any] = {
    "seconds": 60.0,
    "rounds": 10,
    "slots": 1,
    "queue_size": 64,
    "queries": None,
}

DESCRIPTION = """\
Measure latency and throughput of a bundle in this process, or of a server that runs (--server).

Scenarios are those of MLPerf Inference: single-stream (one request after another), multi-stream
(several at once, then the next), server (Poisson arrivals at a rate, or at the highest that keeps
--bound), offline (as many as there can be). Latency counts from when a request was due.

First comes a card: what a generation must move and compute, and the floor that this machine's
measured rates set to it. Quantiles that the number of requests cannot support are refused. With
--out the result is written as result.json (docs/bench-result.md) and as a page, report.html."""

EXAMPLES = """\
examples:
  nuwa bench demo/bundle --task t2v --out bench
  nuwa bench demo/bundle --scenario server --bound 2 --task t2i --slots 8
  nuwa bench --server 127.0.0.1:50051 --scenario offline --outstanding 16
  nuwa bench --preset base --precision fp16 --profile server    random weights, no checkpoint
  nuwa bench demo/bundle --loadgen logs                         MLCommons LoadGen drives
  nuwa bench demo/bundle --baseline bench/result.json           exit status 1 if it is slower
  nuwa bench --compare a/result.json b/result.json
  nuwa bench sweep demo/bundle --threads-of 1,2 --slots-of 1,4,8 --out sweep
"""


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    from ..bench.running import SCENARIOS
    from ..bench.sweep import PREFERENCES

    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "bundle",
        nargs="*",
        metavar="BUNDLE",
        help=f"folder made by `nuwa export`; `{SWEEP} BUNDLE...` tries many settings",
    )
    parser.add_argument("--server", metavar="HOST:PORT", help="measure a server that runs")
    parser.add_argument("--model", default="", help="of a server that has several")
    parser.add_argument(
        "--preset", metavar="NAME", help="measure a model of this size with random weights"
    )
    parser.add_argument(
        "--precision", default="fp32", help="of the preset's weights (default: %(default)s)"
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two results")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="an earlier result")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="differences below it are not told (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results and report")
    parser.add_argument(
        "--scores", type=Path, metavar="FILE", help="report of `nuwa evaluate` on this bundle"
    )
    what = parser.add_argument_group("what is asked for")
    what.add_argument("--task", default="t2v", help="(default: %(default)s)")
    what.add_argument("--frames", type=arguments.positive, metavar="N", help="of a clip")
    what.add_argument("--samples", type=arguments.positive, default=1, metavar="N")
    what.add_argument("--rank-by", metavar="NAME", help="a ranker, with --samples")
    what.add_argument("--schedule", choices=("wave", "raster"), default="wave")
    what.add_argument("--prompt", action="append", default=[], help="may be repeated")
    what.add_argument(
        "--output-format", choices=("png", "webp", "raw"), default="png", help="of frames"
    )
    what.add_argument("--seed", type=int, default=0, help="of the first request")
    how = parser.add_argument_group("how")
    how.add_argument("--scenario", choices=SCENARIOS, default=SCENARIOS[0])
    how.add_argument(
        "--profile", choices=tuple(PROFILES), help="defaults of small machines, or of servers"
    )
    how.add_argument("--seconds", type=float, metavar="S", help="of measuring (default: 60)")
    how.add_argument("--rounds", type=arguments.positive, metavar="N", help="(default: 10)")
    how.add_argument(
        "--least", type=arguments.positive, default=1, metavar="N", help="queries at the least"
    )
    how.add_argument("--queries", type=arguments.positive, metavar="N", help="at the most")
    how.add_argument("--streams", type=arguments.positive, default=8, help="of multi-stream")
    how.add_argument(
        "--outstanding", type=arguments.positive, metavar="N", help="requests under way, of offline"
    )
    how.add_argument("--rate", type=float, help="requests a second, of server")
    how.add_argument("--bound", type=float, metavar="S", help="latency to be kept, of server")
    how.add_argument(
        "--percentile", type=float, default=99.0, help="of latencies that keep it (default: 99)"
    )
    how.add_argument("--loadgen", type=Path, metavar="DIR", help="LoadGen drives, and logs there")
    how.add_argument("--no-rates", action="store_true", help="no floor: measure only the model")
    tried = parser.add_argument_group(f"what `{SWEEP}` tries")
    tried.add_argument("--backends", default=AUTO, metavar="A,B", help=f"of {', '.join(BACKENDS)}")
    tried.add_argument("--threads-of", metavar="N,N", help="(default: one a core)")
    tried.add_argument(
        "--slots-of", default="1,2,4,8", metavar="N,N", help="(default: %(default)s)"
    )
    tried.add_argument("--prefer", choices=PREFERENCES, default="balance")
    arguments.add_sampling(parser)
    arguments.add_engine(parser, slots=True)
    parser.add_argument("--queue-size", type=arguments.positive, metavar="N")
    arguments.add_access(parser)
    parser.set_defaults(slots=None)
    return run


def run(args: argparse.Namespace) -> int:
    if args.compare:
        first, second = args.compare
        return _compare(first, second, args.threshold)
    profile = DEFAULTS | PROFILES.get(args.profile, {})
    for name, value in profile.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.bundle[:1] == [SWEEP]:
        return _sweep(args)
    return _measure(args)


def _measure(args: argparse.Namespace) -> int:
    from rich.console import Console

    from ..bench import compare, html, schema, table
    from ..bench.measure import measure

    before = None if args.baseline is None else schema.read(args.baseline)
    settings, workload = _settings(args), _workload(args)
    with _target(args) as target:
        result = measure(target, workload, settings, command=_command_line(), say=_say)
    if args.preset:
        result["notes"].append(
            "Random weights, without guidance (which doubles the rows) unless it was asked for."
        )
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        schema.write(args.out / "result.json", result)
        html.write(args.out / "report.html", result)
        _say(f"written: {args.out / 'result.json'} and {args.out / 'report.html'}")
    table.print(result, Console())
    status = 0 if result["outcomes"].get("ok") else 1
    if before is not None:
        differences = compare.compare_results(before, result, args.threshold)
        compare.print_differences(differences, compare.differs(before, result))
        status = max(status, compare.baseline_exit(differences))
    print(schema.last_line(result))
    return status


def _compare(a: Path, b: Path, threshold: float) -> int:
    from ..bench import compare, schema

    first, second = schema.read(a), schema.read(b)
    compare.print_differences(
        compare.compare_results(first, second, threshold), compare.differs(first, second)
    )
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from ..bench import schema, sweep
    from ..bench.sweep_report import page, print_outcomes

    bundles = args.bundle[1:]
    if not bundles:
        raise ValueError("which bundles? name their folders after `sweep`")
    unknown = [name for name in args.backends.split(",") if name not in BACKENDS]
    if unknown:
        raise ValueError(f"backend {unknown[0]!r} is not one of {', '.join(BACKENDS)}")
    threads = _numbers(args.threads_of, "--threads-of") if args.threads_of else [None]
    wanted = list(
        sweep.choices(
            bundles, args.backends.split(","), threads, _numbers(args.slots_of, "--slots-of")
        )
    )
    workload = _workload(args)
    outcomes = sweep.sweep(wanted, workload, args.seconds, _say)
    print_outcomes(outcomes)
    chosen = sweep.best(outcomes, args.prefer)
    config = sweep.to_toml(chosen)
    result = {"outcomes": sweep.to_json(outcomes), "best": sweep.to_json([chosen])[0]}
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        schema.replace(args.out / "sweep.json", json.dumps(result, indent=2) + "\n")
        schema.replace(args.out / "server.toml", config)
        schema.replace(args.out / "sweep.html", page(outcomes, chosen, _command_line()))
        _say(f"written: sweep.json, sweep.html and server.toml in {args.out}")
    else:
        print(config, end="")
    print(json.dumps(result))
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    from ..bench.running import Settings
    from ..bench.scenarios import Extent

    if not args.seconds > 0:
        raise ValueError(f"--seconds {args.seconds} is not above 0")
    if not 0 < args.percentile < 100:
        raise ValueError(f"--percentile {args.percentile} is not between 0 and 100")
    for name in ("rate", "bound"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} {value} is not above 0")
    return Settings(
        scenario=args.scenario,
        extent=Extent(args.seconds, args.rounds, args.least, args.queries),
        streams=args.streams,
        outstanding=args.outstanding,
        rate=args.rate,
        bound=args.bound,
        share=args.percentile / 100,
        rates=not args.no_rates,
        loadgen=args.loadgen,
        evaluation=args.scores,
    )


def _workload(args: argparse.Namespace) -> Workload:
    from ..bench.workload import Workload

    if (args.samples > 1) != (args.rank_by is not None):
        raise ValueError("--samples (above 1) and --rank-by go together")
    return Workload(
        task=parse_task(args.task),
        frames=args.frames,
        samples=args.samples,
        rank_by=args.rank_by,
        schedule=args.schedule,
        prompts=tuple(args.prompt),
        sampling=arguments.sampling(args),
        output_format=args.output_format,
        seed=args.seed,
    )


@contextlib.contextmanager
def _target(args: argparse.Namespace) -> Iterator[Target]:
    """What the arguments name: a bundle, a server, or a preset."""
    from ..bench.targets import in_process, over_grpc

    named = [bool(args.bundle) and not args.server, bool(args.server), bool(args.preset)]
    if sum(named) != 1 or len(args.bundle) > 1:
        raise ValueError("name one thing to measure: a bundle, --server or --preset")
    bundle = Path(args.bundle[0]) if args.bundle else None
    if args.server:
        access = arguments.access(args)
        with over_grpc(args.server, model=args.model, access=access, bundle=bundle) as target:
            yield target
        return
    with contextlib.ExitStack() as stack:
        if bundle is None:
            bundle = stack.enter_context(_random_bundle(args.preset, args.precision))
        crowd = args.streams if args.scenario == "multi-stream" else args.outstanding or 0
        room = max(
            args.queue_size, crowd, 2 * args.slots
        )  # or the bench would be refused by itself
        yield stack.enter_context(
            in_process(bundle, slots=args.slots, queue_size=room, **arguments.engine(args))
        )


@contextlib.contextmanager
def _random_bundle(preset: str, precision: str) -> Iterator[Path]:
    """Made by the part that exports, in a temporary folder."""
    import tempfile

    found = list(importlib.metadata.entry_points(group=RANDOM))
    if not found:
        raise ValueError("--preset needs `pip install 'nuwa-runtime[export]'`")
    with tempfile.TemporaryDirectory(prefix="nuwa-bench-") as folder:
        _say(f"making {preset} with random weights")
        path = Path(folder) / "bundle"
        found[0].load()(preset, path, precision)
        yield path


def _numbers(text: str, flag: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text!r} is not N,N,...") from None
    if min(found) < 1:
        raise ValueError(f"{flag} {text!r}: at least 1 each")
    return found


def _command_line() -> str:
    return shlex.join(["nuwa", *sys.argv[1:]])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
