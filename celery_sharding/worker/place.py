"""Where a shard stands: one queue of one segment of a group."""

from __future__ import annotations

from celery_sharding.config import ShardGroup
from celery_sharding.topology import Names


class Place:
    """A queue of a group.

    Attributes:
        index: The shard's; for a limbo queue 0.
        label: Its name for people: `orders/3`.
    """

    __slots__ = ("group", "index", "label", "names", "queue", "segment")

    def __init__(self, group: ShardGroup, segment: str, index: int, queue: str) -> None:
        self.group = group
        self.names = Names(group.name)
        self.segment = segment
        self.index = index
        self.queue = queue
        self.label = f"{group.name}/{index}"
