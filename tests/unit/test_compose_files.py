"""docker-compose.yml and what it mounts, as files; `make test-compose` runs them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.paths import ROOT

COMPOSE = ROOT / "deploy" / "compose"
FILES = {"docker-compose.yml": ROOT / "docker-compose.yml", "cluster.yml": COMPOSE / "cluster.yml"}


def read_services() -> dict[str, dict[str, Any]]:
    """Return all services, those of the cluster as they are on top of the others."""
    found: dict[str, dict[str, Any]] = {}
    for path in FILES.values():
        for name, service in yaml.safe_load(path.read_text())["services"].items():
            before = found.setdefault(name, {})
            volumes = [*before.get("volumes", ()), *service.get("volumes", ())]
            environment = before.get("environment", {}) | service.get("environment", {})
            before.update(service | {"volumes": volumes, "environment": environment})
    return found


SERVICES = read_services()


@pytest.fixture(params=sorted(SERVICES))
def service(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SERVICES[request.param]


def test_no_service_has_more_rights_than_it_needs(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert str(service["user"]).partition(":")[0] not in ("", "0", "root")
    assert not {"privileged", "cap_add", "network_mode", "pid", "env_file"} & set(service)
    assert all(":ro" in volume for volume in service["volumes"] if volume.startswith("."))


def test_every_service_says_when_it_is_healthy_and_is_given_time_to_end(service: dict[str, Any]) -> None:
    if service.get("profiles") == ["tools"]:
        return  # it runs one command and ends
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert re.fullmatch(r"\d+[sm]", service["stop_grace_period"])
    assert service["init"] is True
    if service["image"].startswith("rabbitmq:"):
        assert "check_port_connectivity" in service["healthcheck"]["test"]


def test_nothing_is_published_beyond_this_machine(service: dict[str, Any]) -> None:
    for port in service.get("ports", ()):
        assert re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z]+_PORT:-\d+\}:\d+", port)


def test_images_have_a_version_and_no_registry(service: dict[str, Any]) -> None:
    name, _, tag = service["image"].partition(":")
    assert "build" in service or re.match(r"v?\d+\.\d+", tag), service["image"]
    assert re.fullmatch(r"[a-z-]+(/[a-z-]+)?", name)


def test_no_password_stands_in_a_file(service: dict[str, Any]) -> None:
    for name, value in service["environment"].items():
        if re.search("PASS|AUTH|COOKIE", name):
            assert re.fullmatch(r"(admin:)?\$\{[A-Z_]+(:\?[^}]+)?\}", value), name
        for password in re.findall(r"//\w*:([^@]*)@", value):
            assert re.fullmatch(r"\$\{[A-Z_]+(:\?[^}]+)?\}", password), name


def test_what_is_mounted_is_there(service: dict[str, Any]) -> None:
    for volume in service["volumes"]:
        source = volume.partition(":")[0]
        assert not source.startswith(".") or (ROOT / source).exists(), source


def test_make_env_makes_every_password_that_is_asked_for(tmp_path: Path) -> None:
    # When passwords are made twice
    first, second = (make_env(tmp_path / name) for name in ("first", "second"))
    # Then they are those that the files ask for, and nobody could guess them
    asked = {name for path in FILES.values() for name in re.findall(r"\$\{([A-Z_]+):\?", path.read_text())}
    assert set(first) == set(second) == asked
    assert len({*first.values(), *second.values()}) == 2 * len(asked)
    assert all(re.fullmatch(r"[0-9a-f]{48}", password) for password in first.values())
    assert (tmp_path / "first").stat().st_mode & 0o077 == 0


def test_make_env_overwrites_nothing(tmp_path: Path) -> None:
    passwords = make_env(tmp_path / "env")
    with pytest.raises(subprocess.CalledProcessError):
        make_env(tmp_path / "env")
    assert read_env(tmp_path / "env") == passwords


def test_prometheus_scrapes_the_exporter_and_knows_the_alerts() -> None:
    config = yaml.safe_load((COMPOSE / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert f'job="{job["job_name"]}"' in (ROOT / "deploy" / "monitoring" / "alerts.yml").read_text()
    (target,) = job["static_configs"][0]["targets"]
    name, _, port = target.partition(":")
    assert SERVICES[name]["command"].endswith(f"--host 0.0.0.0 --port {port}")
    mounts = mounts_of("prometheus")
    assert mounts["/etc/prometheus/prometheus.yml"] == COMPOSE / "prometheus.yml"
    for file in config["rule_files"]:
        assert f"/etc/prometheus/{file}" in mounts


def test_grafana_is_given_its_data_source_and_the_dashboard() -> None:
    # Given what is mounted where Grafana looks for it
    mounts = mounts_of("grafana")
    provisioning = mounts["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "shards.yml").read_text())["providers"]
    # Then the data source is Prometheus, and the dashboards' folder holds ours
    assert (source["type"], source["url"], source["isDefault"]) == ("prometheus", "http://prometheus:9090", True)
    assert provider["type"] == "file"
    folder = provider["options"]["path"]
    dashboards = [path for mount, path in mounts.items() if mount.startswith(f"{folder}/")]
    assert dashboards == [ROOT / "deploy" / "monitoring" / "grafana-dashboard.json"]


def test_the_nodes_of_the_cluster_are_those_that_it_is_made_of() -> None:
    named = re.findall(r"nodes\.\d = rabbit@(\S+)", (COMPOSE / "cluster.conf").read_text())
    nodes = {name: service for name, service in SERVICES.items() if service["image"].startswith("rabbitmq:")}
    assert sorted(named) == sorted(nodes)
    for name, node in nodes.items():
        assert node["hostname"] == name
        assert "RABBITMQ_ERLANG_COOKIE" in node["environment"]
        assert set(mounts_of(name)) >= {"/etc/rabbitmq/conf.d/50-cluster.conf", "/etc/rabbitmq/enabled_plugins"}
    for name in ("worker", "flower", "exporter", "shop"):
        assert re.findall(r"@([\w-]+)//", SERVICES[name]["environment"]["BROKER_URL"]) == named
    assert "rabbitmq_consistent_hash_exchange" in (COMPOSE / "enabled_plugins").read_text()


def make_env(path: Path) -> dict[str, str]:
    subprocess.run([COMPOSE / "make-env", path], check=True, capture_output=True)
    return read_env(path)


def read_env(path: Path) -> dict[str, str]:
    return dict(line.split("=") for line in path.read_text().splitlines())


def mounts_of(service: str) -> dict[str, Path]:
    """Return what is mounted from here: the path in the container → the path here."""
    mounts = [volume.split(":") for volume in SERVICES[service]["volumes"] if volume.startswith(".")]
    return {inside: ROOT / outside for outside, inside, _ in mounts}
