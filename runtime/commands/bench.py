"""`nuwa bench`: how fast a bundle is on this machine, or a server over the network."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuwa.spec.files import make_writable
from nuwa.spec.tasks import parse_task

from . import arguments, bench_options

if TYPE_CHECKING:
    from ..bench.running import Settings
    from ..bench.targets import Target
    from ..bench.turns import Turns
    from ..bench.workload import Workload

SWEEP = "sweep"
INTERRUPTED = 130  # exit status
# Rounds, where another run takes turns: short ones see the same machine, but those of many requests
# under way begin and end with fewer.
TURNS, TURNS_OFFLINE = 200, 36
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
--out the result is written as result.json (docs/bench-result.md) and as a page, report.html. The
last line of the standard output is JSON, of --compare and `sweep` too. Ctrl-C ends measuring; what
was measured until then is told.

Exit status: 0; 1 if no request was answered, a --rate missed its --bound, a search found no rate
that keeps it, a launch has no result, or it is slower than --baseline or --against, or that cannot
be told; 2 for what was said wrong, and if nothing of a `sweep` could be measured; 130 for Ctrl-C.

`sweep` measures each combination of bundles, backends, threads, slots and T buckets for --seconds,
and writes sweep.json, sweep.html, and server.toml with the best settings for `nuwa serve --config`.
Precision is of a bundle: name several, or a --checkpoint to be exported in each. T buckets are of
backends whose engines are built for ranges of rows (TensorRT); the others, among them all that run
on a processor, take steps of any size and have nothing to choose."""

EXAMPLES = """\
examples:
  nuwa bench demo/bundle --task t2v --out bench
  nuwa bench demo/bundle --scenario server --bound 2 --task t2i --slots 8
  nuwa bench --server 127.0.0.1:50051 --scenario offline --outstanding 16
  nuwa bench --preset base --precision fp16 --profile server    random weights, no checkpoint
  nuwa bench demo/bundle --loadgen logs                         MLCommons LoadGen drives
  nuwa bench demo/bundle --launches 5 --out bench               five processes, as one result
  nuwa bench demo/bundle --baseline bench/result.json           exit status 1 if it is slower
  nuwa bench new --against old --task t2i                       in turns: exit status 1 if slower
  nuwa bench --compare a/result.json b/result.json
  nuwa bench sweep demo/bundle --threads-of 1,2 --slots-of 1,4,8 --out sweep
  nuwa bench sweep --checkpoint checkpoints/sprites --precision fp32,int8 --out sweep
  nuwa bench sweep demo/bundle --backends tensorrt --buckets-of 64,256/16,64,256 --out sweep
"""


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    from ..bench.running import SCENARIOS
    from . import bench_against, bench_sweep

    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "bundle",
        nargs="*",
        metavar="BUNDLE",
        help="folder made by `nuwa export`; beside --server that of the server's bundle, for the "
        f"card; `{SWEEP} BUNDLE...` tries many settings",
    )
    parser.add_argument("--server", metavar="HOST:PORT", help="measure a server that runs")
    parser.add_argument("--model", default="", help="of a server that has several")
    parser.add_argument(
        "--metrics", metavar="HOST:PORT", help="the server's own (--metrics-port), for its phases"
    )
    parser.add_argument(
        "--preset", metavar="NAME", help="measure a model of this size with random weights"
    )
    parser.add_argument(
        "--precision", help=f"of the preset, or several of `{SWEEP}`: P,P (default: fp32)"
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two results")
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="an earlier result: exit status 1 if this one is slower, or if that cannot be told",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="differences below it are not told (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results and report")
    parser.add_argument(
        "--scores",
        type=Path,
        metavar="FILE",
        help="report of `nuwa evaluate` on this bundle or one of the same files, or a folder of "
        "them (default: those in the bundle's folder)",
    )
    parser.add_argument(
        "--against",
        metavar="WHAT",
        help="measure something else, too, in turns with this and as long, and compare: another "
        "bundle's folder, beside --server another HOST:PORT, or the `nuwa` program of another "
        "version; exit status 1 if this one is slower",
    )
    parser.add_argument(
        "--launches",
        type=arguments.positive,
        metavar="N",
        help="processes one after the other, as two of one build differ by some percent; "
        "--seconds and --rounds are of all together (default: 1; of both with --against "
        f"{bench_against.LAUNCHES}, of --server 1)",
    )
    for word in (bench_against.WORD, bench_against.INSTEAD):
        parser.add_argument(word, help=argparse.SUPPRESS)
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
    how.add_argument(
        "--scenario", choices=SCENARIOS, default=SCENARIOS[0], help="(default: %(default)s)"
    )
    how.add_argument(
        "--profile",
        choices=tuple(PROFILES),
        help=f"of small machines, or of servers: other defaults of {_options(PROFILES['edge'])}; "
        "edge also takes little memory for the machine's rates, and lets it cool down after them",
    )
    how.add_argument(
        "--seconds", type=float, metavar="S", help=f"of measuring ({_default('seconds')})"
    )
    how.add_argument(
        "--rounds",
        type=arguments.positive,
        metavar="N",
        help=f"({_default('rounds')}; --against: {TURNS}, of offline {TURNS_OFFLINE})",
    )
    how.add_argument(
        "--least",
        type=arguments.positive,
        default=1,
        metavar="N",
        help="queries at the least (default: %(default)s)",
    )
    how.add_argument(
        "--queries",
        type=arguments.positive,
        metavar="N",
        help=f"at the most, of a search at each rate ({_default('queries')})",
    )
    how.add_argument(
        "--streams",
        type=arguments.positive,
        default=8,
        metavar="N",
        help="requests of a query of multi-stream (default: %(default)s)",
    )
    how.add_argument(
        "--outstanding",
        type=arguments.positive,
        metavar="N",
        help="requests under way, of offline (default: two for each slot)",
    )
    how.add_argument(
        "--rate",
        type=float,
        help="requests a second, of server (default: the highest that keeps --bound; to find it "
        "takes some 50 times as long as one rate does at the least, which is --seconds, ten times "
        "--bound, or as long as 459 requests take, of p99, whichever is longest; it tells how it "
        "goes on)",
    )
    how.add_argument("--bound", type=float, metavar="S", help="latency to be kept, of server")
    how.add_argument(
        "--percentile",
        type=float,
        default=99.0,
        metavar="P",
        help="of latencies that keep it (default: 99)",
    )
    how.add_argument("--loadgen", type=Path, metavar="DIR", help="LoadGen drives, and logs there")
    how.add_argument("--no-rates", action="store_true", help="no floor: measure only the model")
    bench_sweep.add_arguments(parser.add_argument_group(f"what `{SWEEP}` tries"))
    arguments.add_sampling(parser)
    arguments.add_engine(parser, slots=False)
    room = parser.add_argument_group("how much of an engine here")
    room.add_argument(
        "--slots",
        type=arguments.positive,
        metavar="N",
        help=f"samples that are decoded at a time; others wait ({_default('slots')})",
    )
    room.add_argument(
        "--queue-size",
        type=arguments.positive,
        metavar="N",
        help="requests that wait before others are refused; at the least as many as the scenario "
        f"has under way, and two for each slot ({_default('queue_size')})",
    )
    arguments.add_access(parser)
    return run


def _default(name: str) -> str:
    """As help says it: what it is, and what profiles have instead."""
    usual = DEFAULTS[name]
    others = [
        f"{key}: {_plain(each[name])}" for key, each in PROFILES.items() if each[name] != usual
    ]
    return f"default: {_plain(usual)}; --profile {', '.join(others)}"


def _plain(value: float | None) -> str:
    return "no limit" if value is None else f"{value:g}"


def _options(names: Iterable[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def run(args: argparse.Namespace) -> int:
    if not args.threshold >= 0:
        raise ValueError(f"--threshold {args.threshold} is not at least 0")
    if args.against is not None and (args.compare or args.baseline):
        raise ValueError("--against compares by itself: no --compare or --baseline beside it")
    swept = args.bundle[:1] == [SWEEP]
    bench_options.check(args, sweep=swept)
    if args.compare:
        first, second = args.compare
        return _compare(first, second, args.threshold)
    profile = DEFAULTS | PROFILES.get(args.profile, {})
    if args.against or args.in_turns:
        profile |= {"rounds": TURNS_OFFLINE if args.scenario == "offline" else TURNS}
    for name, value in profile.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if swept:
        from . import bench_sweep

        args.bundle = args.bundle[1:]
        return bench_sweep.run(args, _settings(args), _workload(args))
    from . import bench_against

    if args.against is not None:
        return bench_against.run(args, _settings(args).extent, say)
    if args.instead is not None:
        bench_against.measure_instead(args)
    if (args.launches or 1) > 1:
        return _launched(args)
    return _measure(args, _turns(args))


def _turns(args: argparse.Namespace) -> Turns:
    from ..bench.turns import Following, Turns

    return Turns() if args.in_turns is None else Following(args.in_turns)


def _measure(args: argparse.Namespace, turns: Turns) -> int:
    from ..bench import compare, loadgen, memory, schema
    from ..bench.measure import measure

    before = None if args.baseline is None else schema.read(args.baseline)
    settings = dataclasses.replace(_settings(args), turns=turns)
    workload = _workload(args)
    for folder in (args.out, args.loadgen):
        if folder is not None:
            make_writable(folder)
    if args.loadgen is not None:
        loadgen.check_installed()
    on_devices = memory.used_on_devices()
    with _target(args) as target:
        _check_scores(target, args.scores)
        if before is not None:
            compare.check_comparable(before, _conditions(target, workload, settings))
        result = measure(
            target,
            workload,
            settings,
            command=command_line(args),
            frugal=args.profile == "edge",
            metrics_at=args.metrics,
            devices_before=on_devices,
            say=say,
        )
    if args.preset:
        result["notes"].append(
            "Random weights, without guidance (which doubles the rows) unless it was asked for."
        )
    return _finish(args, result, before)


def _launched(args: argparse.Namespace) -> int:
    """As _measure, in several processes; status 1 also if not all of them have a result."""
    from ..bench import schema
    from . import bench_launches

    bench_launches.check(args)
    before = None if args.baseline is None else schema.read(args.baseline)
    if args.out is not None:
        make_writable(args.out)
    result, whole = bench_launches.run(args, _settings(args).extent, before, say)
    result["command"] = command_line(args)
    return _finish(args, result, before) or int(not whole)


def _finish(args: argparse.Namespace, result: dict[str, Any], before: dict[str, Any] | None) -> int:
    """Tells the result, and what it is beside the one before; the exit status."""
    from ..bench import judged, schema

    told = dict(result)  # and what is only in the last line
    try:
        _report(result, args.out)
        if before is not None and not result.get("interrupted"):
            told["comparison"] = _compared(before, result, args.threshold)
    finally:  # whatever cannot be written or shown, it was measured
        print(schema.last_line(told), flush=True)
    if result.get("interrupted"):
        return INTERRUPTED
    slower = "comparison" in told and told["comparison"]["status"]
    missed = judged.rate_kept(result) is False or judged.found_none(result)
    return 1 if slower or missed or not result["outcomes"].get("ok") else 0


def _conditions(target: Target, workload: Workload, settings: Settings) -> dict[str, Any]:
    """The parts of the result that are known before it is measured."""
    from ..bench.compare import outstanding
    from ..bench.describe import describe_scenario, describe_workload

    settings = dataclasses.replace(
        settings, outstanding=settings.outstanding or outstanding(target.slots)
    )
    return {
        "workload": describe_workload(target, workload),
        "scenario": describe_scenario(settings),
    }


def _check_scores(target: Target, scores: Path | None) -> None:
    """ValueError if scores that were named are not of this bundle."""
    from ..bench.card import evaluation_of

    if scores is None:
        return
    if target.bundle is None:
        raise ValueError("--scores: name the server's bundle, too")
    found, reason = evaluation_of(target.bundle, scores)
    if found is None:
        raise ValueError(f"--scores: {reason}")


def _report(result: dict[str, Any], out: Path | None) -> None:
    from rich.console import Console

    from ..bench import html, schema, table

    if out is not None:
        schema.write(out / "result.json", result)
        html.write(out / "report.html", result)
        say(f"written: {out / 'result.json'} and {out / 'report.html'}")
    table.print(result, Console())


def _compared(before: dict[str, Any], result: dict[str, Any], threshold: float) -> dict[str, Any]:
    """Prints and returns what differs, with the exit status that follows."""
    from ..bench import compare

    differing = compare.differs(before, result)
    try:
        differences = compare.compare_results(before, result, threshold)
    except ValueError as error:  # such as a metric that only one of them has
        say(f"not compared: {error}")
        return compare.to_json([], [*differing, str(error)], threshold) | {"status": 1}
    compare.print_differences(differences, differing)
    status = compare.baseline_exit(differences)
    return compare.to_json(differences, differing, threshold) | {"status": status}


def _compare(a: Path, b: Path, threshold: float) -> int:
    from ..bench import compare, schema

    first, second = schema.read(a), schema.read(b)
    differences = compare.compare_results(first, second, threshold)
    differing = compare.differs(first, second)
    compare.print_differences(differences, differing)
    files = {"a": str(a), "b": str(b)}
    print(schema.last_line(compare.to_json(differences, differing, threshold) | files))
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    from ..bench.running import Settings
    from ..bench.scenarios import Extent

    if not args.seconds > 0:
        raise ValueError(f"--seconds {args.seconds} is not above 0")
    if not 0 < args.percentile < 100:
        raise ValueError(f"--percentile {args.percentile} is not between 0 and 100")
    if args.queries is not None and args.least > args.queries:
        whose = "" if bench_options.said(args, "queries") else f" of --profile {args.profile}"
        raise ValueError(f"--least {args.least} are more than --queries {args.queries}{whose}")
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
        share=float(Decimal(str(args.percentile)) / 100),  # 99.9 / 100 is more than 0.999
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
    if args.precision is not None and not args.preset:
        raise ValueError(f"--precision is of --preset and `{SWEEP}`: a bundle has its own")
    if args.scores is not None and args.preset:
        raise ValueError("--scores: random weights have none")
    bundle = Path(args.bundle[0]) if args.bundle else None
    if args.server:
        access = arguments.access(args)
        with over_grpc(args.server, model=args.model, access=access, bundle=bundle) as target:
            yield target
        return
    with contextlib.ExitStack() as stack:
        if bundle is None:
            bundle = stack.enter_context(_random_bundle(args.preset, args.precision or "fp32"))
        crowd = args.streams if args.scenario == "multi-stream" else args.outstanding or 0
        # Or the bench would be refused by itself.
        room = max(args.queue_size, crowd, 2 * args.slots)
        yield stack.enter_context(
            in_process(bundle, slots=args.slots, queue_size=room, **arguments.engine(args))
        )


@contextlib.contextmanager
def _random_bundle(preset: str, precision: str) -> Iterator[Path]:
    """In a temporary folder."""
    import tempfile

    from ..bench import making

    with tempfile.TemporaryDirectory(prefix="nuwa-bench-") as folder:
        say(f"making {preset} with random weights")
        yield making.random_bundle(preset, Path(folder) / "bundle", precision)


def command_line(args: argparse.Namespace) -> str:
    return shlex.join(["nuwa", "bench", *args.words])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
