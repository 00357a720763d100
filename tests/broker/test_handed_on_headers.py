"""Headers of a sharded run that its task hands on to what it calls: they say nothing about key, group or attempts."""

from __future__ import annotations

import pytest
from celery import Celery
from kombu import Connection

from support.pools import pool_options, pools
from support.shops import Shop

pytestmark = pytest.mark.timeout(180)

HOWS = (
    "apply_async",
    "send_task",
    "signature",
    "options",
    "link",
    "chain",
    "group",
    "chord",
    "ordinary",
    "replace",
)  # fmt: skip


@pytest.mark.parametrize("pool", pools("prefork", slow=("threads", "solo")))
def test_what_a_task_calls_with_its_own_headers_leaves_under_its_own_key(shop: Shop, pool: str) -> None:
    # Given tasks of one key, each of which calls a task of another key with all of its own headers
    shop.worker(*pool_options(pool), "-Q", f"{shop.group},{shop.group}-plain")
    for number, how in enumerate(HOWS):
        shop.app.send_task(
            "shop.hand_on", kwargs={"key": "parent", "number": number, "child": f"child-{number}", "how": how}
        )
    # When all have run
    assert shop.trace.wait_for(len(HOWS)), shop.trace.read()
    # Then each was routed by the key that its call has
    assert {mark.number: mark.key for mark in shop.trace.read() if mark.kind == "end"} == {
        number: f"child-{number}" for number in range(len(HOWS))
    }
    assert shop.has_nothing_left()
    with Connection(shop.broker_url) as connection:
        connection.channel().queue_delete(f"{shop.group}-plain")


def test_a_run_from_an_ordinary_queue_retries_there_whatever_its_headers_say(shop: Shop) -> None:
    # Given a sharded task in an ordinary queue, with the headers of a sharded run
    shop.worker()
    app = Celery("before", broker=shop.broker_url, backend=shop.env["SHOP_BACKEND"], set_as_current=False)
    queue = f"{shop.group}-plain"
    headers = {"shard_label": f"{shop.group}/1", "shard_key": "b", "shard_group": shop.group, "shard": "x/1"}
    # When it asks for retries
    result = app.send_task("shop.again", kwargs={"key": "a", "number": 1, "countdown": 1}, queue=queue, headers=headers)
    # Then it is retried as Celery does, and nothing is lost
    assert result.get(timeout=30) == 2
    with Connection(shop.broker_url) as connection:
        connection.channel().queue_delete(queue)
