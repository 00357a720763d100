"""A shop whose orders are handled in order: one task on a group, one ordinary task beside it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery

from celery_sharding import ShardGroup, Sharding, deduplicate

app = Celery(
    "shop",
    broker=os.environ.get("BROKER_URL", "amqp://"),
    backend=os.environ.get("RESULT_URL", "redis://"),
)
Sharding(app, groups=[ShardGroup("orders", shards=8)])


@app.task(bind=True, shard_group="orders", shard_key="order_id", max_retries=3)
@deduplicate(key="event_id")
def apply_event(self, order_id: int, event_id: str, kind: str) -> str:
    """Handle one event of an order."""
    if kind == "paid" and self.request.retries == 0:
        raise self.retry(countdown=0.5)  # the bank does not answer; later events of this order wait
    time.sleep(0.1)
    with Path("ran.txt").open("a") as log:
        print(order_id, kind, file=log)
    return kind


@app.task
def report() -> str:
    """Any other task works as usual."""
    with Path("ran.txt").open() as log:
        return f"{len(log.readlines())} events"
