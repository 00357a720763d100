"""A shop whose orders are handled in order, by workers in containers (docker-compose.yml)."""

from __future__ import annotations

import os
import time

from celery import Celery

from celery_sharding import ShardGroup, Sharding, deduplicate
from celery_sharding.testing import Trace

app = Celery("shop", broker=os.environ["BROKER_URL"], backend=os.environ["RESULT_URL"])
app.conf.update(
    sharding_heartbeat_file="/tmp/heartbeat",  # the container's health check reads it
    # RabbitMQ 4.3 keeps an exclusive queue locked while its node is down, and with the queue for remote control, the
    # worker out. This one is a quorum queue on a cluster (deploy/compose/cluster.conf).
    control_queue_exclusive=False,
    control_queue_durable=True,
)
Sharding(app, groups=[ShardGroup("orders", shards=8)])

# On a volume that all workers share.
ledger = Trace("/data/ledger.jsonl")


@app.task(shard_group="orders", shard_key="order_id")
@deduplicate()
def apply_event(order_id: str, number: int) -> None:
    """Handle event `number` of an order, and record it in the ledger."""
    with ledger.run(order_id, number):
        time.sleep(0.05)
