"""TLS, client certificates and tokens: who gets in, who does not, and how both change."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from nuwa.inference import grpc_service_pb2, grpc_service_pb2_grpc
from nuwa.runtime import tokens as tokens_module
from nuwa.runtime.async_client import AsyncClient
from nuwa.runtime.auth import scope_of
from nuwa.runtime.cli import main
from nuwa.runtime.client import Access, Client, ClientError
from nuwa.runtime.server import Server
from nuwa.runtime.tokens import Tokens, read_tokens
from nuwa.v1 import generation_pb2, generation_pb2_grpc

from .fake_engine import FakeEngine

TOKEN, ADMIN, OLD = "a-token-for-apps-1", "a-token-for-admins", "a-token-of-old-days"


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


def issue(authority: trustme.CA, folder: Path, name: str = "localhost") -> dict[str, Path]:
    """Writes a certificate for `name`: the chain, its key and the authority."""
    folder.mkdir(parents=True, exist_ok=True)
    made = authority.issue_cert(name, "127.0.0.1")
    paths = {part: folder / f"{part}.pem" for part in ("chain", "key", "ca")}
    chain = b"".join(pem.bytes() for pem in made.cert_chain_pems)
    for part, data in (
        ("chain", chain),
        ("key", made.private_key_pem.bytes()),
        ("ca", authority.cert_pem.bytes()),
    ):
        temporary = paths[part].with_suffix(".new")
        temporary.write_bytes(data)
        temporary.replace(paths[part])
    return paths


@pytest.fixture
def files(authority, tmp_path):
    return issue(authority, tmp_path / "server")


def tls_server(files: dict[str, Path], **settings) -> Server:
    return Server(FakeEngine(), tls_certificate=files["chain"], tls_key=files["key"], **settings)


def generates(address: str, **access) -> bool:
    with Client(address, ready_timeout=5, attempts=1, access=Access(**access)) as client:
        return client.generate_image("t2i", "a 3", seed=1).seed == 1


def fails(address: str, **access) -> str:
    with (
        pytest.raises(ClientError) as caught,
        Client(address, ready_timeout=1.5, access=Access(**access)),
    ):
        pass
    return str(caught.value)


def test_tls_with_the_right_authority_and_no_other(files, authority, tmp_path):
    other = issue(trustme.CA(), tmp_path / "other")
    with tls_server(files) as server:
        assert generates(server.address, tls=True, ca=files["ca"])
        assert "no server answered" in fails(server.address, tls=True, ca=other["ca"])
        assert "no server answered" in fails(server.address)

        async def main():
            access = Access(tls=True, ca=files["ca"])
            async with AsyncClient(server.address, access=access) as client:
                return await client.generate_image("t2i", "a 3", seed=4)

        assert asyncio.run(main()).seed == 4


def test_clients_show_certificates_where_they_must(files, authority, tmp_path):
    mine = issue(authority, tmp_path / "mine", "app")
    stranger = issue(trustme.CA(), tmp_path / "stranger", "app")
    with tls_server(files, tls_client_ca=files["ca"]) as server:
        own = {"certificate": mine["chain"], "key": mine["key"]}
        assert generates(server.address, tls=True, ca=files["ca"], **own)
        assert list(server.scheduler._admission._asked) == ["app"], "who it is, for fairness"
        assert "no server" in fails(server.address, tls=True, ca=files["ca"])
        theirs = {"certificate": stranger["chain"], "key": stranger["key"]}
        assert "no server" in fails(server.address, tls=True, ca=files["ca"], **theirs)


def test_certificates_change_while_serving(files, authority, tmp_path):
    newer = trustme.CA()
    with tls_server(files) as server:
        with Client(server.address, access=Access(tls=True, ca=files["ca"])) as old:
            assert old.generate_image("t2i", "a 3", seed=1).seed == 1
            changed = issue(newer, tmp_path / "server")
            assert generates(server.address, tls=True, ca=changed["ca"])
            assert old.generate_image("t2i", "a 3", seed=2).seed == 2, "its connection stays"
        issue(trustme.CA(), tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "key.pem").replace(files["key"])  # of another certificate
        assert generates(server.address, tls=True, ca=changed["ca"])


def test_certificates_that_do_not_fit_are_told_of(files, tmp_path):
    other = issue(trustme.CA(), tmp_path / "other")
    with pytest.raises(ValueError, match="are not a certificate and its key"):
        tls_server(files | {"key": other["key"]})
    with pytest.raises(OSError, match="missing.pem"):
        tls_server(files | {"key": tmp_path / "missing.pem"})
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    with pytest.raises(ValueError, match=r"empty\.pem has no certificate"):
        tls_server(files, tls_client_ca=empty)


def table(name: str, token: str, scopes: str = '["infer"]', more: str = "") -> str:
    return f'[[token]]\nname = "{name}"\ntoken = "{token}"\nscopes = {scopes}\n{more}\n'


@pytest.fixture
def token_file(tmp_path):
    file = tmp_path / "tokens.toml"
    past = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    digest = hashlib.sha256(ADMIN.encode()).hexdigest()
    file.write_text(
        table("app", TOKEN)
        + f'[[token]]\nname = "admin"\nsha256 = "{digest}"\nscopes = ["admin"]\n'
        + table("old", OLD, more=f"expires = {past}")
    )
    return file


def refused(address: str, token: str | None) -> tuple[grpc.StatusCode, str, str]:
    with (
        Client(address, attempts=1, access=Access(token=token)) as client,
        pytest.raises(ClientError) as caught,
    ):
        client.generate_image("t2i", "a 3")
    return caught.value.code, caught.value.reason, str(caught.value)


def test_tokens_open_what_their_scopes_say(token_file):
    with Server(FakeEngine(), tokens=token_file) as server:
        assert generates(server.address, token=TOKEN)
        for token, told in (
            (None, "'authorization' is missing"),
            ("x" * 20, "the token is not known"),
            (OLD, "the token has expired"),
        ):
            code, reason, message = refused(server.address, token)
            assert code is grpc.StatusCode.UNAUTHENTICATED and reason == "UNAUTHENTICATED"
            assert told in message
        code, reason, message = refused(server.address, ADMIN)
        assert code is grpc.StatusCode.PERMISSION_DENIED and reason == "PERMISSION_DENIED"
        assert "has the scopes admin, and not infer" in message


def test_streams_need_them_too_and_health_does_not(token_file):
    with (
        Server(FakeEngine(), tokens=token_file) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == 1
        stream = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer
        listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        for call in (lambda: stream(iter([])), lambda: listing(iter([asked]))):
            with pytest.raises(grpc.RpcError) as caught:
                list(call())
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        answer = listing(iter([asked]), metadata=Access(token=TOKEN).metadata)
        assert next(answer).list_services_response.service
        with (
            Client(server.address, access=Access(token=TOKEN)) as client,
        ):
            assert len(client.generate_video("t2v", "a 3", frame_count=2).frames) == 2


def test_the_log_names_the_method_that_a_token_is_missing_for(token_file, caplog):
    caplog.set_level("INFO")
    methods = (
        "/nuwa.v1.GenerationService/GenerateImage",
        "/inference.GRPCInferenceService/ModelStreamInfer",
        "/other.Service/" + "M" * 1000,
    )
    with (
        Server(FakeEngine(), tokens=token_file) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        for method in methods:
            with pytest.raises(grpc.RpcError) as caught:
                list(channel.stream_stream(method)(iter([b""])))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    for told in said(caplog, "was refused"), said(caplog, "refused or stopped"):
        assert [each["method"] for each in told] == [method[:200] for method in methods]


def test_every_method_has_its_scope():
    assert scope_of("/grpc.health.v1.Health/Watch") is None
    assert scope_of("/inference.GRPCInferenceService/ServerLive") is None
    assert scope_of("/inference.GRPCInferenceService/ServerReady") is None
    assert scope_of("/inference.GRPCInferenceService/ModelReady") == "infer"
    assert scope_of("/nuwa.v1.GenerationService/GenerateVideo") == "infer"
    assert scope_of("/inference.GRPCInferenceService/ModelInfer") == "infer"
    assert scope_of("/inference.GRPCInferenceService/RepositoryModelUnload") == "admin"
    assert scope_of("/inference.GRPCInferenceService/RepositoryIndex") == "infer"
    assert scope_of("/something.else/Entirely") == "infer"


def admin_calls(channel: grpc.Channel, token: str | None = None) -> dict[str, grpc.RpcError | None]:
    """How all that changes models went, in an order in which each can succeed."""
    models = generation_pb2_grpc.ModelServiceStub(channel)
    kserve, messages = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel), grpc_service_pb2
    calls = {
        "ReloadModel": lambda **k: models.ReloadModel(
            generation_pb2.ReloadModelRequest(model="fake"), **k
        ),
        "RepositoryModelUnload": lambda **k: kserve.RepositoryModelUnload(
            messages.RepositoryModelUnloadRequest(model_name="fake"), **k
        ),
        "RepositoryModelLoad": lambda **k: kserve.RepositoryModelLoad(
            messages.RepositoryModelLoadRequest(model_name="fake"), **k
        ),
        "UnloadModel": lambda **k: models.UnloadModel(
            generation_pb2.UnloadModelRequest(model="fake"), **k
        ),
    }
    went: dict[str, grpc.RpcError | None] = {}
    for name, call in calls.items():
        try:
            call(metadata=Access(token=token).metadata, timeout=20)
            went[name] = None
        except grpc.RpcError as error:
            went[name] = error
    return went


def loaded_server(tmp_path: Path, **settings) -> Server:
    """With a model that can be loaded again."""
    server = Server(open_engine=lambda path: FakeEngine(), **settings)
    server.load("fake", tmp_path)
    return server


def said(caplog, ending: str) -> list[dict]:
    """The fields of records whose messages have `ending` in them."""
    return [each.nuwa for each in caplog.records if ending in each.getMessage()]


@pytest.mark.parametrize("encrypted", [False, True])
def test_without_tokens_nobody_beyond_the_machine_changes_its_models(
    encrypted, files, tmp_path, caplog
):
    caplog.set_level("INFO")
    settings: dict = {"host": "0.0.0.0", "insecure": not encrypted}
    if encrypted:
        settings |= {"tls_certificate": files["chain"], "tls_key": files["key"]}
    with loaded_server(tmp_path, **settings) as server:
        port = server.address.rpartition(":")[2]
        if encrypted:
            credentials = grpc.ssl_channel_credentials(files["ca"].read_bytes())
            channel = grpc.secure_channel(f"localhost:{port}", credentials)
        else:
            channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        with channel:
            went = admin_calls(channel)
            for name, error in went.items():
                assert error is not None, name
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED
                assert "a token of the scope admin" in error.details()
                assert "this server has no tokens" in error.details()
            stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
            index = stub.RepositoryIndex(grpc_service_pb2.RepositoryIndexRequest())
            assert all(each.version == "1" for each in index.models) and index.models
            models = generation_pb2_grpc.ModelServiceStub(channel)
            assert models.ListModels(generation_pb2.ListModelsRequest()).models
        told = said(caplog, "was refused")
        assert [each["method"].rpartition("/")[2] for each in told] == list(went)
        assert all(each["peer"].startswith("ipv") for each in told)
        assert not said(caplog, "is let in")
        before = server.host.find("fake").version
        server.host.reload("fake")  # as SIGHUP has it
        assert server.host.find("fake").version == before + 1


def test_programs_of_the_machine_change_models_without_tokens_and_the_log_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    with loaded_server(tmp_path) as server, grpc.insecure_channel(server.address) as channel:
        went = admin_calls(channel)
    assert went == dict.fromkeys(went)
    told = said(caplog, "is let in")
    assert [each["method"].rpartition("/")[2] for each in told] == list(went)
    assert all(each["peer"].startswith("ipv4:127.0.0.1:") for each in told)
    assert not any("token" in each for each in told)


def test_the_log_names_the_token_of_who_changes_models_and_of_who_may_not(
    token_file, tmp_path, caplog
):
    caplog.set_level("INFO")
    settings = {"host": "0.0.0.0", "insecure": True, "tokens": token_file}
    with loaded_server(tmp_path, **settings) as server:
        port = server.address.rpartition(":")[2]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            for token, name in ((TOKEN, "app"), (OLD, None), (None, None)):
                caplog.clear()
                went = admin_calls(channel, token)
                assert None not in went.values()
                told = said(caplog, "was refused")
                assert [each["method"].rpartition("/")[2] for each in told] == list(went)
                assert {each.get("token") for each in told} == {name}
                assert all(each["peer"].startswith("ipv4:127.0.0.1:") for each in told)
            caplog.clear()
            went = admin_calls(channel, ADMIN)
    assert went == dict.fromkeys(went)
    told = said(caplog, "is let in")
    assert [(each["method"].rpartition("/")[2], each["token"]) for each in told] == [
        (name, "admin") for name in went
    ]
    assert not any(token in caplog.text for token in (TOKEN, ADMIN, OLD))


def test_fairness_goes_by_the_name_of_the_token(token_file, monkeypatch):
    with Server(FakeEngine(), tokens=token_file) as server:
        clients = []
        submit = server.scheduler.submit

        def noted(*arguments, client, **options):
            clients.append(client)
            return submit(*arguments, client=client, **options)

        monkeypatch.setattr(server.scheduler, "submit", noted)
        assert generates(server.address, token=TOKEN)
        assert clients == ["app"]


def test_a_changed_file_is_read_again_and_a_broken_one_is_not(token_file, monkeypatch, caplog):
    monkeypatch.setattr(tokens_module, "LOOK_SECONDS", 0.0)
    tokens = Tokens(token_file)
    metadata = [("authorization", f"Bearer {TOKEN}")]
    assert tokens.check(metadata, "infer").name == "app"
    token_file.write_text("nonsense")
    assert tokens.check(metadata, "infer").name == "app"
    assert "the tokens stay as they were" in caplog.text
    token_file.write_text(table("new", "another-token-for-apps"))
    with pytest.raises(Exception, match="is not known"):
        tokens.check(metadata, "infer")
    os.unlink(token_file)
    assert tokens.check([("authorization", "bearer another-token-for-apps")], "infer").name == "new"


def test_a_token_expires_while_the_server_runs(tmp_path):
    file, clock = tmp_path / "tokens.toml", [time.time()]
    soon = datetime.fromtimestamp(clock[0] + 60, UTC).isoformat()
    file.write_text(table("app", TOKEN, more=f"expires = {soon}"))
    tokens = Tokens(file, now=lambda: clock[0])
    metadata = [("authorization", f"Bearer {TOKEN}")]
    assert tokens.check(metadata, "infer").name == "app"
    clock[0] += 61
    with pytest.raises(Exception, match="the token has expired"):
        tokens.check(metadata, "infer")


@pytest.mark.parametrize("value", ["Basic abc", "Bearer", b"\xff", ""])
def test_other_schemes_are_no_tokens(token_file, value):
    with pytest.raises(Exception, match="is not of the form 'Bearer TOKEN'"):
        Tokens(token_file).check([("authorization", value)], "infer")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one"),
        ("x = 1", "nothing else"),
        ("[[token", "is not TOML"),
        (table("", TOKEN), "token 1 has no name"),
        (table("a", "short"), r"token 1 \(a\): token is not a text of at least 16"),
        (table("a", TOKEN, '["all"]'), r"has the scopes \['all'\]; choose among infer, admin"),
        (table("a", TOKEN, "[]"), "choose among infer, admin"),
        (table("a", TOKEN, more='sha256 = "00"'), "one of token and sha256"),
        ('[[token]]\nname = "a"\nsha256 = "00"\nscopes = ["infer"]', "64 hexadecimal digits"),
        (table("a", TOKEN, more="expires = 2027-01-01"), "is not a time with an offset"),
        (table("a", TOKEN, more="role = 1"), "may say expires, name, scopes, sha256, token"),
        (table("a", TOKEN) * 2, "names of tokens are a, a; each may be there once"),
    ],
)
def test_a_wrong_file_of_tokens_is_told_of(tmp_path, text, message):
    file = tmp_path / "tokens.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_tokens(file)


def test_tokens_and_prompts_are_not_in_the_log(token_file, caplog):
    caplog.set_level("DEBUG")
    with Server(FakeEngine(), tokens=token_file) as server:
        assert generates(server.address, token=TOKEN)
        refused(server.address, "a-secret-that-is-wrong")
    assert TOKEN not in caplog.text and "a-secret" not in caplog.text


def test_the_command_line_gets_in(files, token_file, tmp_path, capsys):
    words = ["generate", "--task", "t2i", "--prompt", "a 3", "--out", str(tmp_path / "x.png")]
    with tls_server(files, tokens=token_file) as server:
        words += ["--server", server.address, "--tls-ca", str(files["ca"])]
        assert main(words) == 2
        assert "'authorization' is missing" in capsys.readouterr().err
        secret = tmp_path / "token"
        secret.write_text(TOKEN + "\n")
        assert main([*words, "--token-file", str(secret)]) == 0
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"tls": True, "certificate": Path("c")},
        {"ca": Path("c")},
        {"token": "line\nbreak"},
    ],
)
def test_contradictory_access_is_refused(wrong):
    with pytest.raises(ValueError, match=r"go together|say tls too|printable"):
        Access(**wrong)
