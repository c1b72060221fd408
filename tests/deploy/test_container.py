"""The steps of deploy/Containerfile without a container: what it copies is built, and serves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from shutil import copytree

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def left_out() -> Callable[[str, list[str]], set[str]]:
    """Which names of a folder .containerignore leaves out, as `copytree` asks for it.

    Of its patterns only those of names at the top, and "**/NAME" for names anywhere.
    """
    lines = (ROOT / ".containerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]

    def ignored(folder: str, names: list[str]) -> set[str]:
        top = Path(folder) == ROOT
        here = [pattern for pattern in patterns if top and "/" not in pattern]
        here += [pattern.removeprefix("**/") for pattern in patterns if pattern.startswith("**/")]
        return {name for name in names if any(fnmatch(name, pattern) for pattern in here)}

    return ignored


def test_docker_leaves_out_what_others_leave_out():
    assert (ROOT / ".dockerignore").read_bytes() == (ROOT / ".containerignore").read_bytes()
    names = {path.name for path in ROOT.iterdir()} | {".git", ".venv", "build", "secrets"}
    rest = names - left_out()(str(ROOT), sorted(names))
    assert rest >= {"pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "NOTICE"}
    assert rest >= {"spec", "training", "export", "runtime", "plugins_trt", "proto", "deploy"}
    assert not rest & {".git", ".venv", "build", "secrets", "demo", "checkpoints"}


def run(*command: str | Path, cwd: Path) -> None:
    """Outside the repository, so that nothing is imported from there."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The programs of an environment that has the wheel and nothing else of ours."""
    folder = tmp_path_factory.mktemp("container")
    pip = [sys.executable, "-m", "pip"]
    probe = [*pip, "download", "--quiet", "--no-deps", "--dest", folder, "scikit-build-core"]
    if subprocess.run(probe, cwd=folder, capture_output=True, timeout=300).returncode:
        pytest.skip("needs a package index")
    steps = (DEPLOY / "Containerfile").read_text()
    assert "RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .\n" in steps
    assert 'RUN pip install --no-cache-dir "$(ls /wheels/*.whl)[tracing]" ' in steps
    copytree(ROOT, folder / "source", symlinks=True, ignore=left_out())
    run(*pip, "wheel", "--no-deps", "--wheel-dir", "wheels", "./source", cwd=folder)
    [wheel] = (folder / "wheels").iterdir()
    run(sys.executable, "-m", "venv", "environment", cwd=folder)
    programs = folder / "environment" / "bin"
    run(programs / "pip", "install", f"{wheel}[tracing]", cwd=folder)
    return programs


@pytest.mark.slow
def test_what_is_copied_is_built_and_serves(installed, tiny_bundle, tmp_path):
    changed = {
        "NUWA_BUNDLE": str(tiny_bundle),
        "NUWA_HOST": "127.0.0.1",
        "NUWA_PORT": "0",
        "NUWA_METRICS_HOST": "127.0.0.1",
        "NUWA_METRICS_PORT": "0",
        "PYTHONUNBUFFERED": "1",
    }
    command = [installed / "nuwa", "serve", "--config", DEPLOY / "container.toml"]
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"} | changed
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            line = server.stdout.readline()
            found = re.search(r"ready on \S+: tiny .*metrics on (127\.0\.0\.1:\d+)", line)
            assert found, line
            with urllib.request.urlopen(f"http://{found[1]}/readyz", timeout=10) as answer:
                assert (answer.status, answer.read().strip()) == (200, b"ok")
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=60) == 0
        finally:
            server.kill()
