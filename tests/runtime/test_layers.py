"""What runtime may import; the generated protocol modules are those of the .proto files."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nuwa.runtime

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "proto" / "nuwa"
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(nuwa.runtime.__path__, "nuwa.runtime.")
)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_module_of_runtime_needs_torch():
    modules = [name for name in MODULES if not name.endswith("__main__")]
    assert "nuwa.runtime.server" in modules and "nuwa.runtime.commands.evaluate" in modules
    run_python(
        "import importlib, sys\n"
        "sys.modules['torch'] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "assert sys.modules['torch'] is None\n"
        "got = [name for name in sys.modules if name.startswith('torch.')]\n"
        "assert not got, got\n"
        "bad = [n for n in sys.modules if n.startswith(('nuwa.training', 'nuwa.export'))]\n"
        "assert not bad, bad\n"
    )


def test_the_scheduler_knows_no_framework():
    run_python(
        "import sys, nuwa.runtime.scheduler\n"
        "bad = {'torch', 'onnxruntime', 'grpc', 'PIL'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )


def test_help_loads_no_framework():
    run_python(
        "import sys\n"
        "from nuwa.runtime.cli import main\n"
        "for words in (['--help'], ['generate', '--help'], ['serve', '--help']):\n"
        "    assert main(words) == 0\n"
        "bad = {'torch', 'onnxruntime'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "proto" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_interface_is_that_of_the_proto_file():
    pytest.importorskip("grpc_tools")
    page = (ROOT / "docs" / "api.md").read_text()
    assert page == script("document").document(), "run proto/document.py"
    assert "### GenerateVideoRequest" in page and "| `TASK_TV2V` | 8 |" in page


def recorded(pattern: str, name: str) -> str:
    return re.search(pattern, (GENERATED / name).read_text())[1]


def test_generated_modules_are_those_of_the_proto_file(tmp_path):
    pytest.importorskip("grpc_tools")
    made_by = recorded(r"GRPC_GENERATED_VERSION = '([\d.]+)'", "v1/generation_pb2_grpc.py")
    installed = importlib.metadata.version("grpcio-tools")
    if made_by != installed:
        pytest.skip(f"made by grpcio-tools {made_by}; {installed} is installed")
    written = script("generate").generate(tmp_path)
    assert len(written) == 9
    for file in written:
        name = file.relative_to(tmp_path / "nuwa")
        same = (GENERATED / name).read_bytes() == file.read_bytes()
        assert same, f"run proto/generate.py: {name}"


def test_messages_of_inference_get_along_with_those_of_tritons_client():
    """Another program's definitions of the same names, in the pool that all programs share."""
    run_python(
        "from google.protobuf import descriptor_pb2, descriptor_pool\n"
        "theirs = descriptor_pb2.FileDescriptorProto(name='grpc_service.proto')\n"
        "theirs.package = 'inference'\n"
        "theirs.message_type.add(name='ModelInferRequest')\n"
        "descriptor_pool.Default().AddSerializedFile(theirs.SerializeToString())\n"
        "from nuwa.inference import grpc_service_pb2 as pb\n"
        "assert pb.ModelInferRequest(model_name='x').model_name == 'x'\n"
    )


def test_generated_modules_run_on_the_declared_versions():
    """Generated code refuses older libraries, so the requirements must not allow them."""
    needed = {
        "protobuf": recorded(r"Protobuf Python Version: ([\d.]+)", "v1/generation_pb2.py"),
        "grpcio": recorded(r"GRPC_GENERATED_VERSION = '([\d.]+)'", "v1/generation_pb2_grpc.py"),
    }
    project = (ROOT / "pyproject.toml").read_text()
    for name, version in needed.items():
        declared = re.search(rf'^  "{name}>=([\d.]+)', project, re.MULTILINE)[1]
        as_numbers = [tuple(map(int, text.split("."))) for text in (declared, version)]
        assert as_numbers[0] >= as_numbers[1], f"{name}>={version} is needed, >={declared} declared"


def test_every_enum_starts_unspecified_and_every_task_has_its_value():
    from nuwa.spec.tasks import Task
    from nuwa.v1 import generation_pb2 as pb

    for enum in pb.DESCRIPTOR.enum_types_by_name.values():
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED")
    names = pb.DESCRIPTOR.enum_types_by_name["Task"].values_by_name
    assert {name[5:] for name in names} == {"UNSPECIFIED", *(t.name for t in Task)}
