"""docker-compose.yml on a real engine: a worker's container is killed, then a node of the broker's cluster."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from celery_sharding.testing.processes import wait_until
from support.browser import Browser
from support.compose.engine import run_docker
from support.compose.stack import CLUSTER, Stack
from support.paths import ROOT

pytestmark = [pytest.mark.compose, pytest.mark.timeout(1_800)]

logger = logging.getLogger(__name__)

SERVICES = ("rabbitmq", "redis", "worker", "flower", "exporter", "prometheus")
EVENTS = 3_000
# More than workers may have begun or counted before the kill.
MANY = 200
ROWS = ".shards-group tbody tr"


@pytest.fixture(scope="module")
def stack(images: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Everything but Grafana, of which there is no stand-in."""
    with Stack(tmp_path_factory.mktemp("compose")) as stack:
        yield stack


@pytest.fixture
def cluster(images: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("cluster"), CLUSTER) as stack:
        yield stack


def bring_up(stack: Stack, *services: str) -> set[str]:
    """Return the names of both workers, when everything is healthy and the shards are spread over them."""
    began = time.monotonic()
    stack.up(*services)
    logger.info("healthy after %.0f s", time.monotonic() - began)
    wait_for(lambda: None not in (owners := stack.owners_by_api()) and len(owners) == 8 and len(set(owners)) == 2)
    return {str(owner) for owner in stack.owners_by_api()}


def wait_for(condition: Callable[[], object], *, timeout_seconds: float = 180.0) -> None:
    assert wait_until(lambda: bool(condition()), timeout_seconds=timeout_seconds)


def expect_all_sent_in_order(stack: Stack, producer: subprocess.Popen[str]) -> None:
    printed = producer.communicate(timeout=600)[0]
    assert producer.returncode == 0, printed
    verdict = stack.run("python", "orders.py", "check")
    assert f"{EVENTS} published, {EVENTS} ended: 0 lost" in verdict
    logger.info("%s", verdict.strip())


def test_a_killed_container_is_taken_over_and_seen_everywhere(stack: Stack) -> None:
    # Given two workers that are busy
    workers = bring_up(stack, *SERVICES)
    producer = stack.start_sending(EVENTS)
    wait_for(lambda: stack.count_done() > 50)

    # When the container of the owner of a shard is killed
    owner = stack.owners_by_command()[3]
    (survivor,) = workers - {owner}
    assert owner is not None
    done = stack.count_done()
    killed_at = time.monotonic()
    run_docker("kill", owner.partition("@")[2])
    assert producer.poll() is None

    # Then the other worker owns all shards, on the page, on the command line, and in the metrics
    for place, look in (
        ("API", stack.owners_by_api),
        ("command line", stack.owners_by_command),
        ("monitoring", stack.owners_by_prometheus),
    ):
        wait_for(lambda look=look: look() == [survivor] * 8)
        logger.info("taken over after %.1f s, says the %s", time.monotonic() - killed_at, place)
    with Browser() as page:
        page.open(f"{stack.flower_url_with_login}/shards")
        page.wait_for(lambda page: len(rows := page.texts(ROWS)) == 8 and all(survivor in row for row in rows))
        assert not [row for row in page.texts(ROWS) if owner in row]
    # And tasks go on, of which none was lost or overtaken
    wait_for(lambda: stack.count_done() > done + MANY)
    expect_all_sent_in_order(stack, producer)


def test_a_worker_that_is_stopped_ends_by_itself(stack: Stack) -> None:
    workers = bring_up(stack, *SERVICES)

    stack.compose("stop", "worker")

    codes = stack.exit_codes("worker")
    assert {worker.partition("@")[2] for worker in workers} <= set(codes)
    assert set(codes.values()) == {0}, codes  # killed ones end with 137


def test_nothing_in_a_container_may_become_root_or_change_its_image(stack: Stack) -> None:
    stack.up(*SERVICES)
    for service in SERVICES:
        found = stack.exec(service, "sh", "-c", "id -u; grep ^CapEff: /proc/1/status; touch /new 2>&1 || true")
        user, capabilities, refusal = found.strip().splitlines()
        assert int(user) != 0, service
        assert int(capabilities.split()[1], 16) == 0, service
        assert "Read-only file system" in refusal, service


def test_flower_asks_for_a_password(stack: Stack) -> None:
    stack.up("flower")
    with pytest.raises(HTTPError) as refused:
        urlopen(f"{stack.flower_url}/api/shards", timeout=30)
    assert refused.value.code == 401


def test_without_passwords_it_says_how_to_make_them(images: None) -> None:
    command = ["docker", "compose", "--env-file", os.devnull, "config", "--quiet"]
    env = {name: value for name, value in os.environ.items() if not name.endswith("_PASSWORD")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "run deploy/compose/make-env" in done.stderr


def test_a_killed_node_of_the_brokers_cluster_costs_neither_order_nor_events(cluster: Stack) -> None:
    # Given three nodes of RabbitMQ, and all of them hold each shard
    bring_up(cluster)
    table = cluster.exec(
        "rabbitmq-2", "rabbitmqctl", "-q", "list_queues", "--no-table-headers", "name", "leader", "members"
    )
    queues = {name: (leader, members) for name, leader, members in (line.split("\t") for line in table.splitlines())}
    shards = {name: facts for name, facts in queues.items() if name.startswith("shards.orders.g001.")}
    assert len(shards) == 8
    assert all(members.count("rabbit@") == 3 for _, members in shards.values()), shards
    producer = cluster.start_sending(EVENTS)
    wait_for(lambda: cluster.count_done() > 50)

    # When the node that leads a shard is killed in the middle
    leader = shards["shards.orders.g001.003"][0].partition("@")[2]
    container = cluster.compose("ps", "--quiet", leader).strip()
    done = cluster.count_done()
    killed_at = time.monotonic()
    run_docker("kill", container)
    assert producer.poll() is None

    # Then tasks go on, of which none was lost or overtaken
    wait_for(lambda: cluster.count_done() > done + MANY)
    logger.info("%d more tasks done %.1f s after a node was killed", MANY, time.monotonic() - killed_at)
    expect_all_sent_in_order(cluster, producer)
    # And the node comes back
    cluster.up()
    nodes = cluster.exec(leader, "rabbitmqctl", "-q", "cluster_status", "--formatter", "json")
    assert all(f"rabbit@rabbitmq{number}" in nodes for number in ("", "-2", "-3"))
