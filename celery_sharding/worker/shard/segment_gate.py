"""What may start while several segments of a group are open.

A message waits for what is left of its key in earlier segments: for the key to be finished, as the manifest tells, and
for a run in this process whose connection was lost, which nobody else can wait for.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from celery_sharding.keys import key_digest
from celery_sharding.layout.model import Layout
from celery_sharding.worker.run.delivery import Delivery, State
from celery_sharding.worker.run.lanes import Lanes


@dataclass(frozen=True, slots=True)
class Gate:
    """What the messages of one segment wait for: unfinished keys, by digest, and by key the lanes of lost runs."""

    unfinished: frozenset[str]
    orphans: Mapping[str, Hashable]
    lanes: Lanes[Delivery]

    def is_open_for(self, delivery: Delivery) -> bool:
        """Say whether a message may start now."""
        if self.unfinished and key_digest(delivery.key) in self.unfinished:
            return False
        orphan = self.orphans.get(delivery.key)
        return orphan is None or not self.lanes.has(orphan)


def gate_for(segment: str, layout: Layout, group: str, lanes: Lanes[Delivery]) -> Gate | None:
    """Return what the messages of `segment` wait for; None: nothing."""
    unfinished = _unfinished_before(segment, layout)
    orphans = {
        delivery.key: delivery.lane
        for delivery in lanes.in_pool()
        if delivery.state is State.ORPHAN and delivery.place.group.name == group and delivery.place.segment != segment
    }
    return Gate(unfinished, orphans, lanes) if unfinished or orphans else None


def _unfinished_before(segment: str, layout: Layout) -> frozenset[str]:
    found: set[str] = set()
    for earlier in layout.segments:
        if earlier.name == segment:
            return frozenset(found)
        found.update(digest for _, digest in earlier.unfinished)
    return frozenset()
