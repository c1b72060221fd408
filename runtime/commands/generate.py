"""`nuwa generate`: one image or clip into a file, from a server or from a bundle."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nuwa.spec.files import replacing
from nuwa.spec.tasks import Task, parse_task

from .. import media, requests
from ..client import READY_SECONDS, BaseClient, Client, LocalClient
from ..core import Pixels, Progress
from ..results import ClipEvent, ClipResult, ClipSample, ImageResult, ImageSample
from . import arguments

DESCRIPTION = """\
Generate one image or clip, or several samples of it, and write each to a file.

Name either a bundle, which is loaded for this one request, or a running server (--server)."""

EXAMPLES = """\
tasks, and what each needs:
  t2i, t2v     --prompt
  s2i, s2v     --sketch FILE: class ids as grey values or as the palette indices of a PNG, or their
               colours in the palette of PASCAL VOC (a PNG's palette too, if it has those colours
               at other indices); one picture, or for s2v a clip of them; --prompt if you like
  i2i          --image FILE and --mask FILE or --box: fill in the masked part
  ti2i         the same and --prompt: change the masked part as the text says
  v2v          --video FILE, the first frames of the result: go on from there; --prompt if you like
  tv2v         --video FILE, --mask or --box, --prompt: change the masked part of every frame

what the shipped model was trained on, and nothing else:
  "a COLOUR DIGIT on a black background ." with red, green, blue or yellow and 0 to 9; of clips
  "... on a black background moving MOTION ." with left, right, up or down, or one of them "then"
  the opposite one

examples:
  nuwa generate demo/bundle --task t2i --prompt "a red 3 on a black background ." --seed 7 \\
      --scale 4 --out three.png
  nuwa generate demo/bundle --task s2i --sketch classes.png --out drawn.png \\
      --prompt "a red 3 on a black background ."
  nuwa generate demo/bundle --task i2i --image three.png --box 0,0,32,64 --out filled.png
  nuwa generate demo/bundle --task ti2i --image three.png --mask mask.png --out blue.png \\
      --prompt "a blue 3 on a black background ."
  nuwa generate demo/bundle --task t2v --out clip.webp \\
      --prompt "a red 3 on a black background moving left ."
  nuwa generate demo/bundle --task s2v --sketch classes.webp --out drawn.webp
  nuwa generate demo/bundle --task v2v --video clip.webp --keep-last 4 --frames 100 \\
      --out long.webp
  nuwa generate demo/bundle --task tv2v --video clip.webp --box 0,0,64,32 --box 16,32,8,8 \\
      --prompt "a blue 3 on a black background moving left ." --out edited.webp

the best of many, and a server:
  nuwa generate demo/bundle --task t2v --samples 16 --rank-by clip --return 2 --out best.webp \\
      --prompt "a red 3 on a black background moving left then right ."
  nuwa generate --server 127.0.0.1:50051 --task t2v --out clip.webp \\
      --prompt "a red 3 on a black background moving up ."
"""

LOCAL_SLOTS = 4  # samples that a bundle loaded here decodes side by side
# Of a clip that is read here, and of which only a part is sent: far more than a server reads.
OWN_CLIP = media.Limits(max_bytes=2**28, max_pixels=2**28, max_frames=2**16)
IMAGE_SUFFIXES = {f".{kind}": kind for kind in ("png", "webp", "gif")}
CLIP_SUFFIXES = {f".{kind}": kind for kind in media.ANIMATION_FORMATS}


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("bundle", type=Path, nargs="?", help="folder made by `nuwa export`")
    parser.add_argument("--server", metavar="HOST:PORT", help="a server to ask instead")
    parser.add_argument(
        "--model", metavar="NAME", help="NAME or NAME/VERSION, of a server that has several"
    )
    arguments.add_access(parser)
    parser.add_argument(
        "--task", required=True, metavar="TASK", help=f"one of {', '.join(Task)}; see below"
    )
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what to show")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="image: .png .webp .gif; clip: .webp .gif (at most 256 colours a frame, so given "
        "pixels may change); x.png is followed by x-2.png, x-3.png, ... where several samples are "
        "returned",
    )
    given = parser.add_argument_group("what is given besides text (files of the model's size)")
    given.add_argument("--image", type=Path, metavar="FILE", help="PNG, WebP, GIF or JPEG")
    given.add_argument("--video", type=Path, metavar="FILE", help="animated WebP, GIF or PNG")
    part = given.add_mutually_exclusive_group()
    for option, end in (("--keep", "first"), ("--keep-last", "last")):
        part.add_argument(
            option,
            type=arguments.positive,
            metavar="N",
            help=f"take the {end} N frames of --video, which may then be long",
        )
    given.add_argument("--sketch", type=Path, metavar="FILE", help="classes; picture or clip")
    given.add_argument("--mask", type=Path, metavar="FILE", help="bright where to generate")
    given.add_argument(
        "--box",
        type=_box,
        action="append",
        metavar="LEFT,TOP,WIDTH,HEIGHT",
        help="a rectangle to generate, in pixels, instead of --mask; may be repeated",
    )
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help="length of a clip; only v2v can go beyond the model's (default: as the sketch, or the "
        "video of tv2v, else the model's)",
    )
    parser.add_argument(
        "--seed", type=int, help="the same seed gives the same result (default: random, printed)"
    )
    parser.add_argument(
        "--sample-index", type=int, metavar="I", help="another sample of the same seed (default: 0)"
    )
    many = parser.add_argument_group("several samples")
    many.add_argument("--samples", type=int, metavar="N", help="how many to make (default: 1)")
    many.add_argument(
        "--rank-by",
        metavar="NAME",
        help="score them against the prompt, best first; `nuwa inspect` lists a bundle's rankers",
    )
    many.add_argument(
        "--return",
        dest="return_count",
        type=int,
        metavar="N",
        help="how many of the best to write (default: 1 if ranked, else all)",
    )
    arguments.add_sampling(parser)
    shape = parser.add_argument_group("output")
    shape.add_argument(
        "--scale", type=int, default=1, metavar="N", help="make pixels N times as large, 1 to 8"
    )
    shape.add_argument(
        "--fps",
        type=int,
        metavar="N",
        help=f"frames a second of a clip (default: {media.DEFAULT_FRAMES_PER_SECOND})",
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
    arguments.check_place(args)
    task = parse_task(args.task)
    _check_output(args, task)
    options = _options(args, task)
    with _client(args) as client:
        if task.is_video:
            with _progress_bar(args.samples or 1) as show:
                clip = client.generate_video(
                    task, args.prompt, deadline=args.deadline, on_event=show, **options
                )
            _write(args, [each.frames for each in clip.samples], task)
            print(_summary(args, clip))
        else:
            image = client.generate_image(task, args.prompt, deadline=args.deadline, **options)
            _write(args, [each.pixels[None] for each in image.samples], task)
            print(_summary(args, image))
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
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder; name a file in it")
    if not os.access(args.out.parent, os.W_OK):
        raise ValueError(f"--out {args.out}: nothing can be written into {args.out.parent}")
    if args.fps is None:
        args.fps = media.DEFAULT_FRAMES_PER_SECOND
    elif not task.is_video:
        raise ValueError(f"task {task} takes no --fps")
    if not 1 <= args.fps <= media.MAX_FRAMES_PER_SECOND:
        raise ValueError(f"--fps {args.fps} is not in [1, {media.MAX_FRAMES_PER_SECOND}]")
    if task.needs_frames and args.out.suffix.lower() == ".gif":
        print(
            "nuwa generate: a .gif has at most 256 colours a frame, so given pixels may change; "
            "a .webp keeps them bit for bit",
            file=sys.stderr,
        )


def _options(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    if args.mask is not None and args.box is not None:
        raise ValueError("give --mask or --box, not both")
    options = arguments.sampling(args) | {
        "seed": args.seed,
        "sample_index": args.sample_index,
        "samples": args.samples,
        "rank_by": args.rank_by,
        "return_count": args.return_count,
        "sketch": args.sketch,
        "mask": args.box or args.mask,
        "schedule": args.schedule,
        "model": args.model,
    }
    for name, value, for_video in (
        ("image", args.image, False),
        ("video", args.video, True),
        ("frames", args.frames, True),
    ):
        if value is not None and task.is_video != for_video:
            raise ValueError(f"task {task} takes no --{name}")
    if args.video is None and (args.keep or args.keep_last):
        raise ValueError(f"--keep{'' if args.keep else '-last'} needs --video")
    if task.is_video:
        return options | {"video": _video(args), "frame_count": args.frames}
    return options | {"image": args.image}


def _video(args: argparse.Namespace) -> Path | Pixels | None:
    if not (args.keep or args.keep_last):
        return args.video
    try:
        return media.decode_clip(
            args.video.read_bytes(), OWN_CLIP, first=args.keep, last=args.keep_last
        )
    except media.MediaError as error:
        raise ValueError(f"--video {args.video} {error}") from error


def _client(args: argparse.Namespace) -> BaseClient:
    if args.server is not None:
        seconds = requests.time_limit(args.deadline)
        waits = READY_SECONDS if seconds is None else min(READY_SECONDS, seconds)
        return Client(args.server, ready_timeout=waits, access=arguments.access(args))
    from ..engine import load_engine

    slots = max(1, min(args.samples or 1, LOCAL_SLOTS))
    return LocalClient(load_engine(args.bundle, slots=slots, **arguments.engine(args)))


@contextmanager
def _progress_bar(samples: int) -> Iterator[Callable[[ClipEvent], None]]:
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
    latest: dict[int, Progress] = {}
    with Bar(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        shown = bar.add_task("decoding", total=None, frames="waiting")

        def show(event: ClipEvent) -> None:
            if isinstance(event, Progress):
                latest[event.sample_index] = event
                done = sum(each.positions_done for each in latest.values())
                frames = sum(each.frames_done for each in latest.values())
                bar.update(
                    shown,
                    completed=done,
                    total=event.positions_total * samples,
                    frames=f"{frames} of {event.frames_total * samples} frames",
                )

        yield show


def _write(args: argparse.Namespace, samples: list[Pixels], task: Task) -> None:
    """Each sample, u8 [F, H, W, 3], into its file."""
    suffix = args.out.suffix.lower()
    for path, frames in zip(_paths(args.out, len(samples)), samples, strict=True):
        if task.is_video:
            data = media.encode_animation(frames, CLIP_SUFFIXES[suffix], args.fps, args.scale)
        else:
            picture = media.upscale(frames[0], args.scale)
            data = media.encode_picture(picture, IMAGE_SUFFIXES[suffix])
        with replacing(path) as partial:
            partial.write_bytes(data)


def _paths(out: Path, count: int) -> list[Path]:
    """`out`, then out-2, out-3, ... of the same suffix."""
    others = (out.with_stem(f"{out.stem}-{number}") for number in range(2, count + 1))
    return [out, *others]


def _summary(args: argparse.Namespace, result: ImageResult | ClipResult) -> str:
    frames = result.frames if isinstance(result, ClipResult) else result.pixels[None]
    count, height, width, _ = frames.shape
    what = f"{count} frames" if count > 1 else "1 frame"
    times = result.timings
    ranked = f", ranked in {times.ranking:.2f} s" if result.scores else ""
    lines = [
        f"{args.out}: {what} of {width * args.scale} x {height * args.scale}, seed {result.seed}, "
        f"{times.total:.2f} s ({times.steps} steps in {times.decode:.2f} s, "
        f"waited {times.queue:.2f} s{ranked})"
    ]
    samples: Sequence[ImageSample | ClipSample] = result.samples
    if len(samples) > 1 or result.scores:
        for path, sample in zip(_paths(args.out, len(samples)), samples, strict=True):
            score = "" if sample.score is None else f", score {sample.score:.4f}"
            lines.append(f"{path}: sample {sample.sample_index}{score}")
    return "\n".join(lines)


def _box(text: str) -> tuple[int, int, int, int]:
    try:
        left, top, width, height = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LEFT,TOP,WIDTH,HEIGHT") from None
    return left, top, width, height
