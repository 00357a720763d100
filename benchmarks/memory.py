"""What 64 shards add to a worker's memory: its processes together, shared pages counted once, before any message."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.field import open_field
from benchmarks.results import Row, Setup, limit
from celery_sharding.testing import WorkerNode
from celery_sharding.testing.processes import wait_until

SHARDS, CONCURRENCY = 64, 2
SETTLE_LOOKS = 30


def run(setup: Setup) -> list[Row]:
    """At most 20 MB above the same worker without the library."""
    found: dict[str, list[float]] = {"stock": [], "sharded": []}
    with open_field(setup.broker_url, setup.redis_url, setup.folder, shards=SHARDS) as field:
        for _ in range(min(3, setup.rounds)):
            for side, sizes in found.items():
                # One task each, so that the worker is known to consume.
                field.fill(side, "empty", ["one"])
                with field.worker(side, concurrency=CONCURRENCY) as (node, ends):
                    wait_until(lambda ends=ends: ends.exists(), timeout_seconds=60)
                    sizes.append(settled_megabytes(node))
                    node.stop()
            setup.say(f"memory: stock {found['stock'][-1]:.1f} MB, 64 shards {found['sharded'][-1]:.1f} MB")
    stock, ours = (statistics.median(found[side]) for side in ("stock", "sharded"))
    return [limit("memory of a worker, 64 shards", stock, ours, unit="MB", at_most=20)]


def settled_megabytes(node: WorkerNode) -> float:
    """Return the memory of a worker that has stopped growing for a second."""
    looks: list[float] = []

    def is_settled() -> bool:
        looks.append(megabytes(node))
        return len(looks) > SETTLE_LOOKS and max(looks[-SETTLE_LOOKS:]) - looks[-1] < 0.1

    wait_until(is_settled, timeout_seconds=20)
    return looks[-1]


def megabytes(node: WorkerNode) -> float:
    """Return the proportional set size of a worker's processes together."""
    kilobytes = 0
    for pid in (node.pid, *node.children()):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                kilobytes += int(line.split()[1])
    return kilobytes / 1_000
