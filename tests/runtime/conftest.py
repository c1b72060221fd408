"""A server over the fake engine, on a free loopback port, a stub that talks to it, tiny bundles."""

from __future__ import annotations

import grpc
import pytest

from nuwa.runtime.bundle import open_bundle
from nuwa.runtime.client import Client, LocalClient
from nuwa.runtime.server import Server
from nuwa.v1 import generation_pb2_grpc

from .backend_kinds import OTHER_MODELS, other_bundle
from .fake_engine import FakeEngine


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def server(engine):
    with Server(engine, queue_size=2, max_watches=16, max_streams=16) as server:
        yield server
        engine.gate.set()


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(server.address, [("grpc.max_send_message_length", -1)]) as channel:
        yield channel


@pytest.fixture
def stub(channel):
    return generation_pb2_grpc.GenerationServiceStub(channel)


@pytest.fixture(params=["server", "local"])
def client(request, engine):
    """Both clients in turn: over the server, and without one."""
    if request.param == "local":
        with LocalClient(engine) as client:
            yield client
        return
    with Client(request.getfixturevalue("server").address) as client:
        yield client


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def plain(plain_bundle):
    return open_bundle(plain_bundle)


@pytest.fixture(scope="module", params=OTHER_MODELS)
def other(request, tmp_path_factory):
    return other_bundle(request.param, tmp_path_factory.mktemp("other"))
