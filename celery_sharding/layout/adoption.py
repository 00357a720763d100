"""Taking in what the broker holds and the manifest has forgotten: generations and limbos that a power loss left behind.

Streams are not flushed to disk at once, so the last events of a manifest may be lost, though the queues they announced
are there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from celery_sharding import topology
from celery_sharding.config import ShardGroup
from celery_sharding.layout.manifest import write
from celery_sharding.layout.model import Layout
from celery_sharding.layout.switch import FLIPS, RECOVER, carry_on
from celery_sharding.rabbitmq.channels import Opener, brief_channel
from celery_sharding.rabbitmq.queues import existing_queues, queue_exists
from celery_sharding.rabbitmq.refusals import explained
from celery_sharding.topology import Names

# Each takes a channel of the connection, and brokers may allow few.
_LOOKS_AT_ONCE = 16


def adopt_unknown(connection: Opener, group: ShardGroup, layout: Layout, by: str, ahead: int) -> Layout:
    """Take generations and limbos into the chain that exist on the broker, but not in the manifest.

    How far that switch had come is unknown, so it counts as flipped, and what is not routed goes to a limbo that is
    certainly the last. Publishers may get a moment of errors, but nothing is doubled.

    Args:
        ahead: How far beyond the manifest to look.
    """
    names = Names(group.name)
    while exists_beyond(connection, names, layout, ahead):
        found = first_existing(connection, partial(names.shard, index=0), layout.generation + 1, ahead)
        generation = found or layout.generation + 1
        there = _count_existing(connection, names, generation)
        for queue in (names.shard(generation, index) for index in range(there)):
            topology.check_queue(connection, group, queue)
        switch = {
            "event": "switch",
            "kind": RECOVER,
            "generation": generation,
            "shards": max(there, layout.shards or group.shards),
            "limbo": layout.limbo,
            "next_limbo": layout.limbo + 1,
            "queue_type": group.queue_type,
            "step": FLIPS[RECOVER],
            "adopted": True,
        }
        rings = [segment.number for segment in layout.segments if segment.kind == "ring"]
        layout = write(connection, names, layout, switch, by=by)
        with brief_channel(connection) as channel, explained(group.name, names.unrouted):
            topology.declare_limbo(channel, group, layout.limbo - 1)
            topology.declare_limbo(channel, group, layout.limbo)
            channel.queue_unbind(names.limbo(layout.limbo - 1), names.unrouted, "")
            channel.queue_bind(names.limbo(layout.limbo), names.unrouted, "")
            for ring in rings:
                channel.exchange_unbind(names.ring(ring), names.publish, "")
        layout = carry_on(connection, group, layout, by=by)
    return layout


def exists_beyond(connection: Opener, names: Names, layout: Layout, ahead: int = 1) -> bool:
    """Say whether the broker holds a limbo or a generation that the manifest does not know."""
    first_shard = partial(names.shard, index=0)
    return (
        first_existing(connection, names.limbo, layout.limbo + 1, ahead) is not None
        or first_existing(connection, first_shard, layout.generation + 1, ahead) is not None
    )


def first_existing(connection: Opener, name: Callable[[int], str], start: int, ahead: int) -> int | None:
    """Return the first of `ahead` numbers from `start` on of which the queue that `name` gives exists."""
    for first in range(start, start + ahead, _LOOKS_AT_ONCE):
        numbers = range(first, min(first + _LOOKS_AT_ONCE, start + ahead))
        existing = existing_queues(connection, [name(number) for number in numbers])
        if existing:
            return next(number for number in numbers if name(number) == existing[0])
    return None


def _count_existing(connection: Opener, names: Names, generation: int) -> int:
    count = 0
    while queue_exists(connection, names.shard(generation, count)):
        count += 1
    return count
