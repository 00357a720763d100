"""Messages that share a task id, or everything: what is recorded of one never counts for another."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import amqp
import pytest
from kombu import Connection

from celery_sharding import ShardGroup
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.rabbitmq.streams import publish_confirmed
from celery_sharding.testing import WorkerNode
from celery_sharding.testing.processes import wait_until
from support.pools import pool_options, pools
from support.shops import Shop

pytestmark = pytest.mark.timeout(300)


def let_go(shop: Shop) -> None:
    Path(f"{shop.trace.path}.go").touch()


def count_starts(shop: Shop) -> int:
    return sum(mark.kind == "start" for mark in shop.trace.read())


def kill_while_it_runs(shop: Shop, worker: WorkerNode, *, began: int) -> None:
    assert wait_until(lambda: count_starts(shop) >= began, timeout_seconds=60), worker.output
    worker.kill()


def publish_foreign(shop: Shop, task: str, count: int, *, task_id: str) -> None:
    """Publish messages that are the same to the byte, as a publisher in another language may."""
    ensure_group(lambda: Connection(shop.broker_url), ShardGroup(shop.group, 4), owner="test")
    headers = {"lang": "js", "task": f"shop.{task}", "id": task_id, "root_id": task_id, "retries": 0}
    body = json.dumps([["a", 1], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    properties = {"content_type": "application/json", "content_encoding": "utf-8", "correlation_id": task_id}
    with Connection(shop.broker_url) as connection:
        channel = connection.channel()
        for _ in range(count):
            message = amqp.Message(body, delivery_mode=2, application_headers=dict(headers), **properties)
            publish_confirmed(channel, message, "a", exchange=shop.names.publish, timeout_seconds=10)


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_one_task_id_on_twelve_messages_makes_no_dead_letter_of_what_never_began(shop: Shop, pool: str) -> None:
    # Given twelve messages of twelve keys under one task id
    task_id = str(uuid.uuid4())
    for number in range(12):
        shop.send("stand", f"k{number}", number, task_id=task_id)
    # When three workers are killed while the first of them run, and a fourth runs all
    for _ in range(3):
        began = count_starts(shop) + 1
        kill_while_it_runs(shop, shop.worker(*pool_options(pool, 2), SHOP_MAX_ATTEMPTS="5"), began=began)
    let_go(shop)
    shop.worker(*pool_options(pool, 2), SHOP_MAX_ATTEMPTS="5")
    # Then each ran to its end, and none is a dead letter
    assert shop.trace.wait_for(12), shop.verdict()
    assert wait_until(shop.has_nothing_left, timeout_seconds=30)
    assert shop.dead_letters(0) == []


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_the_changed_arguments_of_a_retry_reach_no_other_message_of_its_task_id(shop: Shop, pool: str) -> None:
    # Given a message that asks for a retry with other arguments, and others of its task id beside it
    task_id = str(uuid.uuid4())
    shop.send("altered", "k0", 0, text="own", alters=True, task_id=task_id)
    for number in range(1, 12):
        shop.send("altered", f"k{number}", number, text="own", task_id=task_id)
    # When its worker is killed while it waits for that, and another runs all
    worker = shop.worker(*pool_options(pool, 2))
    assert shop.trace.wait_for(1, kind="altered"), worker.output
    assert shop.trace.wait_for(1, kind="start"), worker.output
    worker.kill()
    let_go(shop)
    shop.worker(*pool_options(pool, 2))
    assert shop.trace.wait_for(12), shop.verdict()
    # Then that one alone ran with them
    texts = {(mark.number, mark.run) for mark in shop.trace.read() if mark.kind == "text"}
    assert texts == {(0, "altered"), *((number, "own") for number in range(1, 12))}


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_foreign_messages_that_are_the_same_to_the_byte_do_not_die_for_each_other(shop: Shop, pool: str) -> None:
    # Given three messages without an id of their own that nobody could tell apart
    publish_foreign(shop, "stand", 3, task_id="same")
    # When three workers are killed while the first of them runs, in a group of four attempts, and a fourth runs all
    for _ in range(3):
        began = count_starts(shop) + 1
        kill_while_it_runs(shop, shop.worker(*pool_options(pool, 2), SHOP_MAX_ATTEMPTS="4"), began=began)
    let_go(shop)
    shop.worker(*pool_options(pool, 2), SHOP_MAX_ATTEMPTS="4")
    # Then each ran to its end, and none is a dead letter
    assert wait_until(lambda: [mark.kind for mark in shop.trace.read()].count("end") == 3, timeout_seconds=60)
    assert wait_until(shop.has_nothing_left, timeout_seconds=30)
    assert shop.dead_letters(0) == []


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_foreign_poisons_that_are_the_same_to_the_byte_die_each_for_its_own_runs(shop: Shop, pool: str) -> None:
    # Given three messages without an id of their own, each of which kills its worker
    publish_foreign(shop, "poison_parent", 3, task_id="same")
    worker = shop.worker(*pool_options(pool, 2), SHOP_MAX_ATTEMPTS="3")
    # When the worker is started again each time
    starts, letters = 1, []
    while len(letters) < 3:
        if not worker.is_running:
            starts += 1
            assert starts <= 9, shop.trace.read()
            worker.start(wait_seconds=0)
        letters += shop.dead_letters(0)
    # Then all are dead letters, and each of them had begun at least twice: its first run may not have been recorded
    assert [letter.headers["shard_dead_attempts"] for letter in letters] == [3, 3, 3]
    assert [mark.kind for mark in shop.trace.read()].count("begin") == 3 + 2 + 2
