"""What a worker tells of its shards once a second: the vitals, from which every face of the snapshot reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from celery_sharding.journal.events import ShardVitals

if TYPE_CHECKING:
    from collections.abc import Iterable

    from celery_sharding.worker.run.lanes import Lanes
    from celery_sharding.worker.run.waits import Waits
    from celery_sharding.worker.shard.shard import Shard

# Of so many vitals, each shard's times stand in one: they are long, and the journal keeps them for a day.
_TIMES_EVERY = 5


def describe_owned(
    shards: Iterable[Shard], lanes: Lanes, waits: Waits, *, node: str, now: float, tick: int, prefetch: int
) -> dict[str, ShardVitals]:
    """Return queue → what its owner, this worker, knows of it.

    Args:
        now: The wall clock.
        tick: How many vitals there were before.
        prefetch: How many messages a shard holds at most.
    """
    owned = [(shard, waits.of(shard)) for shard in shards if shard.owned]
    return {
        shard.queue: ShardVitals(
            owner=node,
            at=now,
            counted=shard.counted(with_times=(tick + shard.index) % _TIMES_EVERY == 0),
            held=len(shard.held),
            running=lanes.running(shard),
            index=shard.index,
            lag_seconds=_age(next((entry.item.delivery.sent_at for entry in lanes.waiting(shard)), None), now),
            prefetch=prefetch,
            behind_seconds=_age(shard.newest_sent_at, now),
            store_waiting=found.for_store,
            store_away_since=found.store_away_since,
            claim_waiting=found.for_claims,
        )
        for shard, found in owned
    }


def _age(at: float | None, now: float) -> float | None:
    return None if at is None else max(0.0, round(now - at, 3))
