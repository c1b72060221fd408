"""`make demo`: exports the shipped checkpoint, starts the server, does all eight tasks over gRPC.

Leaves demo/index.html with inputs, results and a table of measured times. Every result came through
the socket of a real server process; sketches and given pictures are held-out clips of the sprite
world, which the model never saw.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nuwa.runtime import media
from nuwa.runtime.client import Client
from nuwa.spec.palette import MOST_CLASSES, voc_palette
from nuwa.training.sprites.world import CLASSES, COLOURS, FRAMES, MOTIONS, SpriteWorld

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "checkpoints" / "sprites"
SCALE = 3
SPEED = 5  # frames a second
PATCH = 8  # pixels of a token

TITLES = {
    "t2i": "T2I: images from captions",
    "s2i": "S2I: images from sketches (class maps), with a caption",
    "i2i": "I2I: completion of a picture whose one half is hidden",
    "ti2i": "TI2I: part of a picture changed by a caption",
    "t2v": "T2V: clips from captions",
    "s2v": "S2V: clips from sketches, with a caption",
    "v2v": "V2V: prediction from given frames",
    "tv2v": "TV2V: part of a clip changed by a caption",
    "best": "Best of N: eight samples ranked by the text-picture scorer, best first",
}


@dataclass
class Shown:
    """One generation: its caption, what was given (pictures u8 [F, H, W, 3]), what came, how long.

    result: ImageResult or ClipResult.
    """

    task: str
    caption: str
    given: list[np.ndarray]
    frames: np.ndarray
    result: Any
    seconds: float


@dataclass
class Demo:
    """What the page shows."""

    shown: list[Shown] = field(default_factory=list)
    rasters: list[Shown] = field(default_factory=list)
    ready: str = ""

    def of(self, task: str) -> list[Shown]:
        return [each for each in self.shown if each.task == task]


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
    model = client.get_model()
    world = SpriteWorld("digits", "test")
    client.generate_image("t2i", "a red 3 on a black background .", seed=0)  # warm-up
    client.generate_video("t2v", "a red 3 on a black background moving left .", seed=0)
    tasks: dict[str, Callable[[Client, SpriteWorld, Demo], None]] = {
        "t2i": text_to_image,
        "s2i": sketches,
        "i2i": completion,
        "ti2i": image_manipulation,
        "t2v": text_to_video,
        "s2v": sketch_clips,
        "v2v": prediction,
        "tv2v": clip_manipulation,
    }
    able = {str(task) for task in model.tasks}
    for task, show in tasks.items():
        if task in able:
            show(client, world, demo)
    if "clip" in model.rankers:
        best_of(client, demo)


def text_to_image(client: Client, world: SpriteWorld, demo: Demo) -> None:
    for digit in range(10):
        for colour in (world.colours[digit % 4], world.colours[(digit + 2) % 4]):
            caption = f"a {colour} {digit} on a black background ."
            image(client, demo, "t2i", caption, [], seed=digit)


def sketches(client: Client, world: SpriteWorld, demo: Demo) -> None:
    for index in range(8):
        sample = world.sample(index)
        sketch = sample.segmentation[index % FRAMES]
        given = [paint(sketch[None])]
        image(client, demo, "s2i", sample.image_caption, given, sketch=sketch, seed=index)


def completion(client: Client, world: SpriteWorld, demo: Demo) -> None:
    for index in range(8):
        sample = world.sample(index + 8)
        frame, inside = sample.frames[index], sample.segmentation[index] > 0
        mask = half_mask(inside, index)
        given = [masked(frame[None], mask)]
        image(client, demo, "i2i", "", given, image=frame, mask=mask, seed=index)


def image_manipulation(client: Client, world: SpriteWorld, demo: Demo) -> None:
    for index in range(8):
        sample = world.sample(index + 16)
        frame, inside = sample.frames[0], sample.segmentation[0] > 0
        caption = changed(sample.image_caption, index)
        mask = box_mask(inside)
        given = [frame[None], masked(frame[None], mask)]
        image(client, demo, "ti2i", caption, given, image=frame, mask=mask, seed=index)


def text_to_video(client: Client, world: SpriteWorld, demo: Demo) -> None:
    for number, motion in enumerate(MOTIONS):
        colour, digit = world.colours[number % 4], (3 * number + 2) % 10
        caption = f"a {colour} {digit} on a black background moving {motion} ."
        clip(client, demo, "t2v", caption, [], seed=number)
    for number in range(2):
        wave = demo.of("t2v")[number]
        raster = Demo()
        options = {"seed": number, "schedule": "raster"}
        clip(client, raster, "t2v", wave.caption, [], **options)
        demo.rasters += raster.shown
        same = np.array_equal(raster.shown[0].frames, wave.frames)
        print(f"clip {number}, raster and wave decoding: {'same' if same else 'DIFFERENT'} pixels")


def sketch_clips(client: Client, world: SpriteWorld, demo: Demo) -> None:
    for index in range(4):
        sample = world.sample(index + 24)
        sketch, caption = sample.segmentation, sample.video_caption
        clip(client, demo, "s2v", caption, [paint(sketch)], sketch=sketch, seed=index)


def prediction(client: Client, world: SpriteWorld, demo: Demo) -> None:
    for index, count in enumerate((10, 10, 40, 100)):
        sample = world.sample(index + 32)
        given = sample.frames[:2]
        name = f"{count} frames from 2" + (f", {sample.video_caption}" if index == 0 else "")
        prompt = sample.video_caption if index == 0 else ""
        options = {"video": given, "frame_count": count, "seed": index}
        clip(client, demo, "v2v", name, [given], prompt=prompt, **options)


def clip_manipulation(client: Client, world: SpriteWorld, demo: Demo) -> None:
    for index in range(4):
        sample = world.sample(index + 40)
        caption = changed(sample.video_caption, index)
        mask = box_mask(sample.segmentation.any(axis=0))
        given = [sample.frames, masked(sample.frames, mask)]
        options = {"video": sample.frames, "mask": mask, "seed": index}
        clip(client, demo, "tv2v", caption, given, **options)


def best_of(client: Client, demo: Demo) -> None:
    caption = "a yellow 8 on a black background ."
    began = time.perf_counter()
    result = client.generate_image(
        "t2i", caption, seed=5, samples=8, rank_by="clip", return_count=8, temperature=1.0
    )
    seconds = time.perf_counter() - began
    for sample in result.samples:
        name = f"{caption} score {sample.score:.3f}"
        demo.shown.append(Shown("best", name, [], sample.pixels[None], result, seconds))


def image(
    client: Client, demo: Demo, task: str, caption: str, given: list[np.ndarray], **options: Any
) -> None:
    began = time.perf_counter()
    result = client.generate_image(task, caption, **options)
    seconds = time.perf_counter() - began
    demo.shown.append(Shown(task, caption, given, result.pixels[None], result, seconds))


def clip(
    client: Client,
    demo: Demo,
    task: str,
    caption: str,
    given: list[np.ndarray],
    *,
    prompt: str | None = None,
    **options: Any,
) -> None:
    began = time.perf_counter()
    result = client.generate_video(task, caption if prompt is None else prompt, **options)
    seconds = time.perf_counter() - began
    demo.shown.append(Shown(task, caption, given, result.frames, result, seconds))


def paint(sketch: np.ndarray) -> np.ndarray:
    """Class ids [F, H, W] in VOC's colours, u8 [F, H, W, 3]."""
    return voc_palette(MOST_CLASSES)[sketch]


def masked(frames: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The frames with what is to be generated in grey."""
    return np.where(mask[..., None], np.uint8(96), frames)


def half_mask(inside: np.ndarray, index: int) -> np.ndarray:
    """One half of the picture, of those that leave at least half of the object visible."""
    halves = []
    for axis in range(2):
        for side in range(2):
            mask = np.zeros(inside.shape, bool)
            part = slice(None, 32) if side == 0 else slice(32, None)
            mask[(part, slice(None)) if axis == 0 else (slice(None), part)] = True
            hidden = (inside & mask).sum()
            if 0 < hidden <= inside.sum() / 2:
                halves.append(mask)
            elif hidden == 0 and side == 1:
                fallback = mask
    return halves[index % len(halves)] if halves else fallback


def box_mask(inside: np.ndarray) -> np.ndarray:
    """The patches around the object, and one more on every side."""
    mask = np.zeros(inside.shape, bool)
    spans = []
    for axis in (1, 0):
        where = np.flatnonzero(inside.any(axis=axis)) // PATCH
        low, high = max(where[0] - 1, 0), where[-1] + 2
        spans.append(slice(low * PATCH, high * PATCH))
    mask[spans[0], spans[1]] = True
    return mask


def changed(caption: str, index: int) -> str:
    """The caption with another colour, or with another digit."""
    words = caption.split()
    if index % 2 == 0:
        colours = list(COLOURS)[:4]
        words[1] = colours[(colours.index(words[1]) + 1) % 4]
    else:
        words[2] = CLASSES[(CLASSES.index(words[2]) + 3) % 10]
    return " ".join(words)


def table(demo: Demo) -> list[tuple[str, str]]:
    """Medians in milliseconds."""

    def median(values) -> str:
        return f"{1e3 * statistics.median(values):.1f} ms"

    rows = [("server", demo.ready.removeprefix("nuwa: "))]
    groups = {task: demo.of(task) for task in TITLES if task != "best"}
    groups["v2v"] = [each for each in groups["v2v"] if len(each.frames) == FRAMES]
    groups["t2v, one position a step"] = demo.rasters
    for name, group in groups.items():
        if not group:
            continue
        times = [each.result.timings for each in group]
        rows += [
            (f"{name}: steps", str(times[0].steps)),
            (f"{name}: encode", median(t.encode for t in times)),
            (f"{name}: per step", median(t.decode / t.steps for t in times)),
            (f"{name}: decode, all steps", median(t.decode for t in times)),
            (f"{name}: tokens to pixels", median(t.pixels for t in times)),
            (f"{name}: end to end through gRPC", median(each.seconds for each in group)),
        ]
    return rows


def write_page(out: Path, demo: Demo, rows: list[tuple[str, str]]) -> None:
    """index.html and the pictures it shows, in one folder."""
    sections = []
    for task, title in TITLES.items():
        figures = []
        for number, each in enumerate(demo.of(task)):
            parts = [*each.given, each.frames]
            names = [save(out, f"{task}-{number:02d}-{i}", part) for i, part in enumerate(parts)]
            figures.append(figure(names, each.caption))
        if figures:
            sections.append(f'<h2>{title}</h2><div class="sheet">{"".join(figures)}</div>')
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    page = PAGE.format(sections="".join(sections), rows=cells)
    (out / "index.html").write_text(page, encoding="utf-8")
    (out / "times.json").write_text(json.dumps(dict(rows), indent=2) + "\n")


def save(out: Path, stem: str, frames: np.ndarray) -> str:
    """A PNG, or an animated WebP; returns its name."""
    if len(frames) == 1:
        Image.fromarray(frames[0]).save(out / f"{stem}.png")
        return f"{stem}.png"
    (out / f"{stem}.webp").write_bytes(media.encode_animation(frames, "webp", SPEED))
    return f"{stem}.webp"


def figure(names: list[str], caption: str) -> str:
    side = 64 * SCALE
    images = "".join(
        f'<img src="{name}" width="{side}" alt="{"result" if name == names[-1] else "given"}">'
        for name in names
    )
    text = html.escape(caption.removesuffix(" ."))
    return f"<figure>{images}<figcaption>{text}</figcaption></figure>"


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>nuwa-runtime demo</title>
<style>
  body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem; }}
  .sheet {{ display: flex; flex-wrap: wrap; gap: 16px; }}
  figure {{ margin: 0; }}
  img {{ image-rendering: pixelated; background: #000; margin-right: 4px; }}
  figcaption {{ font-size: 13px; color: #444; }}
  td {{ padding: 2px 16px 2px 0; }} td + td {{ font-variant-numeric: tabular-nums; }}
</style>
<h1>nuwa-runtime demo</h1>
<p>Everything here was generated by the shipped <code>sprites</code> checkpoint, exported to ONNX
and served over gRPC on this machine. Where there are several pictures, the last one is the result;
grey is what was hidden.</p>
{sections}
<h2>Measured times</h2><p>Medians, one request at a time.</p><table>{rows}</table>
"""


if __name__ == "__main__":
    raise SystemExit(main())
