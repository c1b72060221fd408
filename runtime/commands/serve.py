"""`nuwa serve`: a bundle behind a gRPC port until a signal comes."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("nuwa.runtime")

DESCRIPTION = """\
Load a bundle and answer requests on a port, over gRPC (nuwa.v1, and the Open Inference Protocol),
until SIGTERM or Ctrl-C.

When ready it prints one line with the address. Health checks (grpc.health.v1) and reflection are
on. Without certificates the port is not encrypted, so only programs of this machine reach it.

The first bundle is what requests get that name no model. SIGHUP loads bundles again that have
changed: the new version takes over when it is loaded, and if it cannot be, the old one stays.

Every setting can be given as a flag, as a variable of the environment (NUWA_QUEUE_SIZE=32) or in a
TOML file (queue_size = 32); flags go first, then the environment, then the file. --print-config
shows what they come to, as such a file. Variables NUWA_... that are no setting are warned of."""

EXAMPLES = """\
examples:
  nuwa serve demo/bundle
  nuwa serve demo/bundle --port 0                  any free port; the ready line says which
  nuwa serve demo/bundle --slots 8 --queue-size 32 more samples at a time, less waiting
  nuwa serve demo/bundle --slots 8 --print-config > server.toml
  nuwa serve --config server.toml
  nuwa serve demo/bundle --bundles small=other/bundle,fast=int8/bundle
  nuwa serve demo/bundle --host 0.0.0.0 --tls-certificate chain.pem --tls-key key.pem \\
      --tokens tokens.toml

and then, in another terminal:
  nuwa generate --server 127.0.0.1:50051 --task t2v --out clip.webp \\
      --prompt "a red 3 on a black background moving left ."
"""


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    from ..settings import ServerSettings

    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("bundle", nargs="?", type=Path, help="folder made by `nuwa export`")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as TOML")
    parser.add_argument(
        "--print-config", action="store_true", help="print the settings as TOML, and end"
    )
    group = parser.add_argument_group("settings")
    for name, field in ServerSettings.model_fields.items():
        if name == "bundle":
            continue
        default = "" if field.default is None else f" (default: {field.default})"
        help = f"{field.description}{default}".replace("%", "%%")
        flag = "--" + name.replace("_", "-")
        if field.annotation is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help)
        else:
            group.add_argument(flag, metavar="VALUE", help=help)
    return run


def run(args: argparse.Namespace) -> int:
    from .. import logs
    from ..settings import ServerSettings, ignored, read

    flags = {name: getattr(args, name) for name in ServerSettings.model_fields}
    settings = read(flags, args.config, os.environ)
    named = settings.bundle is not None or bool(settings.bundles)
    if named and not args.print_config:
        logs.configure(settings.log_format, logging.DEBUG if args.debug else logging.INFO)
    for each in ignored(os.environ):
        log.warning("%s", each)
    if args.print_config:
        print(settings.to_toml(), end="")
        return 0
    if not named:
        raise ValueError("which bundle? name its folder, as an argument or as a setting")
    from ..process import few_arenas
    from ..server import Server
    from ..until_signal import serve_until_signal

    few_arenas()
    server = Server(settings=settings)
    server.host.expect(settings.bundles)

    def load() -> None:
        if settings.bundle is not None:
            server.load("", settings.bundle)
        for name, path in settings.bundles.items():
            if server.asked_to_end.is_set():
                return
            server.load(name, path)

    serve_until_signal(server, load=load, grace=settings.grace)
    code = 1 if server.died else 0  # so that who supervises it starts it again
    if server.host.loading:
        # A library is at work in a thread that cannot be told to end, and would be waited for.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    return code
