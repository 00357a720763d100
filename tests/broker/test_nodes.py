"""The private nodes that tests and the demo run on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from kombu import Connection

from celery_sharding.testing import RabbitNode, RedisNode
from celery_sharding.testing.processes import exchange_bytes, is_alive

# They share a node, so they run in one process.
pytestmark = pytest.mark.xdist_group("nodes")


@pytest.fixture(scope="module")
def node() -> Iterator[RabbitNode]:
    with RabbitNode() as started:
        yield started


def _declare(node: RabbitNode, queue: str) -> None:
    with Connection(node.url) as connection:
        arguments = {"x-queue-type": "quorum"}
        connection.channel().queue_declare(queue, durable=True, auto_delete=False, arguments=arguments)


def _publish(node: RabbitNode, queue: str) -> None:
    with Connection(node.url, transport_options={"confirm_publish": True}) as connection:
        connection.Producer().publish("kept", routing_key=queue, delivery_mode=2)


def _consume_one(node: RabbitNode, queue: str) -> str:
    # Consumed and not counted: brokers count quorum queues late.
    bodies: list[str] = []
    with Connection(node.url) as connection:
        channel = connection.channel()
        channel.basic_consume(queue, callback=lambda message: bodies.append(message.body))
        connection.drain_events(timeout=20)
    return bodies[0]


def test_a_killed_node_comes_back_with_what_was_confirmed(node: RabbitNode):
    # Given a confirmed message in a queue that outlived a stop (3.10 syncs the declaration of a queue minutes later)
    _declare(node, "killed")
    node.restart()
    _publish(node, "killed")
    # When the node is killed and started
    node.kill()
    assert not node.answers()
    node.start()
    # Then the message is still there, on the same address
    assert _consume_one(node, "killed") == "kept"


def test_another_process_can_restart_a_node(node: RabbitNode):
    _declare(node, "restarted")
    _publish(node, "restarted")
    # When another process restarts the node by its folder
    subprocess.run([sys.executable, "-m", "celery_sharding.testing", "restart", str(node.folder)], check=True)
    # Then it answers where it did, and the one who made it can still end it
    assert _consume_one(node, "restarted") == "kept"
    assert node.ctl("-q", "list_queues", "name").split()


def test_a_removed_node_leaves_no_process_and_no_file():
    # Given a node of its own beside the other
    with RabbitNode() as node:
        pids = [int(path.read_text()) for path in node.folder.glob("*.pid")]
        assert len(pids) >= 2
    # Then broker and port mapper are gone, and so is the folder
    assert [pid for pid in pids if is_alive(pid)] == []
    assert not node.folder.exists()


@pytest.mark.parametrize(("keeps_data", "left"), [(True, b"$4\r\nkept\r\n"), (False, b"$-1\r\n")])
def test_a_redis_that_keeps_data_has_after_a_restart_what_it_was_told(keeps_data: bool, left: bytes):
    with RedisNode(keeps_data=keeps_data) as redis:
        assert _ask(redis, b"SET it kept\r\n") == b"+OK\r\n"
        # When it is stopped, or killed, and started again
        for end in (redis.stop, redis.kill):
            end()
            assert not redis.answers()
            redis.start()
            # Then it knows that still, on the same address, if it was to
            assert _ask(redis, b"GET it\r\n") == left


def test_a_paused_redis_answers_when_it_may_go_on():
    with RedisNode() as redis:
        redis.pause()
        assert _ask(redis, b"PING\r\n", timeout_seconds=0.3) == b""
        redis.resume()
        assert _ask(redis, b"PING\r\n") == b"+PONG\r\n"


def _ask(redis: RedisNode, command: bytes, *, timeout_seconds: float = 20.0) -> bytes:
    port = urlsplit(redis.url).port
    assert port is not None
    return exchange_bytes(port, command, timeout_seconds=timeout_seconds)
