"""The files for Kubernetes: valid, complete, locked in, and about the app and the metrics that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from celery_sharding.metrics import table
from support.deployed import KUBERNETES, Object, container_of, find_object, read_app, read_objects

FILES = sorted(path for path in KUBERNETES.glob("*/*.yaml") if path.name != "kustomization.yaml")
CORE = ("v1", "apps/v1", "policy/v1")
WORKLOADS = ("StatefulSet", "Deployment")
SHARDS = 8


def objects() -> Iterator[Object]:
    for path in FILES:
        yield from read_objects(path)


def workloads() -> list[Object]:
    return [each for each in objects() if each["kind"] in WORKLOADS]


def labels_of(workload: Object) -> dict[str, str]:
    return workload["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize("version", ["1.28", kubernetes_validate.latest_version()])
def test_the_objects_of_kubernetes_are_valid(version: str) -> None:
    checked = [each["kind"] for each in objects() if each["apiVersion"] in CORE]
    for each in objects():
        if each["apiVersion"] in CORE:
            kubernetes_validate.validate(each, version, strict=True)
    assert sorted(checked) == ["Deployment"] * 2 + ["PodDisruptionBudget"] + ["Service"] * 3 + ["StatefulSet"]


@pytest.mark.parametrize("folder", ["base", "keda", "rabbitmq"])
def test_each_kustomization_names_every_file_beside_it(folder: str) -> None:
    kustomization = yaml.safe_load((KUBERNETES / folder / "kustomization.yaml").read_text())
    files = {path.name for path in (KUBERNETES / folder).glob("*.yaml")} - {"kustomization.yaml"}
    assert {name for name in kustomization["resources"] if name != "../base"} == files
    for patch in kustomization.get("patches", ()):
        find_object(patch["target"]["kind"], patch["target"]["name"])
        [change] = yaml.safe_load(patch["patch"])
        assert change == {"op": "remove", "path": "/spec/replicas"}
    for image in kustomization.get("images", ()):
        assert {container_of(each)["image"] for each in workloads()} == {image["name"]}


def test_every_selector_finds_the_pods_of_one_workload() -> None:
    for each in objects():
        if each["kind"] in (*WORKLOADS, "PodDisruptionBudget"):
            selector = each["spec"]["selector"]["matchLabels"]
        elif each["kind"] == "Service":
            selector = each["spec"]["selector"]
        else:
            continue
        found = [workload for workload in workloads() if selector.items() <= labels_of(workload).items()]
        assert [workload["metadata"]["name"] for workload in found] == [each["metadata"]["name"]]
        for port in each["spec"].get("ports", ()):
            offered = {offer["name"]: offer["containerPort"] for offer in container_of(found[0])["ports"]}
            assert offered == {port["targetPort"]: port["port"]}
    spread = find_object("StatefulSet", "shop-workers")["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert [each["labelSelector"]["matchLabels"] for each in spread] == [
        labels_of(find_object("StatefulSet", "shop-workers"))
    ]


@pytest.mark.parametrize("workload", workloads(), ids=lambda each: each["metadata"]["name"])
def test_containers_are_locked_in_and_hold_no_password(workload: Object) -> None:
    pod, container = workload["spec"]["template"]["spec"], container_of(workload)
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod["automountServiceAccountToken"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    # What must be written has a place
    assert container["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
    assert pod["volumes"] == [{"name": "tmp", "emptyDir": {}}]
    # Passwords come from secrets, and from nowhere else
    assert {"secretRef": {"name": "shop-env"}} in container["envFrom"]
    assert [(each["name"], each["value"]) for each in container.get("env", ())] in (
        [],
        [("HEARTBEAT_FILE", "/tmp/heartbeat")],
    )


def test_workers_are_probed_by_their_file_and_given_the_time_of_their_longest_task() -> None:
    workers = find_object("StatefulSet", "shop-workers")
    container = container_of(workers)
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert list(container[name]["exec"]) == ["command"]
        assert "/tmp/heartbeat" in container[name]["exec"]["command"][-1]
        assert "celery" not in container[name]["exec"]["command"][-1]
    assert "consuming" in container["readinessProbe"]["exec"]["command"][-1]
    longest_seconds = max(map(int, re.findall(r"time_limit=(\d+)", read_app())))
    assert workers["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > longest_seconds
    assert workers["spec"]["replicas"] >= 2
    assert find_object("PodDisruptionBudget", "shop-workers")["spec"]["maxUnavailable"] == 1


def test_workers_are_scaled_by_a_metric_that_exists_up_to_the_number_of_shards() -> None:
    spec = find_object("ScaledObject", "shop-workers")["spec"]
    target = spec["scaleTargetRef"]
    find_object(target["kind"], target["name"])
    assert target["apiVersion"] == "apps/v1"
    [trigger] = spec["triggers"]
    assert (trigger["type"], trigger["metricType"]) == ("prometheus", "AverageValue")
    assert set(trigger["metadata"]) == {"serverAddress", "query", "threshold", "ignoreNullValues"}
    assert all(isinstance(value, str) for value in trigger["metadata"].values())
    query = trigger["metadata"]["query"]
    assert set(re.findall(r"celery_sharding_\w+", query)) <= set(table.NAMES)
    [group] = re.findall(r'group="([a-z]+)"', query)
    assert f'ShardGroup("{group}", shards={SHARDS})' in read_app()
    assert 2 <= spec["minReplicaCount"] <= spec["fallback"]["replicas"] <= spec["maxReplicaCount"] == SHARDS


def test_the_group_that_the_operator_declares_is_that_of_the_app(tmp_path: Path) -> None:
    # Given the app of the how-to
    (tmp_path / "shop.py").write_text(read_app())
    # When it is exported as the how-to says
    command = [
        *(sys.executable, "-m", "celery", "-A", "shop", "shards", "export"),
        *("--format", "operator", "--cluster", "rabbitmq", "--user", "worker=shop-worker"),
    ]
    done = subprocess.run(command, cwd=tmp_path, check=True, text=True, stdout=subprocess.PIPE)
    # Then that is the file, for a cluster with the plugin that it needs
    assert (KUBERNETES / "rabbitmq" / "groups.yaml").read_text() == done.stdout
    cluster = find_object("RabbitmqCluster", "rabbitmq")
    assert cluster["spec"]["rabbitmq"]["additionalPlugins"] == ["rabbitmq_consistent_hash_exchange"]
    references = {
        each["spec"].get("rabbitmqClusterReference", {}).get("name") for each in yaml.safe_load_all(done.stdout)
    }
    assert references == {"rabbitmq"}
