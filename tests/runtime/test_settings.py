"""Settings of the server from flags, environment and file, and what is told of wrong ones."""

from __future__ import annotations

import tomllib

import pytest

from nuwa.runtime.cli import main
from nuwa.runtime.settings import ServerSettings, read


def test_flags_go_before_the_environment_and_that_before_the_file(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text('slots = 2\nqueue_size = 20\nport = 1\nhost = "localhost"\n')
    environment = {"NUWA_QUEUE_SIZE": "30", "NUWA_PORT": "2", "NUWA_GRACE": "", "HOME": "/"}
    found = read({"port": "3", "grace": None}, file, environment)
    assert (found.slots, found.queue_size, found.port, found.host) == (2, 30, 3, "localhost")
    assert found.grace == ServerSettings().grace


def test_what_is_printed_reads_back_as_the_same(tmp_path):
    flags = {"bundle": "a b", "slots": 3, "reflection": False, "grace": "1.5"}
    found = read(flags | {"bundles": "x=some/folder,y-2=other"}, None, {})
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
        ({}, {}, 'bundles = {"a/b" = "x"}', "name 'a/b' is not of letters, digits"),
        ({}, {}, "slots = ", "server.toml is not TOML"),
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
