"""Adopting generations and limbos that exist on the broker but not in the manifest.

Streams are not flushed to disk at once. So a power loss may take the last events of a manifest, and leave the queues
that they announced.
"""

from __future__ import annotations

from collections.abc import Sequence

from celery_sharding import topology
from celery_sharding.config import ShardGroup
from celery_sharding.layout.events import RECOVER, SwitchBegun
from celery_sharding.layout.manifest import write
from celery_sharding.layout.model import Layout
from celery_sharding.layout.switch import FLIPS, carry_on
from celery_sharding.rabbitmq.channels import Opener, brief_channel
from celery_sharding.rabbitmq.queues import existing_queues, queue_exists
from celery_sharding.rabbitmq.refusals import explained
from celery_sharding.topology import Names

# Each takes a channel of the connection, and brokers may allow few.
_LOOKS_AT_ONCE = 16


def adopt_unknown(connection: Opener, group: ShardGroup, layout: Layout, by: str, ahead: int) -> Layout:
    """Take generations and limbos into the chain that exist on the broker, but not in the manifest.

    Nobody knows how far that switch had come. So it counts as flipped, and unrouted messages go to a limbo that is
    certainly the last. Publishers may see errors for a moment, but no message is doubled.

    Args:
        ahead: How far beyond the manifest to look.
    """
    names = Names(group.name)
    while exists_beyond(connection, names, layout, ahead):
        generation = layout.generation + 1 + (first_existing(connection, _next_shards(names, layout, ahead)) or 0)
        there = _count_existing(connection, names, generation)
        for queue in (names.shard(generation, index) for index in range(there)):
            topology.check_queue(connection, group, queue)
        switch = SwitchBegun(
            RECOVER,
            generation,
            max(there, layout.shards or group.shards),
            layout.limbo,
            layout.limbo + 1,
            group.queue_type,
            step=FLIPS[RECOVER],
            adopted=True,
        )
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
    """Tell whether the broker holds a limbo or a generation that the manifest does not know."""
    limbos = [names.limbo(layout.limbo + number) for number in range(1, ahead + 1)]
    return any(
        first_existing(connection, queues) is not None for queues in (limbos, _next_shards(names, layout, ahead))
    )


def first_existing(connection: Opener, queues: Sequence[str]) -> int | None:
    """Return the position of the first of `queues` that exists."""
    for start in range(0, len(queues), _LOOKS_AT_ONCE):
        existing = existing_queues(connection, queues[start : start + _LOOKS_AT_ONCE])
        if existing:
            return queues.index(existing[0])
    return None


def _next_shards(names: Names, layout: Layout, ahead: int) -> list[str]:
    """Return the first queues of the generations after that of the layout."""
    return [names.shard(layout.generation + number, 0) for number in range(1, ahead + 1)]


def _count_existing(connection: Opener, names: Names, generation: int) -> int:
    count = 0
    while queue_exists(connection, names.shard(generation, count)):
        count += 1
    return count
