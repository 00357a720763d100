"""What may start while several segments of a group are open.

The keys of a segment's messages must wait for what is left of them in earlier segments: for unfinished keys, as the
manifest knows them, and for a run in this process whose connection was lost, which nobody else can wait for.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from celery_sharding.keys import key_digest
from celery_sharding.layout.model import Layout
from celery_sharding.worker.run.delivery import Delivery
from celery_sharding.worker.run.lanes import Entry, Lanes, State


@dataclass(frozen=True, slots=True)
class Gate:
    """What the messages of one segment wait for: unfinished keys, by digest, and by key the lanes of lost runs."""

    unfinished: frozenset[str]
    orphans: Mapping[str, Hashable]
    lanes: Lanes

    def is_open_for(self, delivery: Delivery) -> bool:
        """Say whether a message may start now."""
        if self.unfinished and key_digest(delivery.key) in self.unfinished:
            return False
        orphan = self.orphans.get(delivery.key)
        return orphan is None or not self.lanes.has(orphan)


def gate_for(segment: str, layout: Layout, group: str, lanes: Lanes) -> Gate | None:
    """Return what the messages of `segment` wait for; None: nothing."""
    unfinished = _unfinished_before(segment, layout)
    orphans = {
        delivery.key: entry.lane
        for entry, delivery in _runs_of(group, lanes.in_pool())
        if entry.state is State.ORPHAN and delivery.shard.segment != segment
    }
    return Gate(unfinished, orphans, lanes) if unfinished or orphans else None


def may_start(entry: Entry) -> bool:
    """Say whether the gate of its shard lets an entry start now."""
    gate: Gate | None = entry.source.gate  # type: ignore[attr-defined]
    return gate is None or gate.is_open_for(entry.item.delivery)


def _unfinished_before(segment: str, layout: Layout) -> frozenset[str]:
    found: set[str] = set()
    for earlier in layout.segments:
        if earlier.name == segment:
            return frozenset(found)
        found.update(digest for _, digest in earlier.unfinished)
    return frozenset()


def _runs_of(group: str, entries: Iterable[Entry]) -> Iterable[tuple[Entry, Delivery]]:
    for entry in entries:
        delivery: Delivery = entry.item.delivery
        if delivery.shard.group.name == group:
            yield entry, delivery
