"""What a worker tells of its shards once a second. Command line, page and metrics all show these vitals."""

from __future__ import annotations

from collections.abc import Iterable

from celery_sharding.journal.events import ShardVitals
from celery_sharding.worker.executor import Executor
from celery_sharding.worker.shard.shard import Shard

# Of so many vitals, each shard's times stand in one: they are long, and the journal keeps them for a day.
_TIMES_EVERY = 5


def describe_owned(
    shards: Iterable[Shard], executor: Executor, *, node: str, now: float, tick: int, prefetch: int
) -> dict[str, ShardVitals]:
    """Return queue → what its owner, this worker, knows of it.

    Args:
        now: The wall clock.
        tick: How many vitals there were before.
        prefetch: How many messages a shard holds at most.
    """
    owned = [(shard, executor.waits.of(shard)) for shard in shards if shard.owned]
    return {
        shard.queue: ShardVitals(
            owner=node,
            at=now,
            counted=shard.tally.to_counted(with_times=(tick + shard.place.index) % _TIMES_EVERY == 0),
            held=len(shard.held),
            running=executor.lanes.running(shard),
            index=shard.place.index,
            lag_seconds=_age(next((delivery.sent_at for delivery in executor.lanes.waiting(shard)), None), now),
            prefetch=prefetch,
            behind_seconds=_age(shard.tally.newest_sent_at, now),
            store_waiting=found.for_store,
            store_away_since=found.store_away_since,
            claim_waiting=found.for_claims,
        )
        for shard, found in owned
    }


def _age(at: float | None, now: float) -> float | None:
    return None if at is None else max(0.0, round(now - at, 3))
