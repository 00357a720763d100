"""Runs two messages without a server, and prints the steps of ARCHITECTURE.md that the second one does not take."""

from __future__ import annotations

import os
import sys

from celery import Celery
from celery.contrib.testing.worker import start_worker

from celery_sharding import ShardGroup, Sharding
from celery_sharding.testing.processes import wait_until
from support.architecture import read_way
from support.calls import Calls, find_missing

app = Celery("followed", broker="memory://", backend="cache+memory://")
app.conf.broker_transport_options = {"polling_interval": 0.01}
Sharding(app, groups=[ShardGroup("orders", shards=2)])


@app.task(shard_group="orders", shard_key="order_id")
def ship(order_id):
    return order_id


def find_missing_steps(calls: Calls, order_id: int) -> list[str]:
    """Return the steps of the way that a message does not go."""
    way = read_way()["worker"]
    calls.forget()
    ship.delay(order_id)
    wait_until(lambda: not find_missing(way, list(calls.elsewhere)), timeout_seconds=20)
    return find_missing(way, list(calls.elsewhere))


with Calls() as calls, start_worker(app, pool="threads", concurrency=1, perform_ping_check=False):
    find_missing_steps(calls, 42)
    sys.stdout.write("\n".join(find_missing_steps(calls, 7)))
    sys.stdout.flush()
    os._exit(0)  # a warm shutdown waits for seconds
