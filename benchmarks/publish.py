"""The time of one confirmed publish: `delay` of a sharded task against a stock one with confirms on a quorum queue."""

from __future__ import annotations

import time
from typing import Any

from celery import Celery
from kombu import Queue

from benchmarks.field import Field, open_field
from benchmarks.results import Row, Setup, compare
from benchmarks.throughput import KEYS, SHARDS
from celery_sharding import Sharding

BLOCK = 100


def run(setup: Setup) -> list[Row]:
    """At most 1.10 × stock, from one thread, in blocks of publishes that take turns."""
    with open_field(setup.broker_url, setup.redis_url, setup.folder, shards=SHARDS) as field:
        stock, sharded = make_task(field, "stock"), make_task(field, "sharded")
        for task in (stock, sharded):
            time_block(task)
        pairs = []
        for number in range(setup.scaled(30) * max(1, setup.rounds // 3)):
            first, second = (stock, sharded) if number % 2 == 0 else (sharded, stock)
            times = {first: time_block(first), second: time_block(second)}
            pairs.append((times[stock], times[sharded]))
    return [compare("publish, confirmed", pairs, unit="ms", at_most=1.10)]


def make_task(field: Field, side: str) -> Any:
    """Return an empty task of an app of its own."""
    app = Celery(f"publisher-{side}", broker=field.broker_url, set_as_current=False)
    app.conf.update(
        task_ignore_result=True,
        broker_transport_options={"confirm_publish": True},
        task_queues=[Queue(field.stock_queue, queue_arguments={"x-queue-type": "quorum"})],
        task_default_queue=field.stock_queue,
    )
    options = {}
    if side == "sharded":
        Sharding(app, groups=[field.group])
        options = {"shard_group": field.name, "shard_key": "key"}

    def empty(key: str, number: int) -> None:
        """Never run."""

    return app.task(name="benchmarks.empty", **options)(empty)


def time_block(task: Any) -> float:
    """Publish a block and return the milliseconds a publish took."""
    started = time.perf_counter()
    for number in range(BLOCK):
        task.delay(f"key-{number % KEYS}", number)
    return (time.perf_counter() - started) / BLOCK * 1_000
