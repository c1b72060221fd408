"""Several models and versions side by side: found, loaded anew, taken away, in use meanwhile."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import threading
import time
import weakref
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nuwa.inference import grpc_service_pb2 as kserve
from nuwa.inference import grpc_service_pb2_grpc
from nuwa.runtime import server as server_module
from nuwa.runtime.bundle import BundleError
from nuwa.runtime.client import Client, ClientError
from nuwa.runtime.errors import NotFoundError, NotReadyError
from nuwa.runtime.host import Host
from nuwa.runtime.kserve.models import find
from nuwa.runtime.scheduler import Scheduler
from nuwa.runtime.server import SERVICE, SLOW_READERS, Server
from nuwa.runtime.settings import ServerSettings
from nuwa.runtime.until_signal import serve_until_signal
from nuwa.v1 import generation_pb2 as pb
from nuwa.v1 import generation_pb2_grpc

from .fake_engine import FakeEngine
from .messages import image, once, video, wait_until


class Bundles:
    """Stands for folders with bundles: engines by path, and errors for those that are broken."""

    def __init__(self) -> None:
        self.opened: list[FakeEngine] = []
        self.broken: set[str] = set()
        self.contents: dict[str, str] = {}

    def open(self, path: Path) -> FakeEngine:
        if str(path) in self.broken:
            raise BundleError(f"{path}: decoder.onnx is not the file that was exported")
        engine = FakeEngine()
        named = self.contents.get(str(path), str(path))
        engine.info = dataclasses.replace(engine.info, name=path.name, bundle_hash=named)
        self.opened.append(engine)
        return engine

    def hash(self, path: Path) -> str:
        return self.contents.get(str(path), str(path))


@pytest.fixture
def bundles(monkeypatch):
    bundles = Bundles()
    monkeypatch.setattr(server_module, "manifest_hash", bundles.hash)
    return bundles


@pytest.fixture
def host(bundles):
    host = Host(bundles.open, lambda engine, name: Scheduler(engine))
    yield host
    for engine in bundles.opened:
        engine.gate.set()
    host.close()


def test_models_are_found_by_name_and_version(host):
    with pytest.raises(NotReadyError, match="no model is loaded"):
        host.find()
    first = host.load("", Path("b/small"))
    second = host.load("large", Path("b/x"))
    newer = host.load("large", Path("b/x"), beside=True)
    assert [each.title for each in host.loaded] == ["small/1", "large/2", "large/1"]
    assert host.find() is host.find("small") is host.find("small/1") is first
    assert host.find("large") is newer and host.find("large/1") is second
    for name, told in (
        ("other", "no model 'other'; this server has small, large"),
        ("large/3", "model 'large' has no version '3'; it has 1, 2"),
        ("large/x", "no version 'x'"),
        ("large/" + "1" * 5000, "no version '1111"),
        ("large/01", "no version '01'"),
        ("large/", "no version ''"),
        ("/1", "no model '/1'"),
    ):
        with pytest.raises(NotFoundError, match=told):
            host.find(name)


def test_loading_anew_takes_the_place_of_the_old_one(host):
    old = host.load("", Path("b/small"))
    new = host.reload("small")
    assert host.loaded == [new] and new.version == 2 and new.engine is not old.engine
    wait_until(lambda: not old.scheduler._threads[0].is_alive())
    with pytest.raises(NotFoundError, match="it has 2"):
        host.find("small/1")


def test_a_bundle_that_cannot_be_loaded_changes_nothing(host, bundles):
    old = host.load("", Path("b/small"))
    bundles.broken.add("b/small")
    with pytest.raises(BundleError, match="is not the file that was exported"):
        host.reload("small")
    assert host.loaded == [old] and not old.retired
    bundles.broken.clear()
    assert host.reload("").version == 2, "a failure takes no number"


def test_who_is_in_an_old_version_stays_in_it(host):
    old = host.load("", Path("b/small"))
    with host.use("small") as used:
        assert used is old
        new = host.reload("small")
        with host.use() as other:
            assert other is new
        assert old.scheduler._threads[0].is_alive() and not old.idle.is_set()
    wait_until(lambda: not old.scheduler._threads[0].is_alive())
    assert new.scheduler._threads[0].is_alive()


def test_taking_away(host):
    host.load("", Path("b/small"))
    host.load("large", Path("b/x"))
    host.load("large", Path("b/x"), beside=True)
    assert [each.title for each in host.unload("large/2")] == ["large/2"]
    assert host.find("large").version == 1
    host.unload("large")
    assert [each.title for each in host.loaded] == ["small/1"]
    with pytest.raises(NotFoundError):
        host.unload("large")
    host.unload("small")
    with pytest.raises(NotReadyError):
        host.find()
    assert host.load("large", Path("b/x")).version == 3, "numbers are never used again"


def test_an_engine_without_a_bundle_cannot_be_loaded_again(host):
    host.add(FakeEngine())
    with pytest.raises(ValueError, match="model 'fake' was not loaded from a bundle"):
        host.reload("fake")


@pytest.fixture
def server(bundles):
    with Server(open_engine=bundles.open) as server:
        server.load("", Path("b/small"))
        server.load("large", Path("b/x"))
        yield server
        for engine in bundles.opened:
            engine.gate.set()


def test_requests_say_which_model(server, bundles):
    with Client(server.address, attempts=1) as client:
        client.generate_image("t2i", "a 3", model="large")
        client.generate_image("t2i", "a 3", model="small/1")
        client.generate_video("t2v", "a 3", frame_count=1)
        assert [len(engine.admitted) for engine in bundles.opened] == [2, 1]
        with pytest.raises(ClientError, match="this server has small, large") as caught:
            client.generate_image("t2i", "a 3", model="other")
        assert caught.value.code is grpc.StatusCode.NOT_FOUND
        assert [(each.name, each.version) for each in client.list_models()] == [
            ("small", 1),
            ("large", 1),
        ]
        assert client.get_model("large").name == "large" and client.get_model().name == "small"
        assert client.reload_model("large").version == 2
        assert client.get_model("large").version == 2
        with pytest.raises(ClientError, match="name it without") as caught:
            client.reload_model("large/2")
        assert "model" in caught.value.fields
        client.unload_model("small")
        assert [each.name for each in client.list_models()] == ["large"]
        with pytest.raises(ClientError, match="'small', the default one, is not loaded") as caught:
            client.generate_image("t2i", "a 3", deadline=1)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        assert client.generate_image("t2i", "a 3", seed=4, model="large").seed == 4
        client.reload_model("small")
        assert client.get_model().name == "small"
        assert [each.name for each in client.list_models()] == ["small", "large"]
        with pytest.raises(ClientError, match="model is empty"):
            client.unload_model("")


def test_a_failed_reload_is_told_and_the_old_one_serves_on(server, bundles):
    bundles.broken.add("b/small")
    with Client(server.address, attempts=1) as client:
        with pytest.raises(ClientError, match="is not the file that was exported") as caught:
            client.reload_model("small")
        assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
        assert caught.value.reason == "BAD_BUNDLE"
        assert client.generate_image("t2i", "a 3", seed=4, model="small").seed == 4
        assert client.get_model("small").version == 1


def test_versions_side_by_side(server):
    with Client(server.address) as client:
        assert client.reload_model("small", keep_earlier=True).version == 2
        assert [(each.name, each.version) for each in client.list_models()][:2] == [
            ("small", 2),
            ("small", 1),
        ]
        for model, version in (("small", 2), ("small/1", 1), ("small/2", 2), ("", 2)):
            assert client.get_model(model).version == version
            assert client.generate_image("t2i", "a 3", seed=4, model=model).seed == 4
        client.unload_model("small/1")
        with pytest.raises(ClientError, match="no version '1'; it has 2"):
            client.generate_image("t2i", "a 3", model="small/1")
        assert client.reload_model("small").version == 3
        assert [each.version for each in client.list_models() if each.name == "small"] == [3]


def test_a_full_model_leaves_the_others_their_queues(bundles):
    """... and a further version of one, too."""
    size = SLOW_READERS + 8  # more than the calls of one model would leave to another
    settings = ServerSettings(
        port=0, bundle=Path("b/small"), bundles={"large": Path("b/x")}, queue_size=size
    )
    with (
        Server(settings=settings, open_engine=bundles.open) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        server.load("", Path("b/small"))
        server.load("large", Path("b/x"))
        server.load("large", Path("b/x"), beside=True)
        calls = []
        try:
            for name in ("small", "large/1", "large/2"):
                calls += filled(stub, server, name)
        finally:
            for engine in bundles.opened:
                engine.gate.set()
        assert all(call.result(20).frame.data for call in calls)


def filled(
    stub: generation_pb2_grpc.GenerationServiceStub, server: Server, name: str
) -> list[grpc.Future]:
    """Calls that have the model's slot and all of its queue."""
    loaded = server.host.find(name)
    loaded.engine.gate.clear()
    calls = [stub.GenerateImage.future(image(model=name))]
    wait_until(lambda: loaded.scheduler.active == 1)
    size = loaded.scheduler.queue_size
    calls += [stub.GenerateImage.future(image(model=name)) for _ in range(size)]
    wait_until(lambda: loaded.scheduler.queued == size, seconds=20)
    with pytest.raises(grpc.RpcError, match="the queue is full"):
        stub.GenerateImage(image(model=name))
    return calls


def test_a_stream_ends_in_the_version_it_began_in(server, channel, bundles):
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    old = bundles.opened[0]
    old.gate.clear()
    call = stub.GenerateVideo(video(frame_count=3))
    assert next(call).HasField("accepted")
    with Client(server.address) as client:
        assert client.reload_model("small").version == 2
        assert client.generate_image("t2i", "a 3", seed=2).seed == 2
    old.gate.set()
    events = list(call)
    assert events[-1].HasField("done") and sum(e.HasField("frame") for e in events) == 3
    assert len(old.admitted) == 1 and len(bundles.opened[2].admitted) == 1


def test_reloads_under_load_lose_nothing(server, bundles):
    failures, done = [], []
    stop = threading.Event()

    def ask():
        with Client(server.address, attempts=1) as client:
            while not stop.is_set():
                try:
                    client.generate_image("t2i", "a 3", model="small")
                    done.append(1)
                except ClientError as error:
                    failures.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        before = len(done)
        server.host.reload("small")
        wait_until(lambda: len(done) > before)  # noqa: B023
    stop.set()
    for thread in threads:
        thread.join(20)
    assert not failures and len(done) >= 20
    assert server.host.find("small").version == 21
    served = [len(engine.admitted) for engine in bundles.opened if engine.info.name == "small"]
    assert sum(served) == len(done) and sum(each > 0 for each in served) > 2


def test_the_open_inference_protocol_has_them_all(server, channel, bundles):
    stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
    index = stub.RepositoryIndex(kserve.RepositoryIndexRequest())
    names = {(each.name, each.version) for each in index.models}
    assert {("small_t2i", "1"), ("large_t2v", "1")} <= names and len(names) == 14
    stub.RepositoryModelLoad(kserve.RepositoryModelLoadRequest(model_name="large_t2i"))
    about = stub.ModelMetadata(kserve.ModelMetadataRequest(name="large_t2v"))
    assert list(about.versions) == ["2"]
    server.load("large", Path("b/x"), beside=True)
    about = stub.ModelMetadata(kserve.ModelMetadataRequest(name="large_t2v", version="2"))
    assert list(about.versions) == ["2", "3"]
    request = kserve.ModelInferRequest(model_name="large_t2i", model_version="2")
    request.inputs.add(name="PROMPT", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(b"\x03\0\0\0a 3")
    assert stub.ModelInfer(request).model_version == "2"
    request.model_version = ""
    assert stub.ModelInfer(request).model_version == "3"
    for version in ("2", "3"):
        about = kserve.ModelStatisticsRequest(name="large_t2i", version=version)
        assert stub.ModelStatistics(about).model_stats[0].inference_count == 1
    stub.RepositoryModelUnload(kserve.RepositoryModelUnloadRequest(model_name="large"))
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    stub.RepositoryModelLoad(kserve.RepositoryModelLoadRequest(model_name="large_t2i"))
    assert stub.ModelInfer(request).model_version == "4"
    with pytest.raises(grpc.RpcError) as caught:
        stub.RepositoryModelLoad(kserve.RepositoryModelLoadRequest(model_name="other_t2i"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_without_a_model_a_server_is_not_ready(server, channel):
    health = health_pb2_grpc.HealthStub(channel)
    statuses = health_pb2.HealthCheckResponse

    def status() -> int:
        return health.Check(health_pb2.HealthCheckRequest(service=SERVICE)).status

    with Client(server.address) as client:
        for name in ("small", "large"):
            assert status() == statuses.SERVING
            client.unload_model(name)
        assert status() == statuses.NOT_SERVING
        assert client.reload_model("large").version == 2, "taken away, and loaded again"
        assert status() == statuses.SERVING


def test_a_server_ends_although_an_old_version_hangs(bundles):
    server = Server(open_engine=bundles.open, hang_timeout=0.2)
    server.start()
    server.load("", Path("b/small"))
    bundles.opened[0].gate.clear()
    with grpc.insecure_channel(server.address) as channel:
        call = generation_pb2_grpc.GenerationServiceStub(channel).GenerateVideo(video())
        assert next(call).HasField("accepted")
        old = server.host.find().scheduler
        server.host.reload("small")
        wait_until(lambda: not server.is_ready())  # what hangs is seen although it is retired
        once(lambda: old._aborting, bundles.opened[0].gate.set)
        server.stop(0)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_server_is_alive_while_it_loads_and_ready_when_it_has(bundles):
    statuses = health_pb2.HealthCheckResponse
    with (
        Server(open_engine=bundles.open) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)

        def status(service: str) -> int:
            return health.Check(health_pb2.HealthCheckRequest(service=service)).status

        assert (status(""), status(SERVICE)) == (statuses.SERVING, statuses.NOT_SERVING)
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GenerateImage(image())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        models = generation_pb2_grpc.ModelServiceStub(channel)
        assert not models.ListModels(pb.ListModelsRequest()).models
        server.load("", Path("b/small"))
        assert status(SERVICE) == statuses.SERVING
        assert stub.GenerateImage(image()).frame.data


def test_a_bundle_that_cannot_be_loaded_at_the_start_ends_the_server(bundles):
    bundles.broken.add("b/small")
    server = Server(open_engine=bundles.open)
    with pytest.raises(BundleError):
        serve_until_signal(server, load=lambda: server.load("", Path("b/small")))
    with pytest.raises(ClientError):
        Client(server.address, ready_timeout=0.3)


def test_it_is_ready_when_all_that_it_is_to_serve_is_loaded(bundles):
    with (
        Server(open_engine=bundles.open) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        server.host.expect(["large"])
        health = health_pb2_grpc.HealthStub(channel)
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        server.load("", Path("b/small"))
        assert health.Check(request).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert stub.GenerateImage(image(model="small")).frame.data
        with pytest.raises(grpc.RpcError) as caught:
            stub.GenerateImage(image(model="large"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert caught.value.details() == "model 'large' is being loaded"
        with pytest.raises(NotReadyError, match="'large_t2i' is being loaded"):
            find(server.host, "large_t2i", "")
        with pytest.raises(grpc.RpcError) as caught:
            stub.GenerateImage(image(model="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        server.load("large", Path("b/x"))
        assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
        assert stub.GenerateImage(image(model="large")).frame.data


def test_a_signal_while_it_loads_ends_it_at_once(bundles, capsys):
    server, release = Server(open_engine=bundles.open), threading.Event()

    def load():
        os.kill(os.getpid(), signal.SIGTERM)
        release.wait(30)
        server.load("", Path("b/small"))

    started = time.monotonic()
    serve_until_signal(server, load=load)
    assert time.monotonic() - started < 5
    release.set()
    assert "ready" not in capsys.readouterr().out
    assert not server.host.loaded


@pytest.fixture
def half_loaded(bundles):
    """A server; begin(): loads one model, and has it make a clip that its gate holds up; outcome():
    the clip's last event, or the status, when it has ended.
    """
    server = Server(open_engine=bundles.open)
    channel = grpc.insecure_channel(server.address)
    began, ended, got = threading.Event(), threading.Event(), []

    def ask():
        try:
            for event in generation_pb2_grpc.GenerationServiceStub(channel).GenerateVideo(video()):
                got.append(event)
                began.set()
        except grpc.RpcError as error:
            got.append(error.code())
        ended.set()

    def begin():
        server.load("", Path("b/small"))
        bundles.opened[0].gate.clear()
        threading.Thread(target=ask, daemon=True).start()
        assert began.wait(10)

    def outcome():
        assert ended.wait(10)
        return got[-1]

    yield server, begin, outcome
    channel.close()


def test_a_signal_while_a_further_bundle_is_loaded_drains(bundles, half_loaded, capsys, caplog):
    caplog.set_level("INFO", "nuwa.runtime")
    server, begin, outcome = half_loaded
    release = threading.Event()

    def load():
        begin()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: "draining" in caplog.text)
        bundles.opened[0].gate.set()
        release.wait(30)

    serve_until_signal(server, load=load, grace=20)
    release.set()
    assert outcome().HasField("done")
    assert "ends while loading" in caplog.text and "ready" not in capsys.readouterr().out


def test_a_second_signal_while_it_loads_cuts_the_drain(bundles, half_loaded, caplog):
    caplog.set_level("INFO", "nuwa.runtime")
    server, begin, outcome = half_loaded
    release = threading.Event()

    def load():
        begin()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: "draining" in caplog.text)
        os.kill(os.getpid(), signal.SIGTERM)
        assert outcome() is grpc.StatusCode.UNAVAILABLE
        bundles.opened[0].gate.set()
        release.wait(30)

    started = time.monotonic()
    serve_until_signal(server, load=load, grace=60)
    assert time.monotonic() - started < 20
    release.set()
    assert outcome() is grpc.StatusCode.UNAVAILABLE


def test_a_further_bundle_that_cannot_be_loaded_cuts_no_request(bundles, half_loaded, caplog):
    server, begin, outcome = half_loaded
    bundles.broken.add("b/x")

    def load():
        begin()
        threading.Timer(0.5, bundles.opened[0].gate.set).start()
        server.load("large", Path("b/x"))

    with pytest.raises(BundleError, match="is not the file that was exported"):
        serve_until_signal(server, load=load, grace=20)
    assert outcome().HasField("done")
    assert "a further bundle could not be loaded, so the server ends" in caplog.text


def test_a_hangup_loads_what_has_changed(bundles, caplog):
    caplog.set_level("INFO", "nuwa.runtime")
    server = Server(open_engine=bundles.open)
    versions = []

    def hang_up():
        try:
            bundles.contents["b/x"] = "something new"
            os.kill(os.getpid(), signal.SIGHUP)
            now = ["small/1", "large/2"]
            wait_until(lambda: [each.title for each in server.host.loaded] == now)
            bundles.contents["b/small"] = "newer"
            bundles.broken.add("b/small")
            os.kill(os.getpid(), signal.SIGHUP)
            wait_until(lambda: "small could not be loaded again" in caplog.text)
            versions.extend(each.title for each in server.host.loaded)
        finally:
            server.asked_to_end.set()

    worker = threading.Thread(target=hang_up)

    def load():
        server.load("", Path("b/small"))
        server.load("large", Path("b/x"))
        worker.start()

    serve_until_signal(server, load=load)
    worker.join()
    assert versions == ["small/1", "large/2"]
    assert "small/1 is as it was" in caplog.text


def test_a_process_of_its_own_collects_nothing_of_what_it_keeps():
    """... but what is retired goes all the same."""
    with Server(open_engine=lambda path: FakeEngine()) as server:
        server.owns_process = True
        try:
            server.load("m", Path("one"))
            wait_until(lambda: gc.get_freeze_count() > 1000)
            old = weakref.ref(server.host.find().engine)
            server.load("m", Path("two"))
            wait_until(lambda: old() is None)
        finally:
            server.owns_process = False
            gc.unfreeze()
