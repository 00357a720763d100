"""The worker's side: the task that the publisher calls by its name."""

from __future__ import annotations

import os
from pathlib import Path

from celery import Celery

from celery_sharding import ShardGroup, Sharding

app = Celery("shop", broker=os.environ.get("BROKER_URL", "amqp://"))
Sharding(app, groups=[ShardGroup("orders", shards=4)])


@app.task(shard_group="orders", shard_key="order_id")
def apply_event(order_id: int, kind: str) -> None:
    """Note that an event has come."""
    with Path("ran.txt").open("a") as log:
        print(order_id, kind, file=log)
