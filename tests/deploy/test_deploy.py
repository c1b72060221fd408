"""Files for deployment agree with the server's settings and with each other."""

from __future__ import annotations

import configparser
import json
import re
import tomllib
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from nuwa.runtime.client import Client
from nuwa.runtime.server import KSERVE, SERVICE, Server
from nuwa.runtime.settings import ServerSettings, read

from ..runtime.fake_engine import FakeEngine

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def manifests() -> dict[str, dict]:
    yaml = pytest.importorskip("yaml")
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / "nuwa.yaml").read_text())
    return {each["kind"]: each for each in documents}


def test_the_containers_settings_are_settings():
    found = read({}, DEPLOY / "container.toml", {})
    assert found.bundle == Path("/bundle") and found.metrics_port == 9400
    containerfile = (DEPLOY / "Containerfile").read_text()
    assert f"EXPOSE {found.port} {found.metrics_port}" in containerfile
    assert "COPY deploy/container.toml /etc/nuwa/server.toml" in containerfile
    assert '"--config", "/etc/nuwa/server.toml"' in containerfile


def test_kubernetes_has_the_ports_and_leaves_the_time_that_the_settings_say():
    found = manifests()
    text = found["ConfigMap"]["data"]["server.toml"]
    settings = ServerSettings(**tomllib.loads(text))
    pod = found["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {"grpc": settings.port, "metrics": settings.metrics_port}
    assert pod["terminationGracePeriodSeconds"] > settings.lame_duck + settings.grace
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == settings.port
    assert container["readinessProbe"]["grpc"]["service"] == SERVICE
    liveness = container["livenessProbe"]
    alive = liveness["periodSeconds"] * liveness["failureThreshold"]
    assert alive >= settings.lame_duck + settings.grace, "a drain must not count as a death"
    assert found["Service"]["spec"]["ports"][0]["port"] == settings.port
    [rule] = found["GRPCRoute"]["spec"]["rules"]
    assert {each["method"]["service"] for each in rule["matches"]} == {SERVICE, KSERVE}
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert found[kind]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels


def test_systemd_waits_for_the_drain():
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str
    unit.read(DEPLOY / "nuwa.service")
    service, settings = unit["Service"], ServerSettings()
    assert service["Type"] == "notify" and " serve --config " in service["ExecStart"]
    assert int(service["TimeoutStopSec"]) > settings.lame_duck + settings.grace
    assert int(service["WatchdogSec"]) > settings.hang_timeout


def test_the_dashboard_asks_for_metrics_that_there_are():
    with Server(FakeEngine()) as server, Client(server.address) as client:
        client.generate_image("t2i", "a 3", samples=2, rank_by="first")
        text = generate_latest(server.metrics.registry).decode()
    there = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line[0] != "#"}
    there |= {f"nuwa_errors{suffix}" for suffix in ("_total",)}  # there was none yet
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    asked = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            asked |= set(re.findall(r"\bnuwa_\w+", target["expr"]))
    assert len(dashboard["panels"]) == 12 and asked <= there, asked - there
    left_out = {name for name in there if name.endswith(("_created", "_info"))}
    phases = {name for name in there - left_out if name.startswith("nuwa_")} - asked
    assert {name.rpartition("_")[2] for name in phases} <= {"bucket", "sum", "count"}
