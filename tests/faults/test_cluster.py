"""Nodes of a cluster that are killed, restarted and paused under workers and publishers; `make test-cluster` runs this.

Each test begins with a whole cluster, goes through its fault while messages are published all the time, and ends with
the same questions: was anything lost, out of order, or run beside another of its key? Does what was reported as not
stored never run? Do all workers work again, and follow the manifest?
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
from amqp.exceptions import AMQPError
from kombu import Connection

from celery_sharding.errors import ShardingError
from celery_sharding.layout.cleanup import delete_group
from celery_sharding.layout.manifest import load
from celery_sharding.monitoring.snapshot import read_snapshot
from celery_sharding.testing import RabbitCluster, RabbitNode, ServerNotReady, WorkerNode
from celery_sharding.testing.processes import wait_until
from support.publishers import SteadyPublisher
from support.shops import Shop

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

# A worker stops starting tasks 1.5 heartbeats after the last sign of its node; the others give the node up later.
HEARTBEAT_SECONDS = 4
NET_TICK_SECONDS = 12
PROCESSES = 2

T = TypeVar("T")


@pytest.fixture(scope="module")
def started() -> Iterator[RabbitCluster]:
    with RabbitCluster(net_tick_seconds=NET_TICK_SECONDS) as cluster:
        yield cluster


@pytest.fixture
def cluster(started: RabbitCluster) -> Iterator[RabbitCluster]:
    """The cluster, whole before and after the test."""
    yield started
    make_whole(started)


@pytest.fixture
def shop(cluster: RabbitCluster, tmp_path: Path) -> Iterator[Shop]:
    with Shop(f"t{uuid.uuid4().hex[:12]}", cluster.url, tmp_path) as shop:
        yield shop
    make_whole(cluster)
    ask_any(cluster, lambda connection: delete_group(connection, shop.group))


def make_whole(cluster: RabbitCluster) -> None:
    for node in cluster.nodes:
        with suppress(ServerNotReady):  # it does not run
            node.resume()
        node.start()


def work_on(shop: Shop, cluster: RabbitCluster, *, first: int) -> WorkerNode:
    """Start a worker whose broker URLs begin with the node of that index."""
    urls = [node.url for node in cluster.nodes[first:] + cluster.nodes[:first]]
    # Of its group alone: an ordinary queue of Celery's is a classic one, and is gone as long as its node is.
    return shop.worker(
        "-c", str(PROCESSES), "-Q", shop.group,
        SHOP_BROKER=";".join(urls), SHOP_HEARTBEAT=str(HEARTBEAT_SECONDS),
    )  # fmt: skip


def expect_order_kept(shop: Shop, publisher: SteadyPublisher, *, repeated_max: int) -> None:
    """Everything confirmed has run, in order; what was reported as not stored has not."""
    assert publisher.unexpected == []
    wait_until(lambda: not shop.verdict().lost, timeout_seconds=60)
    verdict = shop.verdict()
    assert (verdict.lost, verdict.out_of_order, verdict.overlapping) == (0, 0, 0), verdict
    assert verdict.repeated <= repeated_max, verdict
    ran = {(mark.key, mark.number) for mark in shop.trace.read()}
    assert ran & publisher.not_stored == set()
    assert ran <= {*shop.published, *publisher.unknown}


def ask_any(cluster: RabbitCluster, ask: Callable[[Any], T]) -> T:
    """Return the answer of the first node that gives one: one that has just come back may refuse for a while."""
    answers: list[T] = []

    def is_answered() -> bool:
        for node in cluster.nodes:
            with suppress(ShardingError, AMQPError, OSError), Connection(node.url) as connection:
                answers.append(ask(connection))
                return True
        return False

    assert wait_until(is_answered, timeout_seconds=60)
    return answers[0]


def expect_all_at_work(shop: Shop, cluster: RabbitCluster) -> None:
    """Every worker owns its part of the shards, follows the manifest, and new messages and retries run."""
    share = 4 // len(shop.workers)

    def is_spread() -> bool:
        rows = ask_any(cluster, lambda connection: read_snapshot(connection, [shop.group])).groups[0].rows
        return Counter(row.owner for row in rows) == {worker.name: share for worker in shop.workers}

    assert wait_until(is_spread, timeout_seconds=60)
    generation = ask_any(cluster, lambda connection: load(connection, shop.names)).generation
    ask_any(cluster, lambda connection: connection.channel().queue_delete(shop.names.shard(generation, 1)))
    for worker in shop.workers:
        worker.wait_for(f"consuming g{generation + 1:03d}, 4 queues", timeout_seconds=60)
    count = len(shop.published)
    for number in range(20):
        shop.send("step", f"new{number}", number)
    assert shop.send("again", "retried", 1).get(timeout=60) == 2
    assert wait_until(lambda: not shop.verdict().lost, timeout_seconds=60), shop.verdict()
    assert len(shop.published) == count + 21


def leader_of(cluster: RabbitCluster, queue: str) -> RabbitNode:
    found: list[RabbitNode | None] = []
    assert wait_until(lambda: found.append(cluster.leader_of(queue)) or found[-1] is not None, timeout_seconds=30)
    assert found[-1] is not None
    return found[-1]


def test_any_node_may_be_killed_and_come_back(shop: Shop, cluster: RabbitCluster) -> None:
    # Given two workers on different nodes, and a publisher
    work_on(shop, cluster, first=0)
    work_on(shop, cluster, first=1)
    with SteadyPublisher(shop) as publisher:
        assert publisher.goes_on()
        # When one node after the other is killed, and comes back
        for node in cluster.nodes:
            node.kill()
            # Then the work goes on without it
            assert publisher.goes_on()
            node.start()
        assert publisher.goes_on()
    # And nothing is lost or out of order; only what ran may be repeated
    expect_order_kept(shop, publisher, repeated_max=len(cluster.nodes) * len(shop.workers) * PROCESSES)
    expect_all_at_work(shop, cluster)


def test_the_node_that_leads_the_queues_may_be_killed(shop: Shop, cluster: RabbitCluster) -> None:
    # Given two workers on different nodes, and the one that leads all queues and streams
    work_on(shop, cluster, first=2)
    work_on(shop, cluster, first=0)
    names = shop.names
    with SteadyPublisher(shop) as publisher:
        assert publisher.goes_on()
        leader = leader_of(cluster, names.shard(1, 0))
        assert [leader_of(cluster, queue) for queue in (names.manifest, names.journal, names.attempts)] == [leader] * 3
        # When it is killed
        leader.kill()
        # Then the work goes on, under other leaders
        assert publisher.goes_on(100)
        assert leader_of(cluster, names.shard(1, 0)) is not leader
    expect_order_kept(shop, publisher, repeated_max=len(shop.workers) * PROCESSES)
    # And the group is whole without it
    expect_all_at_work(shop, cluster)


def test_a_cluster_that_lost_two_nodes_goes_on_when_they_are_back(shop: Shop, cluster: RabbitCluster) -> None:
    # Given two workers on different nodes, and a publisher
    work_on(shop, cluster, first=0)
    work_on(shop, cluster, first=1)
    with SteadyPublisher(shop) as publisher:
        assert publisher.goes_on()
        # When two of the three nodes are killed
        for node in cluster.nodes[:2]:
            node.kill()
        # Then the publisher is told so
        assert wait_until(lambda: publisher.errors["BrokerUnavailable"] > 3, timeout_seconds=60), publisher.errors
        # When they are back, then the work goes on
        for node in cluster.nodes[:2]:
            node.start()
        assert publisher.goes_on()
    expect_order_kept(shop, publisher, repeated_max=2 * len(shop.workers) * PROCESSES)
    expect_all_at_work(shop, cluster)


def test_all_nodes_may_be_restarted_one_after_the_other(shop: Shop, cluster: RabbitCluster) -> None:
    # Given two workers on different nodes, and a publisher
    work_on(shop, cluster, first=0)
    work_on(shop, cluster, first=1)
    with SteadyPublisher(shop) as publisher:
        assert publisher.goes_on()
        # When each node is restarted
        for node in cluster.nodes:
            node.restart()
        assert publisher.goes_on()
    expect_order_kept(shop, publisher, repeated_max=len(cluster.nodes) * len(shop.workers) * PROCESSES)
    expect_all_at_work(shop, cluster)


def test_a_worker_on_a_node_that_hangs_is_replaced_and_comes_back(shop: Shop, cluster: RabbitCluster) -> None:
    # Given a worker and the publisher on the node that leads all queues, and a worker elsewhere
    cut_off = work_on(shop, cluster, first=0)
    work_on(shop, cluster, first=1)
    hung = cluster.nodes[0]
    with SteadyPublisher(shop) as publisher:
        assert publisher.goes_on()
        assert leader_of(cluster, shop.names.shard(1, 0)) is hung
        began = cut_off.output.count("consuming g001")
        # When the node hangs
        hung.pause()
        # Then the work goes on without it, and its worker takes part in it through another node
        assert publisher.goes_on()
        assert wait_until(lambda: cut_off.output.count("consuming g001") > began, timeout_seconds=60)
        assert "Connection to broker lost" in cut_off.output
        # When it goes on, and finds that it was given up, then nothing changes
        hung.resume()
        assert publisher.goes_on()
    # What the worker there had been delivered, it ran, and could not say so
    expect_order_kept(shop, publisher, repeated_max=100)
    expect_all_at_work(shop, cluster)
