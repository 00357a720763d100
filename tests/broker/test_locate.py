"""Where keys are, as `locate` says it, and where their messages really are."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time

import amqp
import pytest
from celery import Celery
from kombu import Connection

from celery_sharding import ShardGroup, Sharding
from celery_sharding.layout.ensure import ensure_fixed, ensure_group
from celery_sharding.layout.lock import GroupLock
from celery_sharding.layout.manifest import load
from celery_sharding.layout.switch import begin_reshard, carry_on
from celery_sharding.operations.locate import locate_keys
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.streams import append
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names
from support.commands import call_shards

KEYS = [f"key-{number}" for number in range(300)] + ["", "ä", "x" * 255]

LOCATE_LONG = """
import sys
from kombu import Connection
from celery_sharding.operations.locate import locate_keys
from celery_sharding.layout.model import Layout, Segment
from celery_sharding.topology import Names

layout = Layout(segments=(Segment("ring", 1, 999),), generation=1, shards=999, limbo=1)
with Connection(sys.argv[1]) as connection:
    connection.connect()
    while True:
        locate_keys(connection, Names("long"), layout, ["a"])
"""


def test_keys_are_located_where_their_messages_go_before_during_and_after_the_flip_of_a_reshard(virtual_host):
    url, group, names = virtual_host.url(), ShardGroup("orders", 5), Names("orders")
    told: dict[str, dict[str, str]] = {}

    def locate_and_publish(phase: str) -> tuple[set[int | None], set[tuple[int, ...]]]:
        """Ask, publish each key at once, and note to which queue it was told to go."""
        with Connection(url) as connection:
            connection.connect()
            located = locate_keys(connection, names, load(connection, names), KEYS)
            with brief_channel(connection) as channel:
                for each in located:
                    message = amqp.Message(phase.encode(), application_headers={"phase": phase})
                    channel.basic_publish_confirm(message, exchange=names.publish, routing_key=each.key)
        told[phase] = {
            each.key: each.waits_in or next(p.queue for p in each.places if p.generation == each.takes)
            for each in located
        }
        return {each.takes for each in located}, {tuple(p.generation for p in each.places) for each in located}

    # Given a group of 5, which is made one of 7
    ensure_group(lambda: Connection(url), group, owner="test")
    assert locate_and_publish("before") == ({1}, {(1,)})
    with GroupLock(lambda: Connection(url), names, timeout_seconds=5) as lock:
        with lock.operation() as connection:
            layout = begin_reshard(connection, group, load(connection, names), shards=7, by="test")
            layout = carry_on(connection, group, layout, by="test", last_step=2)
        assert locate_and_publish("led") == ({1}, {(1, 2)})
        with lock.operation() as connection:
            layout = carry_on(connection, group, layout, by="test", last_step=3)
        assert locate_and_publish("flipped") == ({2}, {(1, 2)})
        with lock.operation() as connection:
            carry_on(connection, group, layout, by="test")
        assert locate_and_publish("after") == ({2}, {(1, 2)})
        # When the ring is lost
        with lock.channel() as channel:
            channel.exchange_delete(names.ring(2))
        assert locate_and_publish("lost") == ({None}, {(1, 2)})
    # Then every message is where its key was located, and keys are on many shards
    assert (
        read_queues(url, [name for name in virtual_host.names("queues") if ".g0" in name or ".limbo" in name]) == told
    )
    assert [len(set(told[phase].values())) for phase in told] == [5, 5, 7, 7, 1]
    # And nothing is left of the rings that were asked
    assert not [name for kind in ("exchanges", "queues") for name in virtual_host.names(kind) if "locate" in name]


def test_nothing_is_left_of_a_locate_that_is_killed(virtual_host):
    def traces() -> list[str]:
        return [name for kind in ("exchanges", "queues") for name in virtual_host.names(kind) if "locate" in name]

    process = subprocess.Popen([sys.executable, "-c", LOCATE_LONG, virtual_host.url()])
    try:
        assert wait_until(lambda: len(traces()) > 3, timeout_seconds=30)
    finally:
        process.kill()
        process.wait()
    assert wait_until(lambda: not traces(), timeout_seconds=30), traces()


def read_queues(url: str, queues: list[str]) -> dict[str, dict[str, str]]:
    """Return phase → key → the queue that its message was in."""
    found: dict[str, dict[str, str]] = {}
    with Connection(url) as connection:
        channel = connection.channel()
        for queue in queues:

            def take(message, queue=queue):
                if "phase" in (message.headers or {}):
                    found.setdefault(message.headers["phase"], {})[message.delivery_info["routing_key"]] = queue

            channel.basic_consume(queue, callback=take, no_ack=True)
        with contextlib.suppress(socket.timeout):
            while True:
                connection.drain_events(timeout=1)
    return found


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("ordres", "42"), 2, "did you mean 'orders'"),
        (("orders", ""), 2, "the shard key is empty"),
        (("orders", "x" * 256), 2, "at most 255"),
        (("orders",), 2, "Missing argument"),
        (("orders", "42"), 1, "not declared"),
    ],
)
def test_what_cannot_be_located_is_said_in_one_line(virtual_host, arguments, code, text):
    app = Celery("locate", broker=virtual_host.url(), set_as_current=False)
    Sharding(app, groups=[ShardGroup("orders", 2)])

    done = call_shards(app, "locate", *arguments)

    assert (done.exit_code, done.stdout) == (code, "")
    assert text in done.stderr.splitlines()[-1]


def test_a_key_is_shown_with_its_owner_and_a_limbo_that_waits_for_a_worker_is_named(virtual_host):
    app = Celery("locate", broker=virtual_host.url(), set_as_current=False)
    Sharding(app, groups=[ShardGroup("orders", 2)])
    ensure_fixed(app.sharding.connect, ShardGroup("orders", 2), owner="test")
    assert "shards.orders.limbo001 until a worker starts" in call_shards(app, "locate", "orders", "42").stderr
    ensure_group(app.sharding.connect, ShardGroup("orders", 2), owner="test")
    # When its shard has an owner
    with Connection(virtual_host.url()) as connection:
        (located,) = locate_keys(connection, Names("orders"), load(connection, Names("orders")), ["42"])
        facts = {"index": 0, "since": 0.0, "held": 0, "running": 0, "lag_seconds": None, "counters": {}}
        owned = {located.places[0].queue: facts}
        with brief_channel(connection) as channel:
            append(
                channel,
                Names("orders").journal,
                {"event": "vitals", "at": time.time(), "by": "w@h", "generation": 1, "owned": owned, "standby": []},
            )
    # Then
    as_json = json.loads(call_shards(app, "locate", "orders", "42", "--json").stdout)
    (place,) = as_json["keys"][0]["places"]
    assert (place["queue"], place["takes_new"], place["owner"]) == (located.places[0].queue, True, "w@h")
    assert "w@h" in call_shards(app, "locate", "orders", "42").stdout
