"""Files for deployment agree with the server's settings and with each other."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from prometheus_client import generate_latest

from nuwa.inference import grpc_service_pb2
from nuwa.runtime import server as server_module
from nuwa.runtime.answers import KEPT_BYTES
from nuwa.runtime.auth import scope_of
from nuwa.runtime.client import Client
from nuwa.runtime.server import MODELS, SERVICE, Server
from nuwa.runtime.settings import ServerSettings, ignored, read
from nuwa.v1 import generation_pb2

from ..runtime.fake_engine import FakeEngine

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SERVED = tuple(
    module.DESCRIPTOR for module in (generation_pb2, grpc_service_pb2, health_pb2, reflection_pb2)
)
PROCESS_BYTES = 512 * 2**20  # of a server with a model and no calls; 0.3 to 0.5 GiB were measured


def by_kind(text: str) -> dict[str, dict]:
    yaml = pytest.importorskip("yaml")
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


def manifests() -> dict[str, dict]:
    return by_kind((DEPLOY / "kubernetes" / "nuwa.yaml").read_text())


def cluster_settings() -> ServerSettings:
    """Of the ConfigMap."""
    return ServerSettings(**tomllib.loads(manifests()["ConfigMap"]["data"]["server.toml"]))


def pod_spec() -> dict:
    return manifests()["Deployment"]["spec"]["template"]["spec"]


def patches() -> dict[str, dict]:
    """What kustomization.yaml changes in the manifests, by kind."""
    yaml = pytest.importorskip("yaml")
    overlay = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())
    assert overlay["resources"] == ["nuwa.yaml"]
    found = [yaml.safe_load(each["patch"]) for each in overlay["patches"]]
    return {each["kind"]: each for each in found}


def test_the_containers_settings_are_settings():
    found = read({}, DEPLOY / "container.toml", {})
    assert found.bundle == Path("/bundle") and found.metrics_port == 9400
    containerfile = (DEPLOY / "Containerfile").read_text()
    assert f"EXPOSE {found.port} {found.metrics_port}" in containerfile
    assert "COPY deploy/container.toml /etc/nuwa/server.toml" in containerfile
    assert '"--config", "/etc/nuwa/server.toml"' in containerfile
    assert f"--publish 127.0.0.1:{found.port}:{found.port} " in containerfile
    text = (DEPLOY / "container.toml").read_text()
    told = dict(re.findall(r"--env (NUWA_\w+)=(\S+)", text))
    secured = read({}, DEPLOY / "container.toml", told)
    assert secured.tls_certificate and secured.tls_key and secured.tokens
    assert ignored(told) == [] and "/livez and /readyz" in text


def test_kubernetes_has_the_ports_and_leaves_the_time_that_the_settings_say():
    found, settings, pod = manifests(), cluster_settings(), pod_spec()
    [container] = pod["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {"grpc": settings.port, "metrics": settings.metrics_port}
    assert pod["terminationGracePeriodSeconds"] > settings.lame_duck + settings.grace
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == settings.port
    assert container["readinessProbe"]["grpc"]["service"] == SERVICE
    readiness = container["readinessProbe"]
    unready = readiness["periodSeconds"] * readiness["failureThreshold"]
    assert readiness["failureThreshold"] > 1, "one late answer must not count"
    assert unready < settings.lame_duck, "no more calls are to come when none are taken"
    liveness = container["livenessProbe"]
    alive = liveness["periodSeconds"] * liveness["failureThreshold"]
    assert alive >= settings.lame_duck + settings.grace, "a drain must not count as a death"
    assert found["Service"]["spec"]["ports"][0]["port"] == settings.port
    assert pod["enableServiceLinks"] is False
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert found[kind]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels


def test_what_kubernetes_is_told_needs_nothing_installed_in_the_cluster():
    yaml = pytest.importorskip("yaml")
    parts = yaml.safe_load_all((DEPLOY / "kubernetes" / "nuwa.yaml").read_text())
    assert {each["apiVersion"] for each in parts} == {"v1", "apps/v1", "policy/v1"}


def test_the_memory_of_a_pod_is_enough_for_all_calls_at_their_largest():
    settings, [container] = cluster_settings(), pod_spec()["containers"]
    calls = server_module._most_calls(settings)
    text = (DEPLOY / "kubernetes" / "nuwa.yaml").read_text()
    assert f"At worst {calls} calls are open" in text
    decoded = 4 * settings.max_media_pixels  # in colour, and a mask
    # Those that wait for their reader, and those that wait to be ranked.
    call = settings.max_message_bytes + decoded + 2 * settings.max_unread_bytes
    streams = settings.max_streams * settings.max_message_bytes  # a request that is being read
    needed = PROCESS_BYTES + KEPT_BYTES + calls * call + streams
    limit = container["resources"]["limits"]["memory"]
    assert limit.endswith("Gi") and needed <= int(limit.removesuffix("Gi")) * 2**30


def test_a_pod_has_as_many_threads_as_it_asks_for_cpus():
    [container] = pod_spec()["containers"]
    [variable] = container["env"]
    assert variable["name"] == "NUWA_THREADS"
    field = variable["valueFrom"]["resourceFieldRef"]
    assert field == {"resource": "requests.cpu", "divisor": "1"}
    cpus = container["resources"]["requests"]["cpu"]
    assert read({}, None, {"NUWA_THREADS": cpus}).threads == int(cpus)


def test_the_route_forwards_all_methods_but_those_that_change_models():
    forwarded: set[str] = set()
    for rule in route()["spec"]["rules"]:
        assert len(rule["matches"]) <= 8
        assert rule["backendRefs"] == [{"name": "nuwa", "port": ServerSettings().port}]
        for each in rule["matches"]:
            assert set(each) == {"method"} and set(each["method"]) <= {"service", "method"}
            service, method = each["method"]["service"], each["method"].get("method")
            methods = descriptor(service).methods_by_name
            forwarded |= {f"/{service}/{name}" for name in ([method] if method else methods)}
    there = {
        f"/{service.full_name}/{name}"
        for file in SERVED
        for service in file.services_by_name.values()
        for name in service.methods_by_name
    }
    assert forwarded == {name for name in there if scope_of(name) in ("infer", None)} | {
        f"/{MODELS}/ListModels"
    }
    assert not any("RepositoryModel" in name for name in forwarded)


def route() -> dict:
    [found] = by_kind((DEPLOY / "kubernetes" / "route.yaml").read_text()).values()
    assert found["kind"] == "GRPCRoute"
    return found


def descriptor(service: str):
    package, _, name = service.rpartition(".")
    [file] = [each for each in SERVED if each.package == package]
    return file.services_by_name[name]


def test_with_tls_kubernetes_probes_over_http_what_the_server_answers(tmp_path):
    base, changed = manifests(), patches()
    assert {each["metadata"]["name"] for each in changed.values()} == {"nuwa"}
    pod = changed["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    file = tmp_path / "server.toml"
    file.write_text(base["ConfigMap"]["data"]["server.toml"])
    assert ignored(variables) == []
    settings = read({}, file, variables)
    assert not settings.insecure and settings.metrics_host == "0.0.0.0"
    mounts = {each["name"]: Path(each["mountPath"]) for each in container["volumeMounts"]}
    assert settings.tls_certificate == mounts["tls"] / "tls.crt"  # as secrets for TLS have it
    assert settings.tls_key == mounts["tls"] / "tls.key"
    assert settings.tokens == mounts["tokens"] / "tokens.toml"
    assert {each["name"] for each in pod["volumes"]} == set(mounts)
    assert not any("subPath" in each for each in container["volumeMounts"])
    original = base["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["fsGroup"] == original["securityContext"]["runAsUser"]
    ports = {each["name"] for each in original["containers"][0]["ports"]}
    probes = {name: container[name] for name in container if name.endswith("Probe")}
    assert {name: each["httpGet"]["path"] for name, each in probes.items()} == {
        "startupProbe": "/livez",
        "readinessProbe": "/readyz",
        "livenessProbe": "/livez",
    }
    for probe in probes.values():
        assert (
            probe["grpc"] is None and probe["httpGet"]["port"] == "metrics" and "metrics" in ports
        )


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_kustomize_takes_the_patches():
    command = ["kubectl", "kustomize", str(DEPLOY / "kubernetes")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    found = by_kind(made.stdout)
    assert set(found) == set(manifests())
    [container] = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert "httpGet" in container[name] and "grpc" not in container[name]
    variables = {each["name"]: each for each in container["env"]}
    assert "valueFrom" in variables["NUWA_THREADS"] and "NUWA_TOKENS" in variables
    assert {each["name"] for each in container["volumeMounts"]} == {
        *("config", "bundle", "scratch", "tls", "tokens")
    }
    [port] = found["Service"]["spec"]["ports"]
    assert port == {"name": "grpc", "port": 50051, "targetPort": "grpc", "appProtocol": "https"}


def test_systemd_hands_over_what_only_root_may_read():
    text = (DEPLOY / "nuwa.service").read_text()
    assert "\nDynamicUser=yes\n" in text
    given = dict(re.findall(r"^#LoadCredential=(\w+):(/etc/nuwa/\S+)$", text, re.MULTILINE))
    named = dict(re.findall(r"^#Environment=(NUWA_\w+)=%d/(\w+)$", text, re.MULTILINE))
    assert set(named.values()) == set(given) == {"tls_certificate", "tls_key", "tokens"}
    for variable, credential in named.items():
        assert variable == f"NUWA_{credential.upper()}"
        assert credential in ServerSettings.model_fields


def test_systemd_waits_for_the_start_and_the_drain():
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str
    unit.read(DEPLOY / "nuwa.service")
    service, settings = unit["Service"], ServerSettings()
    assert service["TimeoutStartSec"] == "infinity"
    assert service["Type"] == "notify" and " serve --config " in service["ExecStart"]
    assert int(service["TimeoutStopSec"]) > settings.lame_duck + settings.grace
    assert int(service["WatchdogSec"]) > settings.hang_timeout


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    text = (DEPLOY / "nuwa.service").read_text()
    text = text.replace("\nExecStart=/opt/nuwa/bin/nuwa ", f"\nExecStart={sys.executable} ")
    for line in re.findall(r"^#((?:LoadCredential|Environment)=.*)$", text, re.MULTILINE):
        text = text.replace(f"#{line}", line)
    copy = tmp_path / "nuwa.service"
    copy.write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    # It loads other units of the machine too, and says what is wrong with those.
    assert "nuwa.service" not in done.stdout + done.stderr, done.stderr
    copy.write_text(text.replace("TimeoutStartSec", "TimeoutStrtSec"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "nuwa.service" in done.stderr and "TimeoutStrtSec" in done.stderr


def test_the_dashboard_asks_for_metrics_that_there_are():
    with Server(FakeEngine()) as server, Client(server.address) as client:
        client.generate_image("t2i", "a 3", samples=2, rank_by="first")
        text = generate_latest(server.metrics.registry).decode()
    there = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line[0] != "#"}
    # Those with labels are not told before there is something to tell: no error, no cancellation.
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    for family in server.metrics.registry.collect():
        there |= {f"{family.name}{suffix}" for suffix in suffixes.get(family.type, ())}
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    asked = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            asked |= set(re.findall(r"\bnuwa_\w+", target["expr"]))
    assert len(dashboard["panels"]) == 12 and asked <= there, asked - there
    left_out = {name for name in there if name.endswith(("_created", "_info"))}
    ours = {name for name in there - left_out if name.startswith("nuwa_")}
    assert {_family(name) for name in ours} == {_family(name) for name in asked}


def _family(name: str) -> str:
    """What a sample of a histogram is of."""
    return re.sub("_(bucket|sum|count)$", "", name)
