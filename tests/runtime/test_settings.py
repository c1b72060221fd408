"""Settings of the server from flags, environment and file, and what is told of wrong ones."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import grpc
import pytest

from nuwa.runtime.cli import main
from nuwa.runtime.commands.arguments import TOKEN_VARIABLE
from nuwa.runtime.server import AGE_GRACE, _options
from nuwa.runtime.settings import OTHER_VARIABLES, ServerSettings, ignored, read


def test_flags_go_before_the_environment_and_that_before_the_file(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text('slots = 2\nqueue_size = 20\nport = 1\nhost = "localhost"\n')
    environment = {"NUWA_QUEUE_SIZE": "30", "NUWA_PORT": "2", "NUWA_GRACE": "", "HOME": "/"}
    found = read({"port": "3", "grace": None}, file, environment)
    assert (found.slots, found.queue_size, found.port, found.host) == (2, 30, 3, "localhost")
    assert found.grace == ServerSettings().grace


def test_the_page_on_serving_has_every_setting_with_its_default():
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\S*) ?\| (.+) \|$", page, re.MULTILINE)
    said = {name: (default, what) for name, default, what in rows}
    for name, field in ServerSettings.model_fields.items():
        default = field.default
        if isinstance(default, bool | float):
            default = f"{default:g}" if isinstance(default, float) else str(default).lower()
        assert said[name] == (str(default or ""), field.description)


def test_what_is_printed_reads_back_as_the_same(tmp_path):
    flags = {"bundle": 'a "b" 茶🍵', "slots": 3, "reflection": False, "grace": "1.5"}
    found = read(flags | {"bundles": "x=some/folder,y-2= 🍵"}, None, {})
    assert set(found.bundles) == {"x", "y-2"}
    file = tmp_path / "printed.toml"
    file.write_text(found.to_toml())
    assert read({}, file, {}) == found
    assert tomllib.loads(found.to_toml())["reflection"] is False
    for name, field in ServerSettings.model_fields.items():
        assert f"{name} =" in found.to_toml() and field.description


@pytest.mark.parametrize(
    ("flags", "environment", "text", "message"),
    [
        ({"port": "70000"}, {}, "", r"port '70000' \(--port\): .*less than or equal to 65535"),
        ({}, {"NUWA_SLOTS": "0"}, "", r"slots '0' \(NUWA_SLOTS\): .*greater than or equal to 1"),
        ({}, {}, "slots = 'many'", r"slots 'many' \(.*server.toml\): .*valid integer"),
        (
            {},
            {},
            "slotz = 1",
            "server.toml: there is no setting 'slotz'; there are bundle, bundles",
        ),
        ({"bundles": "a"}, {}, "", r"bundles 'a' \(--bundles\): is not NAME=FOLDER,NAME=FOLDER"),
        ({"bundles": "a= "}, {}, "", r"bundles 'a= ' \(--bundles\): is not NAME=FOLDER"),
        ({}, {"NUWA_BUNDLES": "a=/x,b=/y, a=/z"}, "", r"\(NUWA_BUNDLES\): name 'a' is there twice"),
        ({}, {}, 'bundles = {"a/b" = "x"}', "name 'a/b' is not of letters, digits"),
        ({}, {}, "slots = ", "server.toml is not TOML"),
        ({}, {}, "slots = true", r"slots True \(.*server.toml\): true and false are for"),
        ({}, {}, "grace = false", "grace False .*true and false are for settings that are on or"),
        ({"metrics_host": "::"}, {}, "", "metrics_host '::' needs metrics_port"),
        ({}, {"NUWA_TRACE_ENDPOINT": "http://"}, "", "'http://' .NUWA_TRACE_ENDPOINT.: is not htt"),
        ({"backend": "x"}, {}, "", r"backend 'x' \(--backend\): choose one of auto, native-cpu"),
        ({"log_format": "xml"}, {}, "", "log_format 'xml' .*'text' or 'json'"),
        ({"tls_key": "k"}, {}, "", "tls_certificate and tls_key go together"),
        ({"tls_client_ca": "c"}, {}, "", "tls_client_ca needs tls_certificate"),
        ({"host": "0.0.0.0"}, {}, "", "host '0.0.0.0' is reached from other machines, so it needs"),
    ],
)
def test_wrong_settings_are_named_with_their_place(tmp_path, flags, environment, text, message):
    file = tmp_path / "server.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(flags, file, environment)


NUMBERS = [
    name
    for name, field in ServerSettings.model_fields.items()
    if field.annotation in (int, float, int | None, float | None)
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e16", "99999999999999", "-1"])
def test_no_number_is_without_bounds(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        read({name: value}, None, {})
    file = tmp_path / "server.toml"
    file.write_text(f"{name} = {value}")
    with pytest.raises(ValueError, match=name):
        read({}, file, {})


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_is_true_or_false(name):
    with pytest.raises(ValueError, match=f"{name} True .*true and false are for"):
        read({name: True}, None, {})


def test_what_is_on_or_off_is_true_or_false(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text("reflection = false\ninsecure = true")
    found = read({}, file, {})
    assert found.insecure and not found.reflection
    assert read({"reflection": True}, file, {"NUWA_INSECURE": "true"}).reflection


def test_an_empty_variable_counts_as_not_given(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text("metrics_port = 9400")
    assert read({}, file, {"NUWA_METRICS_PORT": ""}).metrics_port == 9400


def test_a_host_of_metrics_needs_their_port(tmp_path):
    assert read({"metrics_host": "::", "metrics_port": "0"}, None, {}).metrics_host == "::"
    with pytest.raises(ValueError, match="metrics_host '::' needs metrics_port"):
        read({"metrics_host": "::"}, None, {"NUWA_METRICS_PORT": "tcp://10.0.0.7:9400"})
    file = tmp_path / "printed.toml"
    file.write_text(ServerSettings().to_toml())
    assert read({}, file, {}) == ServerSettings(), "the file has the host, and no port"


@pytest.mark.parametrize(
    "url",
    ["localhost:4317", "http:", "http://", "http://:4317", "http://a:b", "ftp://a", "http://a b"],
)
def test_traces_need_a_collector(url):
    with pytest.raises(ValueError, match=f"trace_endpoint '{url}' .*is not http://HOST:PORT"):
        read({"trace_endpoint": url}, None, {})


@pytest.mark.parametrize("url", ["http://localhost:4317", "https://a.b:1/", "http://[::1]:4317"])
def test_collectors(url):
    assert read({"trace_endpoint": url}, None, {}).trace_endpoint == url


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_message_bytes", "99999999999"),
        ("max_message_bytes", str(2**31)),
        ("max_connection_age", "1e12"),
        ("max_connection_age", "0.0001"),
        ("grace", str(366 * 86400)),
    ],
)
def test_what_grpc_could_not_take_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} '.*' \(--.*than or equal to"):
        read({name: value}, None, {})


@pytest.mark.parametrize("end", ["ge", "le"])
def test_grpc_takes_what_is_at_the_bounds(end):
    bounds = {}
    for name in ("max_message_bytes", "max_connection_age"):
        metadata = ServerSettings.model_fields[name].metadata
        [bounds[name]] = [getattr(each, end) for each in metadata if hasattr(each, end)]
    found = read(bounds, None, {})
    for name, value in bounds.items():
        assert getattr(found, name) == value
    server = grpc.server(None, options=_options(found))
    assert server.add_insecure_port("127.0.0.1:0") > 0
    server.stop(None)


def test_it_is_said_how_long_calls_outlive_their_connections_age():
    told = ServerSettings.model_fields["max_connection_age"].description
    assert f"{AGE_GRACE:g} s more" in told
    [grace] = [
        value
        for name, value in _options(ServerSettings(max_connection_age=1))
        if name == "grpc.max_connection_age_grace_ms"
    ]
    assert grace == 1000 * AGE_GRACE


def test_what_the_environment_has_no_setting_for_is_named():
    environment = {
        "NUWA_QUEUE_SIZ": "3",
        "NUWA_SLOTS": "2",
        "NUWA_ZZZZZ": "1",
        "NUWA_EMPTY": "",
        "QUEUE_SIZ": "3",
        TOKEN_VARIABLE: "a-secret",
    }
    assert ignored(environment) == [
        "NUWA_QUEUE_SIZ is ignored: there is no such setting; is NUWA_QUEUE_SIZE meant?",
        "NUWA_ZZZZZ is ignored: there is no such setting",
    ]
    assert TOKEN_VARIABLE in OTHER_VARIABLES
    assert ignored({f"NUWA_{name.upper()}": "1" for name in ServerSettings.model_fields}) == []


def test_a_service_next_door_in_kubernetes_is_no_setting():
    address = "tcp://10.0.0.7:50051"
    there = {"NUWA_PORT": address}
    for service in ("NUWA", "NUWA_METRICS"):
        there |= {
            f"{service}_SERVICE_HOST": "10.0.0.7",
            f"{service}_SERVICE_PORT": "50051",
            f"{service}_SERVICE_PORT_GRPC": "50051",
            f"{service}_PORT": address,
            f"{service}_PORT_50051_TCP": address,
            f"{service}_PORT_50051_TCP_PROTO": "tcp",
            f"{service}_PORT_50051_TCP_PORT": "50051",
            f"{service}_PORT_50051_TCP_ADDR": "10.0.0.7",
        }
    there["NUWA_CACHE_PORT"] = address  # of a Service that is called nuwa-cache
    assert read({}, None, there) == ServerSettings()
    told = ignored(there)
    assert [each.split("=")[0] for each in told] == ["NUWA_PORT", "NUWA_METRICS_PORT"]
    assert all("enableServiceLinks" in each for each in told)
    with pytest.raises(ValueError, match="port 'tcp' .NUWA_PORT."):
        read({}, None, {"NUWA_PORT": "tcp"})


def test_serve_warns_of_variables_that_it_ignores(caplog, capsys, monkeypatch):
    monkeypatch.setenv("NUWA_BUNDEL", "some/bundle")
    assert main(["serve"]) == 2
    assert "is NUWA_BUNDLE meant?" in caplog.text
    assert "which bundle?" in capsys.readouterr().err
    caplog.clear()
    assert main(["serve", "some/bundle", "--print-config"]) == 0
    assert "NUWA_BUNDEL is ignored" in caplog.text
    assert tomllib.loads(capsys.readouterr().out)["bundle"] == "some/bundle"


def test_serve_prints_its_settings(capsys, monkeypatch):
    monkeypatch.setenv("NUWA_QUEUE_SIZE", "7")
    assert main(["serve", "some/bundle", "--slots", "4", "--no-reflection", "--print-config"]) == 0
    printed = tomllib.loads(capsys.readouterr().out)
    assert printed["bundle"] == "some/bundle" and printed["slots"] == 4
    assert printed["queue_size"] == 7 and printed["reflection"] is False
    assert main(["serve"]) == 2
    assert "which bundle?" in capsys.readouterr().err
    assert main(["serve", "b", "--config", "missing.toml"]) == 2
    assert "missing.toml" in capsys.readouterr().err
