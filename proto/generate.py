"""Makes the Python modules of proto/nuwa/v1 from the .proto files: `python proto/generate.py`.

Needs grpcio-tools (the `dev` extra) and knows nothing of the runtime. The version that made the
committed modules is written in their headers; they run on that protobuf and grpcio or newer.
"""

from __future__ import annotations

import argparse
import importlib.resources
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def generate(out: Path) -> list[Path]:
    """Writes nuwa/v1/*_pb2.py, *_pb2.pyi and *_pb2_grpc.py under `out`; returns their paths.

    Paths are given to protoc relative to proto/, so that modules import each other as `nuwa.v1`.
    RuntimeError if protoc refuses a file (it prints why on stderr).
    """
    from grpc_tools import protoc

    sources = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("nuwa/v1/*.proto"))
    out.mkdir(parents=True, exist_ok=True)
    arguments = [
        "protoc",
        f"--proto_path={ROOT}",
        f"--proto_path={importlib.resources.files('grpc_tools') / '_proto'}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
        *sources,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError(f"protoc could not compile {', '.join(sources)}")
    suffixes = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
    return [out / source.replace(".proto", suffix) for source in sources for suffix in suffixes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT, help="where nuwa/v1 goes (default: here)")
    for path in generate(parser.parse_args().out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
