"""The pictures of docs/decode-engine.md: the schedule over the grid, and timelines of real runs.

pip install matplotlib
python benchmarks/pictures.py BUNDLE --out docs
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from throughput import mixed

from nuwa.runtime.backends.base import steps_in_turn
from nuwa.runtime.core import GenerationRequest
from nuwa.runtime.engine import Engine, load_engine
from nuwa.runtime.scheduler import Scheduler
from nuwa.spec.grid import Extent, Grid
from nuwa.spec.schedule import wave_schedule

COLOURS = {"prepare": "tab:orange", "decode": "tab:blue", "pixels": "tab:green"}
CLOCK = time.perf_counter


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="a bundle for all eight tasks")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--level", default="digits", help="of the sprites (%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    engine = load_engine(options.bundle, slots=8, threads=options.threads)
    draw_schedule(Grid(10, 8, 8), Extent(5, 3, 3), options.out / "schedule.png")
    requests = mixed(engine, 1, options.level)
    clip = [request for request in requests if request.task == "t2v"]
    run(engine, requests)  # warm-up
    draw_timeline(run(engine, clip), "one clip", options.out / "timeline-clip.png")
    draw_timeline(run(engine, requests), "eight tasks at once", options.out / "timeline-mixed.png")
    return 0


@dataclass
class Trace:
    """When what was done for each request, in seconds since all were submitted."""

    names: list[str]
    bars: list[tuple[str, int, float, float]] = field(default_factory=list)  # kind, request, span
    rows: list[tuple[float, float, int]] = field(default_factory=list)  # of every step


def run(engine: Engine, requests: list[GenerationRequest]) -> Trace:
    """All requests at once."""
    trace = Trace([f"{request.task}".upper() for request in requests])
    number = {id(request): index for index, request in enumerate(requests)}
    prepare, admit, pixels, backend_step = (
        engine.prepare,
        engine.admit,
        engine.pixels,
        engine._backend.step,
    )
    stream_of: dict = {}
    painted: list[int] = []

    def timed_prepare(request):
        began = CLOCK()
        prepared = prepare(request)
        trace.bars.append(("prepare", number[id(request)], began, CLOCK()))
        return prepared

    def noted_admit(prepared, slot, sample_index):
        admit(prepared, slot, sample_index)
        stream_of[engine._sequences[slot].stream] = number[id(prepared.request)]

    def timed_step(parts):
        began = CLOCK()
        finite = backend_step(parts)
        ended = CLOCK()
        trace.rows.append((began, ended, sum(p.count * len(p.stream.lanes) for p in parts)))
        for part in parts:
            trace.bars.append(("decode", stream_of[part.stream], began, ended))
        return finite

    def timed_pixels(tokens):
        began = CLOCK()
        made = pixels(tokens)
        trace.bars += [("pixels", index, began, CLOCK()) for index in painted]
        return made

    engine.prepare, engine.admit, engine.pixels = timed_prepare, noted_admit, timed_pixels
    engine._backend.step = timed_step
    engine._backend.steps = partial(steps_in_turn, timed_step)
    try:
        with Scheduler(engine) as scheduler:
            paint = scheduler._painter._paint

            def noted_paint(pictures):
                painted[:] = {number[id(each.submission.handle.request)] for each in pictures}
                paint(pictures)

            scheduler._painter._paint = noted_paint
            start = CLOCK()
            for handle in [scheduler.submit(request) for request in requests]:
                handle.result()
    finally:
        del engine.prepare, engine.admit, engine.pixels
        del engine._backend.step, engine._backend.steps
    trace.bars = [(kind, index, a - start, b - start) for kind, index, a, b in trace.bars]
    trace.rows = [(a - start, b - start, rows) for a, b, rows in trace.rows]
    return trace


def draw_schedule(grid: Grid, extent: Extent, path: Path) -> None:
    """In which wave every cell of every frame is decoded."""
    schedule = wave_schedule(grid, (extent,), "nearest")
    wave = np.empty(grid.size, int)
    for index, call in enumerate(schedule.calls):
        wave[call] = index
    figure, axes = plt.subplots(2, 5, figsize=(11, 4.8), layout="constrained")
    for frame, axis in enumerate(axes.flat):
        cells = wave.reshape(grid.shape)[frame]
        image = axis.imshow(cells, cmap="viridis", vmin=0, vmax=schedule.steps - 1)
        for (row, column), number in np.ndenumerate(cells):
            light = number < 0.6 * schedule.steps
            axis.text(
                column,
                row,
                number,
                ha="center",
                va="center",
                fontsize=6,
                color="w" if light else "k",
            )
        axis.set_title(f"frame {frame}", fontsize=9)
        axis.set_xticks([]), axis.set_yticks([])
    figure.colorbar(image, ax=axes, label="wave")
    figure.suptitle(f"{grid}, window {extent}: {grid.size} positions in {schedule.steps} waves")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_timeline(trace: Trace, title: str, path: Path) -> None:
    """A line a request, and the rows of every step below."""
    height = 1.6 + 0.35 * len(trace.names)
    figure, (lines, rows) = plt.subplots(
        2,
        1,
        figsize=(11, height + 1.2),
        sharex=True,
        layout="constrained",
        height_ratios=[height, 1.2],
    )
    for kind, index, began, ended in trace.bars:
        offset = 0.28 if kind == "pixels" else 0.0
        lines.barh(
            index + offset,
            1e3 * (ended - began),
            0.26 if kind == "pixels" else 0.5,
            left=1e3 * began,
            color=COLOURS[kind],
            edgecolor="white",
            linewidth=0.3,
        )
    lines.set_yticks(range(len(trace.names)), trace.names)
    lines.invert_yaxis()
    lines.legend(
        handles=[Patch(color=c, label=name) for name, c in COLOURS.items()], loc="upper right"
    )
    lines.set_title(title)
    _draw_rows(rows, trace)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_rows(axis: Axes, trace: Trace) -> None:
    for began, ended, count in trace.rows:
        axis.bar(
            1e3 * began,
            count,
            1e3 * (ended - began),
            align="edge",
            color=COLOURS["decode"],
            edgecolor="white",
            linewidth=0.3,
        )
    axis.set_ylabel("rows a step")
    axis.set_xlabel("ms")


if __name__ == "__main__":
    raise SystemExit(main())
