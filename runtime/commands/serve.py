"""`nuwa serve`: a bundle behind a gRPC port until a signal comes."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from pathlib import Path

from ..scheduler import DEFAULT_QUEUE_SIZE
from ..server import DEFAULT_GRACE, Server, serve_until_signal
from . import arguments

DESCRIPTION = """\
Load a bundle and answer requests (package nuwa.v1) on a port until SIGTERM or Ctrl-C.

When ready it prints one line with the address. Health checks (grpc.health.v1) and reflection are
on. The port is not encrypted, so by default only programs of this machine reach it."""

EXAMPLES = """\
examples:
  nuwa serve demo/bundle
  nuwa serve demo/bundle --port 0                  any free port; the ready line says which
  nuwa serve demo/bundle --slots 8 --queue-size 32 more samples at a time, less waiting

and then, in another terminal:
  nuwa generate --server 127.0.0.1:50051 --task t2v --prompt "a red 3 moves left" --out clip.webp
"""


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("bundle", type=Path, help="folder made by `nuwa export`")
    parser.add_argument(
        "--host", default="127.0.0.1", help="interface to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=50051, help="0 takes a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--queue-size",
        type=arguments.positive,
        default=DEFAULT_QUEUE_SIZE,
        metavar="N",
        help="requests that may wait; more are refused (default: %(default)s)",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=DEFAULT_GRACE,
        metavar="SECONDS",
        help="how long running requests may go on after SIGTERM (default: %(default)g)",
    )
    arguments.add_engine(parser, slots=True)
    return run


def run(args: argparse.Namespace) -> int:
    from ..engine import load_engine

    logging.getLogger("nuwa").setLevel(logging.INFO)
    started = time.perf_counter()
    engine = load_engine(args.bundle, slots=args.slots, **arguments.engine(args))
    server = Server(engine, host=args.host, port=args.port, queue_size=args.queue_size)
    serve_until_signal(
        server, load_seconds=time.perf_counter() - started, grace=max(0.0, args.grace)
    )
    return 1 if server.died else 0  # so that who supervises it starts it again
