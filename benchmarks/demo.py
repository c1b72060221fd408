"""`make demo`: exports the shipped checkpoint, starts the server, generates over gRPC.

Leaves demo/index.html with captioned images, clips and a table of measured times. Everything that
it shows came through the socket of a real server process.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nuwa.runtime import media
from nuwa.runtime.client import Client

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "checkpoints" / "sprites"
COLOURS = ("red", "green", "blue", "yellow")
MOTIONS = (
    "left",
    "right",
    "up",
    "down",
    "left then right",
    "right then left",
    "up then down",
    "down then up",
)
SAMPLING = {"guidance_scale": 2.0, "temperature": 0.7}
SCALE = 3


@dataclass
class Timed:
    """One generation: what was asked for, what came, and how long the caller waited."""

    caption: str
    result: Any  # ImageResult or ClipResult
    seconds: float


@dataclass
class Demo:
    """What the page shows."""

    images: list[Timed] = field(default_factory=list)
    clips: list[Timed] = field(default_factory=list)
    rasters: list[Timed] = field(default_factory=list)
    predictions: list[Timed] = field(default_factory=list)
    ready: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="(%(default)s)")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="(%(default)s)")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    bundle = out / "bundle"
    export(arguments.checkpoint, bundle)
    demo = Demo()
    with Server(bundle, out / "server.log") as server:
        print(server.line)
        demo.ready = server.line
        with Client(server.address) as client:
            generate(client, demo)
    rows = table(demo)
    write_page(out, demo, rows)
    for name, value in rows:
        print(f"{name:<52} {value}")
    print(f"open {out / 'index.html'}")
    return 0


def export(checkpoint: Path, bundle: Path) -> None:
    """Exports unless the bundle is already that of this checkpoint."""
    stamp = bundle.with_name("bundle.source.json")
    source = {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir())}
    source |= {"mtime": max(path.stat().st_mtime for path in checkpoint.iterdir())}
    complete = (bundle / "manifest.json").exists() and stamp.exists()
    if complete and json.loads(stamp.read_text()) == source:
        print(f"using {bundle}, exported before")
        return
    began = time.perf_counter()
    command = ["nuwa", "export", str(checkpoint), str(bundle), "--overwrite"]
    subprocess.run([sys.executable, "-m", "nuwa.runtime", *command[1:]], check=True)
    print(f"exported in {time.perf_counter() - began:.1f} s")
    stamp.write_text(json.dumps(source))


class Server:
    """`nuwa serve` in a process of its own, on a free loopback port."""

    def __init__(self, bundle: Path, log: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nuwa.runtime", "serve", str(bundle), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self._process.stdout is not None
        self.line = self._process.stdout.readline().strip()
        found = re.search(r"ready on (\S+):", self.line)
        if found is None:
            raise RuntimeError(f"the server did not start: {log.read_text() or self.line!r}")
        self.address = found.group(1)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=60)


def generate(client: Client, demo: Demo) -> None:
    """The pictures and clips of the page, one call after the other."""
    client.generate_image("t2i", "a red 3 on a black background .", seed=0)  # warm-up
    client.generate_video("t2v", "a red 3 on a black background moving left .", seed=0)
    for digit in range(10):
        for colour in (COLOURS[digit % 4], COLOURS[(digit + 2) % 4]):
            caption = f"a {colour} {digit} on a black background ."
            demo.images.append(timed_image(client, caption, seed=digit))
    for number, motion in enumerate(MOTIONS):
        caption = (
            f"a {COLOURS[number % 4]} {(3 * number + 2) % 10} on a black background "
            f"moving {motion} ."
        )
        demo.clips.append(timed_clip(client, caption, seed=number))
    for number in range(2):
        demo.rasters.append(
            timed_clip(client, demo.clips[number].caption, seed=number, schedule="raster")
        )
        same = np.array_equal(demo.rasters[number].result.frames, demo.clips[number].result.frames)
        print(f"clip {number}, raster and wave decoding: {'same' if same else 'DIFFERENT'} pixels")
    for number in range(2):
        given = demo.clips[number].result.frames[:4]
        began = time.perf_counter()
        result = client.generate_video(
            "v2v", video=given, frame_count=10, seed=number, temperature=0.7
        )
        demo.predictions.append(
            Timed("prediction from 4 given frames", result, time.perf_counter() - began)
        )


def timed_image(client: Client, caption: str, seed: int) -> Timed:
    began = time.perf_counter()
    result = client.generate_image("t2i", caption, seed=seed, **SAMPLING)
    return Timed(caption, result, time.perf_counter() - began)


def timed_clip(client: Client, caption: str, seed: int, schedule: str = "wave") -> Timed:
    began = time.perf_counter()
    result = client.generate_video("t2v", caption, seed=seed, **SAMPLING, schedule=schedule)
    return Timed(caption, result, time.perf_counter() - began)


def table(demo: Demo) -> list[tuple[str, str]]:
    """Medians in milliseconds."""

    def median(values) -> str:
        return f"{1e3 * statistics.median(values):.1f} ms"

    rows = [("server", demo.ready.removeprefix("nuwa: "))]
    groups = (
        ("image", demo.images),
        ("clip, waves", demo.clips),
        ("clip, one position a step", demo.rasters),
    )
    for name, group in groups:
        times = [timed.result.timings for timed in group]
        rows += [
            (f"{name}: steps", str(times[0].steps)),
            (f"{name}: encode text", median(t.encode for t in times)),
            (f"{name}: per step", median(t.decode / t.steps for t in times)),
            (f"{name}: decode, all steps", median(t.decode for t in times)),
            (f"{name}: tokens to pixels", median(t.pixels for t in times)),
            (f"{name}: end to end through gRPC", median(timed.seconds for timed in group)),
        ]
    return rows


def write_page(out: Path, demo: Demo, rows: list[tuple[str, str]]) -> None:
    """index.html and the pictures it shows, in one folder."""
    figures = []
    for number, timed in enumerate(demo.images):
        name = f"image-{number:02d}.png"
        save_png(out / name, timed.result.pixels)
        figures.append(figure(name, timed.caption))
    clips = []
    for number, timed in enumerate([*demo.clips, *demo.predictions]):
        name = f"clip-{number:02d}.webp"
        (out / name).write_bytes(media.encode_animation(timed.result.frames, "webp", 5))
        clips.append(figure(name, timed.caption))
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    page = PAGE.format(images="".join(figures), clips="".join(clips), rows=cells)
    (out / "index.html").write_text(page, encoding="utf-8")
    (out / "times.json").write_text(json.dumps(dict(rows), indent=2) + "\n")


def save_png(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


def figure(name: str, caption: str) -> str:
    return (
        f'<figure><img src="{name}" width="{64 * SCALE}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption.removesuffix(' .'))}</figcaption></figure>"
    )


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>nuwa-runtime demo</title>
<style>
  body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; }}
  .sheet {{ display: flex; flex-wrap: wrap; gap: 12px; }}
  figure {{ margin: 0; width: 192px; }}
  img {{ image-rendering: pixelated; background: #000; }}
  figcaption {{ font-size: 13px; color: #444; }}
  td {{ padding: 2px 16px 2px 0; }} td + td {{ font-variant-numeric: tabular-nums; }}
</style>
<h1>nuwa-runtime demo</h1>
<p>Everything here was generated by the shipped <code>sprites</code> checkpoint, exported to ONNX
and served over gRPC on this machine.</p>
<h2>Images from captions</h2><div class="sheet">{images}</div>
<h2>Clips from captions, and the continuation of two of them</h2><div class="sheet">{clips}</div>
<h2>Measured times</h2><p>Medians, one request at a time.</p><table>{rows}</table>
"""


if __name__ == "__main__":
    raise SystemExit(main())
