"""Where a shard stands: one queue of one segment of a group."""

from __future__ import annotations

from dataclasses import dataclass

from celery_sharding.config import ShardGroup
from celery_sharding.topology import Names


@dataclass(frozen=True, slots=True)
class Place:
    """A queue of a group. `index` is the shard's; for a limbo queue 0."""

    group: ShardGroup
    segment: str
    index: int
    queue: str

    @property
    def names(self) -> Names:
        return Names(self.group.name)

    @property
    def label(self) -> str:
        """Its name for people: `orders/3`."""
        return f"{self.group.name}/{self.index}"
