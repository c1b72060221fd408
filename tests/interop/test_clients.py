"""Clients that others wrote, unmodified: Triton's, one that reflects, buf, and perf_analyzer.

They live in build/clients, an environment that `make test` makes where packages can be had, and in
build/perf_analyzer.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from google.rpc import error_details_pb2

from nuwa.runtime.server import Server
from nuwa.spec.tasks import Task

from ..runtime.fake_engine import FakeEngine, expected_pixels, expected_tokens
from ..runtime.messages import wait_until

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PROGRAMS = ROOT / "build" / "clients" / "bin"
SECONDS = 60


@pytest.fixture(scope="module")
def server():
    with Server(FakeEngine(slots=2)) as server:
        yield server


@pytest.fixture
def slow():
    """A server of which an image takes 2 s and a clip of the usual length 20 s."""
    engine = FakeEngine()
    step = engine.step
    engine.step = lambda until=None: time.sleep(0.5) or step()
    with Server(engine) as server:
        yield server


def freed(server: Server, steps: int) -> None:
    """The request that was begun there ends within seconds, long before it would be finished."""
    engine = server.scheduler.engine
    assert len(engine.admitted) == 1, "it was begun"
    wait_until(lambda: server.scheduler.active == server.scheduler.queued == 0)
    wait_until(lambda: not engine.allocated)  # which is a moment after the slot is counted as free
    assert engine.steps < steps


def program(name: str) -> str:
    if not (PROGRAMS / name).exists():
        pytest.skip(f"{PROGRAMS / name} is not installed; `make build/clients`")
    return str(PROGRAMS / name)


def ran(*command: str, code: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout if code == 0 else done.stderr


def clip(seed: int, frames: range) -> list:
    return np.stack([expected_pixels(expected_tokens(seed, f)) for f in frames]).tolist()


def test_tritons_client(server):
    seen = json.loads(ran(program("python"), str(HERE / "triton_client.py"), server.address))
    about = seen["metadata"]
    assert about["live"] and about["ready"] and about["decoupled"] and not about["not_ready"]
    assert about["server"] == "nuwa" and about["inputs"] == ["PROMPT"]
    assert "fake_t2v" in about["models"] and len(about["models"]) == 7
    unary = seen["unary"]
    assert unary["id"] == "mine" and unary["executed"] == 1
    assert unary["clip"] == clip(5, range(2))
    assert unary["tokens"] == [expected_tokens(5, f).tolist() for f in range(2)]
    image = np.array(unary["image"])
    assert image.shape == (1, 8, 8, 3) and (image[:, 4:] == 9).all() and (image[:, :4] != 9).any()
    for name, status, message in (
        ("parameter", "INVALID_ARGUMENT", "no parameter 'sede'"),
        ("deadline", "DEADLINE_EXCEEDED", ""),
        ("timeout", "DEADLINE_EXCEEDED", "was not finished within 1e-06 s"),
        ("model", "NOT_FOUND", "no model 'other'"),
    ):
        code, told = seen["errors"][name]
        assert code == f"StatusCode.{status}" and message in told
    frames = [[str(seed), f, clip(seed, range(f, f + 1))] for seed in (0, 1) for f in range(2)]
    assert seen["stream"] == {"frames": frames, "error": "prompt 'refused' is refused"}
    assert "ancel" in seen["cancelled"]


def test_tritons_client_loads_and_unloads_models():
    with Server(open_engine=lambda path: FakeEngine()) as server:
        server.load("", Path("b/fake"))
        script = str(HERE / "triton_client.py")
        output = ran(program("python"), script, server.address, "repository")
    seen = json.loads(output)["repository"]
    for name, field in (("config", "'config'"), ("files", "'file:1/model.onnx'"), ("both", "'")):
        code, told = seen["refused"][name]
        assert code == "StatusCode.INVALID_ARGUMENT" and "takes no parameters" in told
        assert field in told
    code, told = seen["refused"]["part"]
    assert code == "StatusCode.INVALID_ARGUMENT" and "unload 'fake'" in told
    assert seen["versions"] == [["1"], ["2"]], "what is refused loads nothing"
    assert not seen["ready"] and seen["left"] == 0


def test_a_client_that_knows_the_methods_by_reflection(server):
    seen = json.loads(ran(program("python"), str(HERE / "reflecting_client.py"), server.address))
    assert {"nuwa.v1.GenerationService", "inference.GRPCInferenceService"} <= set(seen["services"])
    assert seen["image"] == ["mine", "7", "IMAGE_FORMAT_PNG"]
    assert seen["events"].count("frame") == 3 and seen["events"][-1] == "done"
    assert seen["inputs"] == ["PROMPT"]


@pytest.mark.parametrize(("method", "steps"), [("GenerateImage", 4), ("GenerateVideo", 40)])
def test_a_deadline_of_a_client_that_reflects(slow, method, steps):
    script = str(HERE / "reflecting_client.py")
    ended = json.loads(ran(program("python"), script, slow.address, method, "1"))
    assert ended == "DEADLINE_EXCEEDED"
    freed(slow, steps)


def buf_command(server: Server, method: str, data: dict, *more: str) -> list[str]:
    options = ("--protocol", "grpc", "--http2-prior-knowledge", "--data", json.dumps(data))
    return [program("buf"), "curl", *options, *more, f"http://{server.address}/{method}"]


def buf_curl(server: Server, method: str, data: dict, *more: str, code: int = 0) -> list[dict]:
    output = ran(*buf_command(server, method, data, *more), code=code)
    decoder, found = json.JSONDecoder(), []
    while output.strip():
        value, end = decoder.raw_decode(output.strip())
        found.append(value)
        output = output.strip()[end:]
    return found


def test_buf_curl(server):
    service = "nuwa.v1.GenerationService"
    asked = {"task": "TASK_T2V", "prompt": "a 3", "frameCount": 2}
    events = buf_curl(server, f"{service}/GenerateVideo", asked)
    assert [next(iter(event)) for event in events].count("frame") == 2
    [health] = buf_curl(server, "grpc.health.v1.Health/Check", {"service": service})
    assert health == {"status": "SERVING"}
    [error] = buf_curl(server, f"{service}/GenerateImage", {"task": "TASK_T2I"}, code=24)
    assert error["code"] == "invalid_argument" and "prompt is empty" in error["message"]
    assert [detail["type"] for detail in error["details"]] == [
        "google.rpc.ErrorInfo",
        "google.rpc.BadRequest",
    ]
    bad = error_details_pb2.BadRequest.FromString(base64_decoded(error["details"][1]["value"]))
    assert [each.field for each in bad.field_violations] == ["prompt"]


CLIP = ("nuwa.v1.GenerationService/GenerateVideo", {"task": "TASK_T2V", "prompt": "a 3"})


def test_a_deadline_of_buf_curl(slow):
    """It takes no grpc-timeout as a header, but sends one for this."""
    [*_, error] = buf_curl(slow, *CLIP, "--timeout", "2s", code=4 << 3)
    assert error["code"] == "deadline_exceeded"
    freed(slow, 40)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("name", ["buf", "python"])
def test_a_client_that_is_ended_within_a_stream_frees_its_slot(slow, name, number):
    command = buf_command(slow, *CLIP)
    if name == "python":
        script = str(HERE / "reflecting_client.py")
        command = [program("python"), script, slow.address, "GenerateVideo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        try:
            wait_until(lambda: slow.scheduler.engine.steps >= 1, SECONDS)
            client.send_signal(number)
            freed(slow, 40)
        finally:
            client.kill()


def base64_decoded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4))


def test_buf_lint():
    assert ran(program("buf"), "lint", str(ROOT / "proto")) == ""


def test_the_interface_breaks_no_client_of_the_release():
    """Nor of any later commit, if none broke this: `make released` after a release."""
    released = str(ROOT / "proto" / "released.binpb")
    assert ran(program("buf"), "breaking", str(ROOT / "proto"), "--against", released) == ""


def test_what_would_break_a_client_is_seen(tmp_path):
    copy = tmp_path / "proto"
    shutil.copytree(ROOT / "proto", copy)
    for file in copy.rglob("generation.proto"):
        text = file.read_text()
        assert "string prompt = " in text
        file.write_text(text.replace("string prompt = ", "string caption = "))
    released = str(ROOT / "proto" / "released.binpb")
    done = subprocess.run(
        [program("buf"), "breaking", str(copy), "--against", released],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode and "prompt" in done.stdout


@pytest.mark.parametrize(
    ("model", "answers", "how"),
    [
        ("fake_t2i", 1, []),
        ("fake_t2v", 4, ["--streaming", "--request-parameter", "frame_count:3:int"]),
    ],
    ids=["unary", "streams"],
)
def test_perf_analyzer(server, tmp_path, model, answers, how):
    """A clip of three frames is an answer for each, and an empty one that says that it is over."""
    analyzer = ROOT / "build" / "perf_analyzer" / "perf_analyzer"
    if not analyzer.exists():
        pytest.skip(f"{analyzer} is not installed; `make build/perf_analyzer`")
    requests, out = 10, tmp_path / "profile.json"
    key = server.host.loaded[0].title, Task(model.removeprefix("fake_"))
    before = server.metrics.statistics[key].succeeded
    told = ran(
        str(analyzer),
        *("-m", model, "-i", "grpc", "-u", server.address),
        *("--shape", "PROMPT:1", "--string-data", "a 3"),
        *("--request-count", str(requests), "--profile-export-file", str(out)),
        *how,
    )
    assert f"Request count: {requests}" in told
    wait_until(lambda: server.metrics.statistics[key].succeeded - before == requests)
    # The analyzer asks for these statistics while requests may still be under way.
    counted = int(re.search(r"Successful request count: (\d+)", told)[1])
    assert 0 < counted <= requests, "what our statistics say"
    seen = json.loads(out.read_text())["experiments"][0]["requests"]
    assert [len(each["response_timestamps"]) for each in seen] == [answers] * requests
