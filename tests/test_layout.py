"""The rules of the tree: who may import whom, and that the server needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("spec", "training", "export", "runtime", "plugins_trt")
MAY_IMPORT = {
    "spec": set(),
    "training": {"spec"},
    "export": {"spec", "training", "plugins_trt"},
    "runtime": {"spec", "v1", "inference", "plugins_trt"},
    "plugins_trt": set(),
}


def imports(path: Path):
    """(module, level) of every import of a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = (
                [node.module] if node.module != "nuwa" else [f"nuwa.{a.name}" for a in node.names]
            )
            yield from ((name or "", node.level) for name in names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_follow_the_one_direction_of_flow(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        depth = len(path.relative_to(ROOT / folder).parts)
        for module, level in imports(path):
            where = f"{path.relative_to(ROOT)} imports {module}"
            if level:
                assert level <= depth, f"{where} from outside its folder"
                continue
            first, _, rest = module.partition(".")
            assert first not in FOLDERS, f"{where}: write nuwa.{module}"
            if first == "nuwa":
                other = rest.partition(".")[0]
                assert other in MAY_IMPORT[folder], where


def test_serving_needs_no_torch():
    """Every module of nuwa.runtime (and so of nuwa.spec) imports where torch cannot be."""
    modules = [
        "nuwa." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "runtime").rglob("*.py"))
        if path.stem not in ("__init__", "__main__")
    ]
    assert len(modules) > 15
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxscript', 'safetensors'): sys.modules[name] = None\n"
        "import importlib\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(len([m for m in sys.modules if m.split('.')[0] == 'torch' and sys.modules[m]]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "0"


def test_base_dependencies_bring_no_torch():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [
        d for d in project["dependencies"] if d.startswith(("torch", "onnx>", "onnxscript"))
    ]
