"""A shard as the command line and its checks are shown it."""

from __future__ import annotations

from celery_sharding.monitoring.status import ShardStatus

NOW = 1_000_000.0
ROW = ShardStatus(
    kind="live",
    index=0,
    queue="shards.orders.g001.000",
    state="ok",
    ready=3,
    held=1,
    running=1,
    owner="a",
    standbys=("b",),
    lag_seconds=1.0,
    lag_estimated=False,
    since=NOW - 60,
)
