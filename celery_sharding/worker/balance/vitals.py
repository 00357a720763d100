"""What a worker tells of its shards once a second: the vitals, from which every face of the snapshot reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from celery_sharding.worker.executor import Runs
from celery_sharding.worker.run.waits import Waits
from celery_sharding.worker.shard.shard import Shard

# Of so many vitals, each shard's times stand in one: they are long, and the journal keeps them for a day.
_TIMES_EVERY = 5


def describe_owned(
    shards: Iterable[Shard], runs: Runs, *, now: float, tick: int, prefetch: int
) -> dict[str, dict[str, Any]]:
    """Return queue → what its owner knows of it, in seconds and messages.

    Args:
        now: The wall clock.
        tick: How many vitals there were before.
        prefetch: How many messages a shard holds at most.
    """
    return {
        shard.queue: {
            "index": shard.index,
            "held": len(shard.held),
            "running": runs.lanes.running(shard),
            "lag_seconds": _age(next((entry.item.delivery.sent_at for entry in runs.lanes.waiting(shard)), None), now),
            "prefetch": prefetch,
            "behind_seconds": _age(shard.tally.newest_sent_at, now),
            **_waiting(runs.waits, shard),
            **shard.tally.to_facts(with_times=(tick + shard.index) % _TIMES_EVERY == 0),
        }
        for shard in shards
        if shard.owned
    }


def _waiting(waits: Waits, shard: Shard) -> dict[str, Any]:
    found = waits.of(shard)
    facts = {
        "store_waiting": found.for_store,
        "store_away_since": found.store_away_since,
        "claim_waiting": found.for_claims,
    }
    return {name: value for name, value in facts.items() if value}


def _age(at: float | None, now: float) -> float | None:
    return None if at is None else max(0.0, round(now - at, 3))
