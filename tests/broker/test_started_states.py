"""The result backend away while states of runs that have not ended are stored: they run later, or something says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from kombu import Connection

from celery_sharding.operations.dead_letters import read_dead
from celery_sharding.testing.processes import wait_until
from celery_sharding.testing.redis_node import RedisNode
from support.pools import pool_options, pools
from support.shops import Shop

pytestmark = pytest.mark.timeout(200)

KEYS, MESSAGES = 8, 60
# Celery tries for 20 s by default, in the slot of the run.
PATIENCE = {"retry_policy": {"max_retries": 2, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.2}}


@pytest.fixture
def results() -> Iterator[RedisNode]:
    with RedisNode(keeps_data=True) as node:
        yield node


@pytest.fixture
def shop(group_name: str, broker_url: str, results: RedisNode, tmp_path: Path) -> Iterator[Shop]:
    # Its publisher keeps results elsewhere: Celery asks for them in the backend when it sends.
    with Shop(group_name, broker_url, tmp_path) as shop:
        shop.env["SHOP_BACKEND"] = results.url
        settings = {"task_track_started": True, "result_backend_transport_options": PATIENCE}
        shop.env["SHOP_SETTINGS"] = json.dumps(settings)
        yield shop


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads",)))
def test_what_cannot_be_marked_as_started_is_never_acknowledged_without_a_word(
    shop: Shop, results: RedisNode, pool: str
) -> None:
    # Given tasks that are to be marked as started, of which some have run
    worker = shop.worker(*pool_options(pool))
    numbers = {f"{shop.group}-{number}": number for number in range(MESSAGES)}
    for task_id, number in numbers.items():
        shop.send("step", f"k{number % KEYS}", number, seconds=0.1, task_id=task_id)
    assert shop.trace.wait_for(5, timeout_seconds=60), worker.output[-3000:]
    # When the result backend goes away until the first of them are dead letters, and comes back
    results.stop()
    assert wait_until(lambda: shop.status().dead_letters >= 2, timeout_seconds=90), worker.output[-3000:]
    results.start()
    assert wait_until(shop.has_nothing_left, timeout_seconds=90), worker.output[-3000:]
    # Then each message has run, or is a dead letter, or has failed by its state
    ran = {mark.number for mark in shop.trace.read() if mark.kind == "end"}
    dead = {
        str(letter.task_id) for letter in read_dead(lambda: Connection(shop.broker_url), shop.group, limit=100).letters
    }
    backend = Celery(backend=results.url, set_as_current=False)
    silent = {task_id for task_id, number in numbers.items() if number not in ran} - dead

    def is_told() -> bool:
        return all(backend.AsyncResult(task_id).state == "FAILURE" for task_id in silent)

    assert wait_until(is_told, timeout_seconds=30), {each: backend.AsyncResult(each).state for each in silent}
    # And none ran twice, or before another of its key
    starts = [mark for mark in shop.trace.read() if mark.kind == "start"]
    for key in range(KEYS):
        begun = [mark.number for mark in starts if mark.key == f"k{key}"]
        assert begun == sorted(set(begun)), (key, begun)


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_a_retry_stands_although_its_state_cannot_be_stored(shop: Shop, results: RedisNode, pool: str) -> None:
    # Given a worker whose result backend is away
    shop.env["SHOP_SETTINGS"] = json.dumps({"result_backend_transport_options": PATIENCE})
    worker = shop.worker(*pool_options(pool, 2))
    results.stop()
    # When a task is to be retried, and others of its key wait behind it
    shop.send("again", "a", 1, times=1)
    shop.send("step", "a", 2)
    worker.wait_for("is retried, though not all could be told")
    results.start()
    # Then it runs again, in its place
    assert shop.trace.wait_for(2, timeout_seconds=60), worker.output[-3000:]
    assert shop.verdict().is_clean, shop.verdict()
    assert wait_until(shop.has_nothing_left, timeout_seconds=60), worker.output[-3000:]
