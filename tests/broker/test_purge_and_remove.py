"""A group is emptied, or removed as a whole, and nothing that somebody counts on goes with it."""

from __future__ import annotations

import threading
import time

import amqp
import pytest
from kombu import Connection

from celery_sharding import ShardGroup, topology
from celery_sharding.errors import GroupInUse, TopologyError
from celery_sharding.layout.contents import existing_queues, group_exists, waiting_tasks
from celery_sharding.layout.ensure import ensure_group, find_fault
from celery_sharding.layout.manifest import load
from celery_sharding.operations.purge import count_purgeable, purge
from celery_sharding.operations.remove_group import remove_group
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.queues import count_ready
from celery_sharding.rabbitmq.streams import append, publish_confirmed, read_to_end
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names
from support.commands import run_shards
from support.shops import Shop

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def group(connect, group_name) -> ShardGroup:
    """A declared group that nobody consumes; its first limbo holds an end marker only."""
    made = ShardGroup(group_name, 4)
    ensure_group(connect, made, owner="test")
    return made


def put(connection: Connection, queue: str) -> None:
    with brief_channel(connection) as channel:
        publish_confirmed(channel, amqp.Message(b"{}", delivery_mode=2), queue, timeout_seconds=10)


# --- purge -----------------------------------------------------------------------------------------------------------


def test_a_purge_takes_what_waits_and_leaves_the_markers_by_which_the_group_goes_on(shop: Shop, connect, connection):
    # Given what came before the first declaration, and after it
    for number in range(3):
        shop.app.send_task("shop.step", kwargs={"key": "k", "number": number})
    ensure_group(connect, ShardGroup(shop.group, 4), owner="test")
    for number in range(3, 10):
        shop.app.send_task("shop.step", kwargs={"key": f"k{number}", "number": number})
    assert wait_until(lambda: sum(count_purgeable(connect, shop.group, None).values()) >= 10, timeout_seconds=30)
    # When all of it is thrown away
    done = run_shards("shop", "purge", shop.group, env=shop.env, answer="y")
    # Then it says how much from where, and so does the history
    assert done.returncode == 0, done.stderr
    assert f"{shop.group}: 3 messages of limbo001 thrown away" in done.stdout
    counts = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert sum(counts) == 10
    begun, note = [e for _, e in read_to_end(connection, shop.names.manifest) if e["event"] == "operated"]
    assert (begun["result"], note["result"]) == ("begun", "10 messages thrown away")
    assert note["counts"][shop.names.limbo(1)] == 3
    # and a worker passes the first segment and runs what is published then, and nothing else
    shop.worker()
    shop.send("step", "k", 100)
    assert wait_until(lambda: shop.trace.count("end") == 1, timeout_seconds=40)
    assert shop.verdict().is_clean
    assert load(connection, shop.names).segments[0].is_drained


def test_a_purge_of_one_shard_leaves_what_a_worker_holds_and_the_other_shards(connect, connection, group, names):
    # Given two shards with messages, one of which a worker holds
    for _ in range(3):
        put(connection, names.shard(1, 2))
    put(connection, names.shard(1, 3))
    held: list[amqp.Message] = []
    with brief_channel(connection) as channel:
        channel.basic_qos(0, 1, False)
        channel.basic_consume(names.shard(1, 2), callback=held.append)
        while not held:
            connection.drain_events(timeout=20)
        # When that shard is purged, then the others of it go
        assert purge(connect, group.name, 2, by="op") == {names.shard(1, 2): 2}
    assert purge(connect, group.name, None, by="op") == {
        names.limbo(1): 0,
        names.shard(1, 0): 0,
        names.shard(1, 1): 0,
        names.shard(1, 2): 1,
        names.shard(1, 3): 1,
        names.limbo(2): 0,
    }


def test_a_purge_is_refused_while_a_worker_finishes_a_segment(connect, connection, group, names):
    put(connection, names.shard(1, 0))
    with brief_channel(connection) as channel:
        channel.basic_consume(names.limbo(1), callback=lambda message: None)
        with pytest.raises(TopologyError, match=f"workers are about to finish {names.limbo(1)}"):
            purge(connect, group.name, None, by="op")
    assert purge(connect, group.name, None, by="op")[names.shard(1, 0)] == 1


# --- remove ----------------------------------------------------------------------------------------------------------


def test_a_group_that_is_not_configured_any_more_is_removed_when_its_name_is_typed(shop, connect, connection, group):
    # Given a group with nothing in it but markers, which the app does not know
    env = {**shop.env, "SHOP_GROUP": "another"}
    # When another name is typed, then all of it stays
    done = run_shards("shop", "remove", group.name, env=env, answer=f"{group.name}x")
    assert (done.returncode, done.stdout) == (1, "")
    assert "nothing was done" in done.stderr
    layout = load(connection, Names(group.name))
    assert find_fault(connection, Names(group.name), layout) is None
    # When it is typed, then all of it is gone, and there is no such group any more
    done = run_shards("shop", "remove", group.name, env=env, answer=group.name)
    assert (done.returncode, done.stdout) == (0, f"{group.name}: removed\n"), done.stderr
    assert not group_exists(connection, Names(group.name))
    done = run_shards("shop", "remove", group.name, "--yes", env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no such group on the broker" in done.stderr
    done = run_shards("shop", "remove", group.name, env=env)
    assert (done.returncode, "--yes" in done.stderr) == (2, True)


def test_a_group_in_use_is_not_removed_and_it_is_said_by_what(shop, connect, connection, group, names):
    # Given something in a shard, in an earlier segment and among the dead letters
    waiting = [names.shard(1, 1), names.limbo(1), names.dead]
    for queue in waiting:
        put(connection, queue)
    done = run_shards("shop", "remove", group.name, "--yes", env=shop.env)
    assert (done.returncode, done.stdout) == (1, "")
    assert [line.strip().split(",")[0] for line in done.stderr.splitlines()[1:]] == [
        f"messages wait in {names.limbo(1)}",
        f"messages wait in {names.shard(1, 1)}",
        "dead letters: 1",
    ]
    # or somebody who consumes it, and a worker that follows it without doing so
    stopped = threading.Event()

    def live() -> None:
        with connect() as own, brief_channel(own) as channel:
            while not stopped.wait(0.5):
                event = {
                    "event": "vitals",
                    "at": time.time() - 3_600,
                    "by": "w1@host",
                    "generation": 1,
                    "owned": {},
                    "standby": [],
                }
                append(channel, names.journal, event)

    worker = threading.Thread(target=live)
    worker.start()
    try:
        with brief_channel(connection) as channel:
            channel.basic_consume(names.shard(1, 3), callback=lambda message: None)
            with pytest.raises(GroupInUse) as refusal:
                remove_group(connect, group.name)
    finally:
        stopped.set()
        worker.join()
    assert refusal.value.obstacles[0] == "worker w1@host follows it"
    assert f"{names.shard(1, 3)} has a consumer" in refusal.value.obstacles
    # Then all of it is there still
    layout = load(connection, names)
    assert find_fault(connection, names, layout) is None
    for queue in waiting:
        assert wait_until(lambda queue=queue: (count_ready(connection, queue) or 0) > 0, timeout_seconds=30)


def test_what_was_on_its_way_when_the_group_was_closed_is_kept_and_the_group_opened_again(
    shop, connect, connection, group, names
):
    # Given a publisher that has seen the group, and a message that comes to its shard when the group is closed already
    shop.app.send_task("shop.step", kwargs={"key": "k", "number": 0})
    purge(connect, group.name, None, by="op")

    def be_late() -> None:
        with connect() as own:
            while topology.fixed_exists(own, names):
                time.sleep(0.01)
            put(own, names.shard(1, 1))
            shop.app.send_task("shop.step", kwargs={"key": "k", "number": 1})

    late = threading.Thread(target=be_late)
    late.start()
    # When it is removed, then that is refused
    with pytest.raises(GroupInUse, match=f"messages wait in {names.shard(1, 1)}"):
        remove_group(connect, group.name)
    late.join()
    # And the group is as before: what the publisher published meanwhile is in its shard, as is what comes now
    shop.app.send_task("shop.step", kwargs={"key": "k", "number": 2})
    assert find_fault(connection, names, load(connection, names)) is None
    assert load(connection, names).generation == 1
    waiting = {
        queue: sum(1 for _ in waiting_tasks(connection, queue))
        for queue in existing_queues(connection, names, load(connection, names))
    }
    assert (sum(waiting.values()), waiting[names.limbo(1)], waiting[names.limbo(2)]) == (3, 0, 0)
