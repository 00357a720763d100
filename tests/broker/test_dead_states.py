"""Whatever is a dead letter has a state: FAILURE, and the reason; an earlier SUCCESS stands."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import amqp
import pytest
from celery import chord, signature
from celery.result import AsyncResult
from kombu import Connection

from celery_sharding.operations.dead_letters import read_dead
from celery_sharding.testing.processes import wait_until
from support.pools import pool_options, pools
from support.shops import Shop

pytestmark = pytest.mark.timeout(120)

BODY = json.dumps([[], {"key": "a", "number": 1}, {}])
PROTOCOL_1 = json.dumps({"task": "shop.step", "id": "named-here", "args": [], "kwargs": ["key"]})


def publish(shop: Shop, *, body: str | bytes = BODY, **changes: Any) -> AsyncResult:
    """Publish a message as somebody with another client might, and return its result."""
    task_id = str(uuid.uuid4())
    headers = {"id": task_id, "task": "shop.step", "lang": "py", "retries": 0, **changes.pop("headers", {})}
    properties = {"content_type": "application/json", "content_encoding": "utf-8", **changes}
    with Connection(shop.broker_url) as connection:
        channel = connection.channel()
        message = amqp.Message(body, correlation_id=task_id, application_headers=headers, **properties)
        channel.basic_publish(message, exchange=shop.names.publish, routing_key="a")
    return shop.app.AsyncResult(task_id)


# What is published → the reason that its result and its dead letter give
BURIED: dict[str, tuple[Callable[[Shop], AsyncResult], str]] = {
    "a content type that is not accepted": (
        lambda shop: publish(shop, body=b"\x80\x04N.", content_type="application/x-python-serialize", headers={}),
        "accept_content",
    ),
    "a body that cannot be decoded": (lambda shop: publish(shop, body=b"[[1"), "decode"),
    "a body that is no task's": (lambda shop: publish(shop, body=b'"text"'), "no task message"),
    "a task that nobody knows": (lambda shop: publish(shop, headers={"task": "shop.nobody"}), "not registered"),
    "a task of no group": (lambda shop: publish(shop, headers={"task": "shop.plain"}), "does not belong"),
    "time limits that are none": (lambda shop: publish(shop, headers={"timelimit": [1, 2, 3]}), "no pair of seconds"),
    "keyword arguments that are no mapping": (lambda shop: publish(shop, body='[[], ["key"], {}]'), "no mapping"),
    "arguments that are no list": (lambda shop: publish(shop, body='[{"key": "a"}, {}, {}]'), "no list"),
    "a mapping in place of a call": (lambda shop: publish(shop, body='{"a": 1, "b": 2, "c": 3}'), "without args"),
    "protocol 1 with keyword arguments that are no mapping": (
        lambda shop: publish(shop, headers={"task": None}, body=PROTOCOL_1),
        "no mapping",
    ),
    "an eta": (lambda shop: publish(shop, headers={"eta": "2040-01-01T00:00:00"}), "eta"),
    "a rejection": (lambda shop: shop.send("reject", "a", 1), "not wanted"),
    "a rejection that asks for another run": (lambda shop: shop.send("refuse", "a", 1), "rejected with requeue"),
}


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo", "gevent")))
def test_every_dead_letter_has_a_state_that_gives_the_reason(shop: Shop, pool: str) -> None:
    # Given a worker
    shop.worker(*pool_options(pool, 2), SHOP_MAX_ATTEMPTS="2")
    # When messages are published of which each becomes a dead letter for another reason
    results = {name: make(shop) for name, (make, _) in BURIED.items()}
    letters = {letter.headers["id"]: letter for letter in shop.dead_letters(len(BURIED))}
    # Then each is stored with its reason
    for name, result in results.items():
        assert result.id in letters, name
        assert wait_until(lambda result=result: result.state == "FAILURE", timeout_seconds=20), (name, result.state)
        assert BURIED[name][1] in str(result.result), (name, result.result)


def test_a_message_that_is_named_in_its_body_only_has_a_state(shop: Shop) -> None:
    # Given a worker
    shop.worker("-c", "2")
    # When a client of protocol 1 publishes a call that is none, with nothing but a body
    task_id = f"{shop.group}-named"
    body = json.dumps({"task": "shop.step", "id": task_id, "args": [], "kwargs": 5})
    with Connection(shop.broker_url) as connection:
        message = amqp.Message(body, content_type="application/json", content_encoding="utf-8")
        connection.channel().basic_publish(message, exchange=shop.names.publish, routing_key="a")
    # Then its state, and its letter, are found by the id that its client knows
    result = shop.app.AsyncResult(task_id)
    assert wait_until(lambda: result.state == "FAILURE", timeout_seconds=40), result.state
    assert "no mapping" in str(result.result)
    [letter] = read_dead(lambda: Connection(shop.broker_url), shop.group, limit=10).letters
    assert letter.task_id == task_id


def test_a_result_that_is_to_be_ignored_is_not_stored(shop: Shop) -> None:
    # Given a worker, and a message that says that nobody wants its result
    shop.worker("-c", "2")
    ignored = publish(shop, headers={"task": "shop.nobody", "ignore_result": True})
    later = publish(shop, headers={"task": "shop.nobody"})
    # When it is a dead letter, then no state is stored
    assert wait_until(lambda: later.state == "FAILURE", timeout_seconds=30)
    assert ignored.state == "PENDING"


def test_a_success_that_is_stored_stands(shop: Shop) -> None:
    # Given a result that is stored already, and a dead letter that has the same task id
    shop.worker("-c", "2")
    stored = shop.send("step", "a", 1)
    assert stored.get(timeout=20) == 1
    publish(shop, headers={"task": "shop.nobody", "id": stored.id})
    later = publish(shop, headers={"task": "shop.nobody"})
    # When both are buried, then the success stands
    assert wait_until(lambda: later.state == "FAILURE", timeout_seconds=30)
    assert shop.app.AsyncResult(stored.id).state == "SUCCESS"


def test_the_errbacks_and_the_chord_of_a_dead_letter_learn_of_it(shop: Shop) -> None:
    # Given a chord of which one task is known to nobody
    shop.worker("-c", "2", SHOP_SETTINGS=json.dumps({"task_default_queue": f"{shop.group}-plain"}))
    app = shop.app
    app.conf.sharding_routes["shop.nobody"] = {"group": shop.group, "key": "key"}
    unknown = signature("shop.nobody", kwargs={"key": "a", "number": 1}, app=app)
    known = signature("shop.step", kwargs={"key": "b", "number": 1}, app=app)
    body = signature("plain.collect", app=app, queue=f"{shop.group}-plain")
    # When it is published
    result = chord([unknown, known], app=app)(body)
    # Then its body fails, as if the task had
    assert wait_until(lambda: result.state == "FAILURE", timeout_seconds=40), result.state


@pytest.mark.parametrize(
    ("backend", "pool"),
    [
        ("rpc://", "prefork"),
        ("disabled://", "threads"),
        pytest.param("rpc://", "threads", marks=pytest.mark.slow),
        pytest.param("disabled://", "prefork", marks=pytest.mark.slow),
    ],
)
def test_without_a_backend_that_can_be_asked_the_shard_goes_on(
    group_name: str, broker_url: str, tmp_path: Path, backend: str, pool: str
) -> None:
    # Given a worker without a result backend, or with one of which only the caller reads
    with Shop(group_name, broker_url, tmp_path, backend=backend) as shop:
        worker = shop.worker(*pool_options(pool, 2), SHOP_MAX_ATTEMPTS="2")
        # When messages become dead letters
        for make, _ in BURIED.values():
            make(shop)
        shop.dead_letters(len(BURIED))
        # Then the shard goes on, and nothing went wrong
        shop.send("step", "a", 2)
        assert shop.trace.wait_for(1)
        assert "was not stored" not in worker.output
