"""What may start while several segments of a group are open.

The keys of a segment's messages must wait for what is left of them in earlier segments: for unfinished keys, as the
manifest knows them, and for a run in this process whose connection was lost, which nobody else can wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from celery_sharding.keys import key_digest
from celery_sharding.layout.model import Layout
from celery_sharding.worker.run.delivery import Delivery, State
from celery_sharding.worker.run.lanes import Lanes

Gate = Callable[[Delivery], bool]


def gate_for(segment: str, layout: Layout, group: str, lanes: Lanes[Delivery]) -> Gate | None:
    """Return what says whether a message of `segment` may start now; None: all may."""
    unfinished = _unfinished_before(segment, layout)
    orphans = {
        delivery.key: delivery.lane
        for delivery in lanes.in_pool()
        if delivery.state is State.ORPHAN and delivery.shard.group.name == group and delivery.shard.segment != segment
    }
    if not unfinished and not orphans:
        return None

    def is_free(delivery: Delivery) -> bool:
        if unfinished and key_digest(delivery.key) in unfinished:
            return False
        orphan: Hashable = orphans.get(delivery.key)
        return orphan is None or not lanes.has(orphan)

    return is_free


def _unfinished_before(segment: str, layout: Layout) -> frozenset[str]:
    found: set[str] = set()
    for earlier in layout.segments:
        if earlier.name == segment:
            return frozenset(found)
        found.update(digest for _, digest in earlier.unfinished)
    return frozenset()
