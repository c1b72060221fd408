"""`nuwa generate`: one image or clip into a file, from a server or from a bundle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nuwa.spec.tasks import Task, parse_task

from .. import media
from ..client import BaseClient, Client, LocalClient
from ..core import Pixels, Progress, Timings
from ..results import ClipEvent
from . import arguments

DESCRIPTION = """\
Generate one image or clip and write it to a file.

Name either a bundle, which is loaded for this one request, or a running server (--server)."""

EXAMPLES = """\
tasks, and what each needs:
  t2i, t2v     --prompt
  s2i, s2v     --sketch FILE, a palette or grey picture of class ids; --prompt if you like
  i2i          --image FILE and --mask FILE or --box: fill in the masked part
  ti2i         the same and --prompt: change the masked part as the text says
  v2v          --video FILE, the first frames: go on from there
  tv2v         --video FILE, --mask or --box, --prompt: change the masked part of every frame

examples:
  nuwa generate demo/bundle --task t2v --prompt "a red 3 moves left" --out clip.webp
  nuwa generate demo/bundle --task t2i --prompt "a red 3" --seed 7 --scale 4 --out three.png
  nuwa generate demo/bundle --task v2v --video clip.webp --keep 4 --out next.gif
  nuwa generate demo/bundle --task i2i --image three.png --box 0,0,32,64 --out filled.png
  nuwa generate --server 127.0.0.1:50051 --task t2v --prompt "a red 3" --out clip.webp
"""

IMAGE_SUFFIXES = {f".{kind}": kind for kind in ("png", "webp", "gif")}
CLIP_SUFFIXES = {f".{kind}": kind for kind in media.ANIMATION_FORMATS}


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("bundle", type=Path, nargs="?", help="folder made by `nuwa export`")
    parser.add_argument("--server", metavar="HOST:PORT", help="a server to ask instead")
    parser.add_argument(
        "--task", required=True, metavar="TASK", help=f"one of {', '.join(Task)}; see below"
    )
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what to show")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="image: .png .webp .gif; clip: .webp .gif",
    )
    given = parser.add_argument_group("what is given besides text (files of the model's size)")
    given.add_argument("--image", type=Path, metavar="FILE", help="PNG, WebP, GIF or JPEG")
    given.add_argument("--video", type=Path, metavar="FILE", help="animated WebP, GIF or PNG")
    given.add_argument(
        "--keep", type=arguments.positive, metavar="N", help="take the first N frames of --video"
    )
    given.add_argument("--sketch", type=Path, metavar="FILE", help="class ids; picture or clip")
    given.add_argument("--mask", type=Path, metavar="FILE", help="bright where to generate")
    given.add_argument(
        "--box",
        type=_box,
        action="append",
        metavar="LEFT,TOP,WIDTH,HEIGHT",
        help="a rectangle to generate, in pixels, instead of --mask; may be repeated",
    )
    parser.add_argument(
        "--frames", type=int, metavar="N", help="length of a clip (default: all that the model can)"
    )
    parser.add_argument(
        "--seed", type=int, help="the same seed gives the same result (default: random, printed)"
    )
    parser.add_argument(
        "--sample-index", type=int, metavar="I", help="another sample of the same seed (default: 0)"
    )
    arguments.add_sampling(parser)
    shape = parser.add_argument_group("output")
    shape.add_argument(
        "--scale", type=int, default=1, metavar="N", help="make pixels N times as large, 1 to 8"
    )
    shape.add_argument(
        "--fps",
        type=int,
        default=media.DEFAULT_FRAMES_PER_SECOND,
        metavar="N",
        help="frames a second of a clip (default: %(default)s)",
    )
    parser.add_argument(
        "--schedule",
        choices=("wave", "raster"),
        default="wave",
        help="order of decoding; raster is slow and gives the same (default: %(default)s)",
    )
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="give up after this long")
    arguments.add_engine(parser, slots=False)
    return run


def run(args: argparse.Namespace) -> int:
    if (args.bundle is None) == (args.server is None):
        raise ValueError("name either a bundle or --server HOST:PORT")
    task = parse_task(args.task)
    _check_output(args, task)
    options = _options(args, task)
    with _client(args) as client:
        if task.is_video:
            with _progress_bar() as show:
                clip = client.generate_video(
                    task, args.prompt, deadline=args.deadline, on_event=show, **options
                )
            frames, seed, timings = clip.frames, clip.seed, clip.timings
        else:
            image = client.generate_image(task, args.prompt, deadline=args.deadline, **options)
            frames, seed, timings = image.pixels[None], image.seed, image.timings
    _write(args, frames, task)
    print(_summary(args.out, frames, args.scale, seed, timings))
    return 0


def _check_output(args: argparse.Namespace, task: Task) -> None:
    """Before the work, not after it."""
    suffixes = CLIP_SUFFIXES if task.is_video else IMAGE_SUFFIXES
    if args.out.suffix.lower() not in suffixes:
        kind = "clips" if task.is_video else "images"
        raise ValueError(f"--out {args.out}: {kind} end in {' or '.join(suffixes)}")
    if not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no folder {args.out.parent}")
    if not 1 <= args.scale <= media.MAX_SCALE:
        raise ValueError(f"--scale {args.scale} is not in [1, {media.MAX_SCALE}]")
    if not 1 <= args.fps <= media.MAX_FRAMES_PER_SECOND:
        raise ValueError(f"--fps {args.fps} is not in [1, {media.MAX_FRAMES_PER_SECOND}]")


def _options(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    if args.mask is not None and args.box is not None:
        raise ValueError("give --mask or --box, not both")
    options = arguments.sampling(args) | {
        "seed": args.seed,
        "sample_index": args.sample_index,
        "sketch": args.sketch,
        "mask": args.box or args.mask,
        "schedule": args.schedule,
    }
    for name, value, for_video in (
        ("image", args.image, False),
        ("video", args.video, True),
        ("frames", args.frames, True),
    ):
        if value is not None and task.is_video != for_video:
            raise ValueError(f"task {task} takes no --{name}")
    if args.keep is not None and args.video is None:
        raise ValueError("--keep needs --video")
    if task.is_video:
        return options | {"video": _video(args), "frame_count": args.frames}
    return options | {"image": args.image}


def _video(args: argparse.Namespace) -> Path | Pixels | None:
    if args.keep is None:
        return args.video
    try:
        return media.decode_clip(args.video.read_bytes())[: args.keep]
    except media.MediaError as error:
        raise ValueError(f"--video {args.video} {error}") from error


def _client(args: argparse.Namespace) -> BaseClient:
    if args.server is not None:
        return Client(args.server)
    from ..engine import load_engine

    return LocalClient(load_engine(args.bundle, slots=1, threads=args.threads))


@contextmanager
def _progress_bar() -> Iterator[Callable[[ClipEvent], None]]:
    """Shows Progress events on stderr, if a person is there to look at it."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("decoding"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %, {task.fields[frames]}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Bar(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        shown = bar.add_task("decoding", total=None, frames="waiting")

        def show(event: ClipEvent) -> None:
            if isinstance(event, Progress):
                frames = f"{event.frames_done} of {event.frames_total} frames"
                done, total = event.positions_done, event.positions_total
                bar.update(shown, completed=done, total=total, frames=frames)

        yield show


def _write(args: argparse.Namespace, frames: Pixels, task: Task) -> None:
    suffix = args.out.suffix.lower()
    pixels = media.upscale(frames, args.scale)
    if task.is_video:
        data = media.encode_animation(pixels, CLIP_SUFFIXES[suffix], args.fps)
    else:
        data = media.encode_picture(pixels[0], IMAGE_SUFFIXES[suffix])
    args.out.write_bytes(data)


def _summary(out: Path, frames: Pixels, scale: int, seed: int, timings: Timings) -> str:
    count, height, width, _ = frames.shape
    what = f"{count} frames" if count > 1 else "1 frame"
    return (
        f"{out}: {what} of {width * scale} x {height * scale}, seed {seed}, "
        f"{timings.total:.2f} s ({timings.steps} steps in {timings.decode:.2f} s, "
        f"waited {timings.queue:.2f} s)"
    )


def _box(text: str) -> tuple[int, int, int, int]:
    try:
        left, top, width, height = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LEFT,TOP,WIDTH,HEIGHT") from None
    return left, top, width, height
