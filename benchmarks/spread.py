"""How soon shards are spread evenly after a worker came or went, and how many of them moved for it.

Even means: each shard has an owner, and no worker owns two more than another. The time runs from when the worker that
came consumes, or the one that went has ended, until the status shows an even spread; it is a second old at most.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack

from kombu import Connection

from benchmarks.field import Field, open_field
from benchmarks.results import Row, Setup, limit
from celery_sharding.monitoring.snapshot import read_snapshot
from celery_sharding.rabbitmq.streams import read_to_end
from celery_sharding.testing import ServerNotReady, WorkerNode
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names

PATIENCE_SECONDS = 120.0


def run(setup: Setup) -> list[Row]:
    """8 shards: even within 15 s, with and without gossip; 64 shards on 8 workers: within 30 s."""
    rows = []
    for gossip in (True, False):
        rows += measure(setup, shards=8, workers=3, gossip=gossip, at_most=15.0)
    return rows + measure(setup, shards=64, workers=8, gossip=True, at_most=30.0)


def measure(setup: Setup, *, shards: int, workers: int, gossip: bool, at_most: float) -> list[Row]:
    """Let workers share shards; one more comes, one is stopped warm, and one is killed."""
    said = f"{shards} shards, {workers} workers, {'with' if gossip else 'without'} gossip"
    rows = []
    with open_field(setup.broker_url, setup.redis_url, setup.folder, shards=shards) as field, ExitStack() as stack:
        running: list[WorkerNode] = []

        def come(count: int) -> None:
            starting = [field.worker("sharded", concurrency=1, level="info", gossip=gossip) for _ in range(count)]
            nodes = [stack.enter_context(worker)[0] for worker in starting]
            for node in nodes:
                node.wait_for(" ready.", timeout_seconds=PATIENCE_SECONDS)
            running.extend(nodes)

        def measure_change(what: str, change: Callable[[], object], must_move: int) -> None:
            taken = count_taken(field)
            change()
            began = time.monotonic()
            if not wait_until(lambda: is_even(field, len(running)), timeout_seconds=PATIENCE_SECONDS):
                raise ServerNotReady(f"{said}: not even after {PATIENCE_SECONDS:g} s; {what}")
            seconds = time.monotonic() - began
            setup.say(f"{said}; {what}: {seconds:.1f} s, {count_taken(field) - taken} taken of {must_move} to be")
            rows.append(limit(f"{said}; {what}", None, seconds, unit="s", at_most=at_most))

        measure_change("all but one come", lambda: come(workers - 1), shards)
        measure_change("the last comes", lambda: come(1), shards // workers)
        measure_change("one is stopped", lambda: running.pop(0).stop(), owned_at_most(shards, workers))
        measure_change("one is killed", lambda: running.pop(0).kill(), owned_at_most(shards, workers - 1))
    return rows


def owned_at_most(shards: int, workers: int) -> int:
    return -(-shards // workers)


def is_even(field: Field, workers: int) -> bool:
    """Say whether each shard has an owner, and no worker owns two more than another."""
    with Connection(field.broker_url) as connection:
        rows = read_snapshot(connection, [field.name]).groups[0].shards
    owned = Counter(row.owner for row in rows)
    return None not in owned and len(owned) == workers and max(owned.values()) - min(owned.values()) <= 1


def count_taken(field: Field) -> int:
    """Return how often a shard was taken by a worker so far."""
    with Connection(field.broker_url) as connection:
        events = [event for _, event in read_to_end(connection, Names(field.name).journal)]
    return sum(event["event"] == "handover" and event["change"] == "taken" for event in events)
