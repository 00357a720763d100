"""A broker of several nodes of which some are down or hang, as its clients see it: proxies stand in for the nodes."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from celery import Celery
from kombu import Connection

from celery_sharding import ShardGroup, Sharding
from celery_sharding.errors import OutcomeUnknown
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.layout.manifest import load
from celery_sharding.rabbitmq.connect import close_connection, open_connection
from celery_sharding.testing import Direction, FaultProxy
from celery_sharding.testing.processes import find_free_port
from celery_sharding.topology import Names
from celery_sharding.worker.log_writer import LogWriter

# What an AMQP client sends until it may open channels is less.
HANDSHAKE_BYTES = 1_500


@pytest.fixture
def proxy(broker_url: str) -> Iterator[FaultProxy]:
    with FaultProxy(broker_url) as proxy:
        yield proxy


@pytest.fixture
def dead_url() -> str:
    """Of a node that is down."""
    return f"amqp://guest:guest@127.0.0.1:{find_free_port()}//"


def test_the_last_of_many_nodes_is_reached_when_all_others_are_down(
    group_name: str, broker_url: str, dead_url: str
) -> None:
    # Given a broker with three nodes, two of them down
    url = f"{dead_url};{dead_url};{broker_url}"
    # When a worker makes a group ready, and writes to its logs
    layout = ensure_group(lambda: Connection(url), ShardGroup(group_name, 2), owner="w1")
    written = threading.Event()
    log = LogWriter(SimpleNamespace(connect=lambda: Connection(url)), SimpleNamespace(post=lambda call: call()))
    log.append(Names(group_name).journal, {"event": "test"}, written.set)
    # Then it is done through the third
    assert written.wait(20)
    log.stop()
    with Connection(broker_url) as connection:
        assert load(connection, Names(group_name)) == layout


def test_a_wait_for_an_answer_of_a_node_that_hangs_has_an_end(proxy: FaultProxy) -> None:
    # Given an open connection to a node that hangs
    connection = open_connection(Connection(proxy.url), answer_seconds=0.5)
    proxy.stall()
    # When it is asked for something, then the wait ends with an error
    with pytest.raises(TimeoutError):
        connection.channel()
    # And so does the farewell
    close_connection(connection)


def test_a_group_is_made_ready_through_another_node_when_one_is_lost_on_the_way(
    group_name: str, broker_url: str, proxy: FaultProxy
) -> None:
    # Given a broker with two nodes, the first of which goes down in the middle of what it is asked
    url = f"{proxy.url};{broker_url}"

    def go_down() -> None:
        if proxy.wait_for(Direction.TO_SERVER, passed=3 * HANDSHAKE_BYTES, timeout_seconds=60):
            proxy.refuse()

    killer = threading.Thread(target=go_down)
    killer.start()
    # When a worker makes a group ready
    layout = ensure_group(lambda: Connection(url), ShardGroup(group_name, 4), owner="w1")
    killer.join()
    # Then it carries on through the other
    assert proxy.open_connections == 0
    assert (layout.generation, layout.switch, layout.unended) == (1, None, ())


def test_a_publisher_leaves_a_node_that_hangs_and_does_not_come_back_to_it_first(
    group_name: str, broker_url: str, proxy: FaultProxy
) -> None:
    # Given a publisher on the first of two nodes, which hangs
    app = Celery(group_name, broker=f"{proxy.url};{broker_url}", set_as_current=False)
    app.conf.sharding_publish_timeout_seconds = 2.0
    app.conf.sharding_routes = {"step": {"group": group_name, "key": "key"}}
    Sharding(app, groups=[ShardGroup(group_name, shards=2)])
    app.send_task("step", kwargs={"key": "a"})
    proxy.stall()
    # When it publishes, then the outcome of what was on its way is unknown
    with pytest.raises(OutcomeUnknown):
        app.send_task("step", kwargs={"key": "a"}, task_id=uuid.uuid4().hex)
    # And what follows goes to the other node, though there is no time to ask the first one in vain
    for number in range(3):
        app.send_task("step", kwargs={"key": f"b{number}"}, confirm_timeout=1.0)
