"""A newer version acts on a group: this one gives it up in order, leaves it alone, and says so."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import amqp
import pytest
from celery import Celery
from kombu import Connection

from celery_sharding import ShardGroup
from celery_sharding.errors import ProtocolTooOld
from celery_sharding.flower import actions
from celery_sharding.layout.ensure import ensure_fixed, ensure_group
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.queues import count_consumers
from celery_sharding.rabbitmq.streams import append, publish_confirmed, read_to_end
from celery_sharding.testing import WorkerNode
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names, fixed_exists
from support.commands import call_shards
from support.pools import pool_options, pools
from support.shops import Shop

pytestmark = pytest.mark.timeout(180)

SHARDS = 4
NEEDS = "needs protocol 2, and this celery-sharding knows protocol 1; upgrade it to a version that knows protocol 2"


def require(connection: Connection, names: Names, **event: object) -> None:
    """Write what a newer version writes before it does what this one does not know."""
    with brief_channel(connection) as channel:
        append(channel, names.manifest, {"event": "requires", "protocol": 2, **event})


def consumers(connection: Connection, names: Names) -> int:
    return sum(count_consumers(connection, names.shard(1, index)) for index in range(SHARDS))


def events_of(connection: Connection, stream: str) -> list[dict[str, Any]]:
    return [event for _, event in read_to_end(connection, stream)]


def run_ordinary(shop: Shop) -> None:
    """See that an ordinary task still runs."""
    app = Celery("plain", broker=shop.broker_url, backend=shop.env["SHOP_BACKEND"], set_as_current=False)
    result = app.send_task("shop.plain", args=[1], queue=f"{shop.group}-plain")
    assert result.get(timeout=30) == 2


def inspect(shop: Shop, worker: WorkerNode) -> dict[str, dict[str, str]]:
    replies: list[Any] = []

    def ask() -> bool:
        inspection = shop.app.control.inspect([worker.name], timeout=10, limit=1)
        replies.append(inspection._request("shards"))
        return bool(replies[-1])

    assert wait_until(ask, timeout_seconds=40)
    return replies[-1][worker.name]


@pytest.fixture(autouse=True)
def _no_ordinary_queue(group_name, connection):
    yield
    with brief_channel(connection) as channel:
        channel.queue_delete(f"{group_name}-plain")


@pytest.mark.parametrize(
    ("pool", "told_by"),
    [
        ("prefork", "manifest"),
        ("threads", "control message"),
        pytest.param("threads", "manifest", marks=pytest.mark.slow),
        pytest.param("solo", "manifest", marks=pytest.mark.slow),
        pytest.param("prefork", "control message", marks=pytest.mark.slow),
        pytest.param("solo", "control message", marks=pytest.mark.slow),
    ],
)
def test_a_worker_gives_the_group_up_in_order_and_a_newer_one_goes_on(
    shop: Shop, connection: Connection, pool: str, told_by: str, tmp_path: Path
) -> None:
    # Given a worker in the middle of a task, with others of its key and of other keys behind it
    file = tmp_path / "heartbeat"
    worker = shop.worker(*pool_options(pool, 2), SHOP_SETTINGS=json.dumps({"sharding_heartbeat_file": str(file)}))
    assert wait_until(lambda: shop.owners() == [worker.name] * SHARDS, timeout_seconds=40)
    shop.send("stand", "a", 1)
    assert shop.trace.wait_for(1, kind="start")
    # When a newer version says that it acts on the group
    if told_by == "manifest":
        require(connection, shop.names)
    else:
        control = amqp.Message(b"", delivery_mode=2, application_headers={"shard_control": "split", "protocol": 2})
        with brief_channel(connection) as channel:
            publish_confirmed(channel, control, shop.names.shard(1, 2), timeout_seconds=10)
    is_solo = pool == "solo"  # which does nothing else while it runs a task
    if not is_solo:
        worker.wait_for(NEEDS)
    # and more is published, which publishers may
    for number in range(2, 22):
        shop.send("step", f"{'abcdef'[number % 6]}", number)
    if not is_solo:
        assert wait_until(lambda: worker.output.count("given up") >= SHARDS - 1, timeout_seconds=40)
        assert worker.output.count("given up") == SHARDS - 1
    (Path(f"{shop.trace.path}.go")).touch()
    # Then the task that runs comes to its end, and is acknowledged; nothing else starts, and the channels are closed
    assert wait_until(lambda: worker.output.count("given up") == SHARDS, timeout_seconds=40), worker.output
    assert wait_until(lambda: consumers(connection, shop.names) == 0, timeout_seconds=20)
    given_up_at = time.time()
    assert [(mark.kind, mark.number) for mark in shop.trace.read()] == [("start", 1), ("end", 1)]
    # The worker says so once in its log, in its file and when it is asked, and goes on with what is not the group's
    run_ordinary(shop)
    assert worker.output.count(NEEDS) == 1
    assert wait_until(lambda: file.read_text() == "bystander\n", timeout_seconds=20)
    assert set(inspect(shop, worker)[shop.group].values()) == {"bystander, needs protocol 2"}
    # A newer worker runs the rest, in order, none of it twice
    newer = shop.worker("-c", "2", "-X", f"{shop.group}-plain", SHOP_PROTOCOL="2")
    assert shop.trace.wait_for(21), (shop.verdict(), newer.output)
    assert shop.verdict().is_clean, shop.verdict()
    assert wait_until(shop.has_nothing_left, timeout_seconds=30)
    # and nothing of the first was written since
    assert worker.is_running

    def read_events() -> list[dict[str, Any]]:
        return events_of(connection, shop.names.journal) + events_of(connection, shop.names.manifest)

    def has_newer() -> bool:
        return any(event.get("by") == newer.name and event["at"] > given_up_at for event in read_events())

    assert wait_until(has_newer, timeout_seconds=30)
    events = read_events()
    assert not [
        event for event in events if worker.name in (event.get("by"), event.get("owner")) and event["at"] > given_up_at
    ]


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_a_worker_that_starts_under_a_newer_protocol_leaves_the_group_alone(
    shop: Shop, connection: Connection, pool: str, tmp_path: Path
) -> None:
    # Given a group that needs a newer version, of which a shard is gone, which a worker would put right
    ensure_group(lambda: Connection(shop.broker_url), ShardGroup(shop.group, SHARDS), owner="test")
    shop.send("step", "a", 1)
    require(connection, shop.names)
    before = events_of(connection, shop.names.manifest)
    # When a worker starts
    file = tmp_path / "heartbeat"
    worker = shop.worker(
        *pool_options(pool, 2), wait_seconds=0, SHOP_SETTINGS=json.dumps({"sharding_heartbeat_file": str(file)})
    )
    worker.wait_for(NEEDS)
    # Then it runs what is not the group's, and says why it does nothing else
    run_ordinary(shop)
    assert wait_until(lambda: file.read_text() == "bystander\n", timeout_seconds=20)
    assert inspect(shop, worker)[shop.group] == {shop.names.publish: "bystander, needs protocol 2"}
    assert events_of(connection, shop.names.manifest) == before
    assert events_of(connection, shop.names.journal) == []
    assert consumers(connection, shop.names) == 0
    assert shop.trace.read() == []


@pytest.fixture
def newer(connect, connection, group_name, names) -> ShardGroup:
    """A declared group on which a newer version acts."""
    made = ShardGroup(group_name, SHARDS)
    ensure_group(connect, made, owner="test")
    require(connection, names)
    return made


@pytest.mark.parametrize(
    "verb",
    [
        ("pause", "{}"),
        ("resume", "{}"),
        ("gc", "{}"),
        ("gc", "{}", "--dry-run"),
        ("declare", "{}"),
        ("declare", "{}", "--dry-run"),
        ("locate", "{}", "42"),
        ("purge", "{}", "--yes"),
        ("remove", "{}", "--yes"),
        ("dead-letters", "replay", "{}", "--all", "--yes"),
        ("dead-letters", "discard", "{}", "--all", "--yes"),
    ],
    ids=" ".join,
)
def test_every_verb_that_changes_something_or_says_what_would_refuses_and_names_both_protocols(
    shop: Shop, connection: Connection, newer: ShardGroup, verb: tuple[str, ...]
) -> None:
    # Given a group on which a newer version acts, with a dead letter
    with brief_channel(connection) as channel:
        letter = amqp.Message(b"{}", delivery_mode=2, application_headers={"id": "t1", "shard_key": "a"})
        publish_confirmed(channel, letter, shop.names.dead, timeout_seconds=10)
    before = events_of(connection, shop.names.manifest)
    # When it is to be changed
    done = call_shards(shop.app, *(word.format(newer.name) for word in verb))
    # Then a line says what is needed, and nothing was done
    assert done.exit_code == 1, done.output
    assert NEEDS in done.stderr.strip().splitlines()[-1]
    assert done.stderr.count("protocol 2") == 2
    assert events_of(connection, shop.names.manifest) == before
    assert len(shop.dead_letters(1)) == 1


def test_verbs_that_look_say_it(shop: Shop, newer: ShardGroup) -> None:
    status = call_shards(shop.app, "status", newer.name)
    assert (status.exit_code, NEEDS in status.stdout) == (0, True)
    found = json.loads(call_shards(shop.app, "status", newer.name, "--json").stdout)
    assert found["groups"][0]["protocol"] == 2
    check = call_shards(shop.app, "status", newer.name, "--check")
    assert (check.exit_code, NEEDS in check.stderr) == (1, True)
    doctor = call_shards(shop.app, "doctor", newer.name)
    assert (doctor.exit_code, NEEDS in doctor.stdout) == (1, True)
    assert call_shards(shop.app, "history", newer.name).exit_code == 0
    assert call_shards(shop.app, "dead-letters", "list", newer.name).exit_code == 0


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_actions_of_flowers_page_are_refused(shop: Shop, newer: ShardGroup, verb: str) -> None:
    with pytest.raises(ProtocolTooOld, match="needs protocol 2") as caught:
        actions.set_paused(shop.app.sharding, verb, newer.name, None, by="somebody")
    refused = actions.refusal_for(caught.value)
    assert refused is not None
    assert (refused.status, NEEDS in str(refused)) == (409, True)


def test_publishers_publish_to_what_exists_and_declare_nothing(
    shop: Shop, connect, connection: Connection, newer: ShardGroup, names: Names
) -> None:
    # Given a group on which a newer version acts: then its publishers publish
    shop.send("step", "a", 1)
    # When its exchanges are gone, then a publish declares nothing, and raises
    with brief_channel(connection) as channel:
        channel.exchange_delete(names.publish)
    before = events_of(connection, names.manifest)
    with pytest.raises(ProtocolTooOld, match="needs protocol 2"):
        shop.send("step", "a", 2)
    with pytest.raises(ProtocolTooOld, match="needs protocol 2"):
        ensure_fixed(connect, newer, owner="test")
    assert not fixed_exists(connection, names)
    assert events_of(connection, names.manifest) == before


def test_queues_that_the_manifest_does_not_know_are_not_taken_in(
    connect, connection: Connection, newer: ShardGroup, names: Names
) -> None:
    # Given queues of a generation, and a limbo, that only a newer version knows
    with brief_channel(connection) as channel:
        for queue in (names.shard(2, 0), names.limbo(9)):
            channel.queue_declare(queue, durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
    before = events_of(connection, names.manifest)
    # When somebody looks at the group, with the layout it knew and without
    for known in (None, ensure_layout(connection, names)):
        with pytest.raises(ProtocolTooOld, match="needs protocol 2"):
            ensure_group(connect, newer, owner="test", known=known)
    # Then nothing was done
    assert events_of(connection, names.manifest) == before


def ensure_layout(connection: Connection, names: Names) -> Any:
    """Return the layout as it was before anything newer was known."""
    from celery_sharding.layout.fold import fold
    from celery_sharding.layout.model import Layout

    layout = Layout()
    for offset, event in read_to_end(connection, names.manifest):
        if "protocol" not in event:
            layout = fold(layout, offset, event)
    return layout
