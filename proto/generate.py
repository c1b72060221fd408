"""Makes the Python modules of proto/nuwa from the .proto files: `python proto/generate.py`.

Needs grpcio-tools (the `dev` extra) and knows nothing of the runtime. The version that made the
committed modules is written in their headers; they run on that protobuf and grpcio or newer.
"""

from __future__ import annotations

import argparse
import importlib.resources
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACKAGES = ("v1", "inference")
# A program that also has Triton's client in it has that one's `inference` in the default pool, and
# two definitions of one name in a pool are an error.
OWN_POOL = "inference"


def generate(out: Path) -> list[Path]:
    """Writes nuwa/*/*_pb2.py, *_pb2.pyi and *_pb2_grpc.py under `out`; returns their paths.

    Paths are given to protoc relative to proto/, so that modules import each other as `nuwa.v1`.
    RuntimeError if protoc refuses a file (it prints why on stderr).
    """
    from grpc_tools import protoc

    sources = sorted(
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in ROOT.glob(f"nuwa/{package}/*.proto")
    )
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
    for path in out.glob(f"nuwa/{OWN_POOL}/*_pb2.py"):
        _give_own_pool(path)
    suffixes = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
    return [out / source.replace(".proto", suffix) for source in sources for suffix in suffixes]


def _give_own_pool(path: Path) -> None:
    """Has a generated module define its messages in POOL of the package's pool.py."""
    default = "from google.protobuf import descriptor_pool as _descriptor_pool\n"
    text = path.read_text()
    uses = text.count("_descriptor_pool.Default()")
    if default not in text or uses != 1:
        raise RuntimeError(f"protoc writes {path} in another way than this script knows")
    text = text.replace(default, f"from nuwa.{OWN_POOL}.pool import POOL as _pool\n")
    path.write_text(text.replace("_descriptor_pool.Default()", "_pool"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT, help="where nuwa/ goes (default: here)")
    for path in generate(parser.parse_args().out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
