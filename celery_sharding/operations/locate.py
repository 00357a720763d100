"""Which shard takes a key: asked of the broker, never computed, since the hash is the broker's.

A temporary ring is declared, with as many exclusive queues as the generation has shards, bound in the same order and
with the same weight. So it routes every key as the group's ring does. The keys are published to it, and the queue where
one arrives tells the shard. The queues are deleted with their consumers, and the ring with the last of them: nothing
stays behind, even if the process is killed.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import amqp

from celery_sharding import topology
from celery_sharding.errors import LogError
from celery_sharding.layout.events import RESHARD
from celery_sharding.layout.model import Layout, Segment
from celery_sharding.layout.switch import FLIPS
from celery_sharding.rabbitmq.channels import Opener, brief_channel
from celery_sharding.rabbitmq.refusals import explained
from celery_sharding.topology import RING_TYPE, RING_WEIGHT, Names

_WAIT_SECONDS = 30.0
_PREFETCH = 1_000


@dataclass(frozen=True, slots=True)
class Place:
    """Where a key is: a shard of one generation, and its queue."""

    generation: int
    index: int
    queue: str


@dataclass(frozen=True, slots=True)
class Located:
    """Where the messages of a key are, the older places first.

    Attributes:
        places: One for each generation that is not drained; the last is where new messages end up.
        takes: The generation that takes what is published now; None while a limbo does.
        waits_in: The limbo that takes what is published now; None if no limbo does.
    """

    key: str
    places: tuple[Place, ...]
    takes: int | None
    waits_in: str | None


def locate_keys(connection: Opener, names: Names, layout: Layout, keys: Sequence[str]) -> list[Located]:
    """Return where each of `keys` is, in their order.

    Args:
        connection: Connected, and used by nobody else meanwhile.
        layout: Of a group that has a generation.

    Raises:
        PluginMissing, TopologyError: The broker, or the user's permissions, do not allow it.
        LogError: The broker did not answer in time.
    """
    rings = [segment for segment in layout.segments if segment.kind == "ring" and not segment.is_drained]
    takes = _find_taking(layout, rings)
    if takes is not None and not topology.ring_exists(connection, names, takes.number):
        takes = None
    waits_in = names.limbo(layout.limbo) if takes is None else None
    indexes = {shards: _ask_ring(connection, names, shards, keys) for shards in {ring.shards for ring in rings}}
    return [
        Located(
            key,
            tuple(
                Place(ring.number, indexes[ring.shards][key], names.shard(ring.number, indexes[ring.shards][key]))
                for ring in rings
            ),
            None if takes is None else takes.number,
            waits_in,
        )
        for key in keys
    ]


def _find_taking(layout: Layout, rings: Sequence[Segment]) -> Segment | None:
    """Return the ring that takes what is published in `layout`, if it still exists; None: a limbo does."""
    switch = layout.switch
    if layout.cut_off or not rings:
        return None
    if switch is None or switch.step >= FLIPS.get(switch.kind, 0):
        return rings[-1]
    if switch.kind != RESHARD:
        return None
    return next((ring for ring in reversed(rings) if ring.number != switch.generation), None)


def _ask_ring(connection: Opener, names: Names, shards: int, keys: Sequence[str]) -> dict[str, int]:
    """Return the index of each key on a ring of `shards`."""
    ring = f"{names.publish}.locate.{uuid.uuid4().hex}"
    found: dict[str, int] = {}
    returned: list[Any] = []
    with brief_channel(connection) as channel, explained(names.group, ring):
        channel.events["basic_return"].add(lambda *facts: returned.append(facts))
        channel.basic_qos(0, _PREFETCH, False)
        # Without waiting for the answer to each: hundreds of shards would be as many round trips. The broker does
        # what comes on one channel in its order, so the ring is that of the group.
        channel.exchange_declare(ring, RING_TYPE, durable=False, auto_delete=True, nowait=True)
        for index in range(shards):
            queue = f"{ring}.{index:03d}"
            channel.queue_declare(queue, exclusive=True, auto_delete=True, durable=False, nowait=True)
            channel.queue_bind(queue, ring, RING_WEIGHT, nowait=True)
        channel.exchange_declare(ring, RING_TYPE, passive=True)
        for index in range(shards):
            channel.basic_consume(
                f"{ring}.{index:03d}",
                consumer_tag=str(index),
                no_ack=True,
                nowait=True,
                callback=lambda message, index=index: found.__setitem__(message.delivery_info["routing_key"], index),
            )
        for key in set(keys):
            channel.basic_publish(amqp.Message(b""), exchange=ring, routing_key=key, mandatory=True)
        deadline = time.monotonic() + _WAIT_SECONDS
        while len(found) < len(set(keys)):
            left = deadline - time.monotonic()
            if left <= 0 or returned:
                raise LogError(f"the broker did not say where the keys go (asked by {ring!r})", stream=ring)
            with contextlib.suppress(TimeoutError):
                channel.connection.drain_events(timeout=left)
    return found
