"""Names and declarations: what a group looks like on the broker.

Owns every exchange and queue name of a group, and their arguments. Declares and looks; decides and routes nothing.
`layout` decides who may declare what, and when: the fixed part and rings are only declared under the group's lock,
after the manifest was read. Otherwise a slow process would bind a queue that the group has already left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from amqp import exceptions as amqp_errors

from celery_sharding.config import ShardGroup
from celery_sharding.rabbitmq.channels import Opener, brief_channel
from celery_sharding.rabbitmq.pipelining import Look, all_exist
from celery_sharding.rabbitmq.refusals import explained, is_out_of_reach

PREFIX = "shards."
RING_TYPE = "x-consistent-hash"
# Of each binding of a ring; equal for all.
RING_WEIGHT = "1"
# 4.x drops a message after 20 deliveries unless told otherwise. Workers count attempts, not the broker.
DELIVERY_LIMIT = 1_000_000
# A stream drops whole segments only, when a record begins the next one, and never the segment it writes to. So segments
# are small compared with what is kept (measured on 3.10 and 4.3: it keeps up to one segment more).
_SEGMENT_BYTES = 1_000_000
# The journal's vitals fill a megabyte in minutes.
_JOURNAL_SEGMENT_BYTES = 8_000_000
# Many times what comes between two snapshots of the layout (`retention`), which must never be dropped.
_MANIFEST_BYTES = 32_000_000


@dataclass(frozen=True, slots=True)
class Names:
    """The names of all that belongs to one group."""

    group: str

    @property
    def publish(self) -> str:
        """The only exchange that publishers know."""
        return f"{PREFIX}{self.group}"

    @property
    def next(self) -> str:
        """Takes what `publish` cannot route; bound only during a switch."""
        return f"{self.publish}.next"

    @property
    def unrouted(self) -> str:
        """Takes what `next` cannot route; bound to the current limbo."""
        return f"{self.publish}.unrouted"

    @property
    def manifest(self) -> str:
        return f"{self.publish}.manifest"

    @property
    def journal(self) -> str:
        return f"{self.publish}.journal"

    @property
    def attempts(self) -> str:
        return f"{self.publish}.attempts"

    @property
    def admin(self) -> str:
        """The exclusive queue whose owner holds the group's lock."""
        return f"{self.publish}.admin"

    @property
    def dead(self) -> str:
        return f"{self.publish}.dead"

    @property
    def dead_admin(self) -> str:
        """The exclusive queue whose owner may take dead letters."""
        return f"{self.dead}.admin"

    def ring(self, generation: int) -> str:
        return f"{self.publish}.g{generation:03d}"

    def shard(self, generation: int, index: int) -> str:
        return f"{self.ring(generation)}.{index:03d}"

    def limbo(self, number: int) -> str:
        return f"{self.publish}.limbo{number:03d}"


def fanouts(names: Names) -> tuple[tuple[str, str | None], ...]:
    """Return the durable fanout exchanges of a group, each with its alternate exchange, in the order of declaration."""
    return ((names.unrouted, None), (names.next, names.unrouted), (names.publish, names.next))


def fanout_arguments(alternate: str | None) -> dict[str, Any]:
    return {"alternate-exchange": alternate} if alternate else {}


def queue_arguments(group: ShardGroup) -> dict[str, Any]:
    """Return the arguments of the group's shard and limbo queues. They cannot be changed once a queue exists."""
    arguments: dict[str, Any] = {
        "x-queue-type": group.queue_type,
        "x-single-active-consumer": True,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": Names(group.name).dead,
    }
    if group.queue_type == "quorum":
        arguments |= {
            "x-delivery-limit": DELIVERY_LIMIT,
            "x-overflow": "reject-publish",
            "x-dead-letter-strategy": "at-least-once",
        }
    return arguments


def declare_logs(channel: Any, group: str) -> None:
    """Declare the manifest, the journal, the stream of attempts, and the queue of dead letters.

    These arguments can never change: a broker refuses to declare what exists with others.

    The attempts have a stream of their own because a worker that starts reads all of them before it judges a
    redelivered message. Among the journal's vitals, one per second and shard, that would take long.
    """
    names = Names(group)
    for stream, retention in (
        (names.manifest, {"x-max-length-bytes": _MANIFEST_BYTES, "x-stream-max-segment-size-bytes": _SEGMENT_BYTES}),
        (names.journal, {"x-max-age": "1D", "x-stream-max-segment-size-bytes": _JOURNAL_SEGMENT_BYTES}),
        (names.attempts, {"x-max-age": "7D", "x-stream-max-segment-size-bytes": _SEGMENT_BYTES}),
    ):
        _declare_queue(channel, group, stream, {"x-queue-type": "stream", **retention})
    _declare_queue(channel, group, names.dead, {"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT})


def declare_limbo(channel: Any, group: ShardGroup, number: int) -> None:
    """Declare a limbo queue; binding it is a step of a switch."""
    _declare_queue(channel, group.name, Names(group.name).limbo(number), queue_arguments(group))


def declare_fixed(channel: Any, group: ShardGroup, *, limbo: int) -> None:
    """Declare what publishers need, with limbo number `limbo` behind it; `shards.<group>` comes last.

    Only under the group's lock, while `shards.<group>` does not exist: nothing is published yet, so bindings may be
    repaired one after the other.

    Raises:
        TopologyMismatch: Something of that name exists with other arguments.
        TopologyError: The broker's user may not declare it.
    """
    names = Names(group.name)
    declare_logs(channel, group.name)
    declare_limbo(channel, group, limbo)
    (unrouted, alternate), *others = fanouts(names)
    _declare_fanout(channel, group.name, unrouted, alternate)
    with explained(group.name, names.unrouted):
        channel.queue_bind(names.limbo(limbo), names.unrouted, "")
        for other in (limbo - 1, limbo + 1):
            channel.queue_unbind(names.limbo(other), names.unrouted, "")
    for exchange, alternate in others:
        _declare_fanout(channel, group.name, exchange, alternate)


def declare_entrance(channel: Any, group: str) -> None:
    """Declare the exchange that publishers know; nothing is bound to it then."""
    _declare_fanout(channel, group, Names(group).publish, Names(group).next)


def declare_ring(channel: Any, group: ShardGroup, generation: int, shards: int) -> None:
    """Declare the queues of a generation and bind them to its ring, in ascending order, one after the other.

    Only before the generation takes messages: the order of the bindings is the ring, and a ring declared anew would
    send keys elsewhere.

    Raises:
        PluginMissing: The broker has no consistent-hash exchange.
        TopologyMismatch: A queue of that name exists with other arguments.
    """
    names = Names(group.name)
    arguments = queue_arguments(group)
    # Not durable on purpose: brokers on Mnesia rebuild a hash ring in random order at a restart, and keys would move
    # in silence. A transient exchange vanishes with its ring, so messages wait in limbo until a new ring is made.
    with explained(group.name, names.ring(generation)):
        channel.exchange_declare(names.ring(generation), RING_TYPE, durable=False, auto_delete=False)
    for index in range(shards):
        queue = names.shard(generation, index)
        _declare_queue(channel, group.name, queue, arguments)
        with explained(group.name, queue):
            channel.queue_bind(queue, names.ring(generation), RING_WEIGHT)


def check_fixed(connection: Opener, group: ShardGroup) -> None:
    """Raise `TopologyMismatch` if the group's existing exchanges have other arguments."""
    with brief_channel(connection) as channel:
        for exchange, alternate in fanouts(Names(group.name)):
            _declare_fanout(channel, group.name, exchange, alternate)


def check_queue(connection: Opener, group: ShardGroup, queue: str) -> None:
    """Raise `TopologyMismatch` if `queue`, an existing shard or limbo queue, has other arguments than the group's."""
    with brief_channel(connection) as channel:
        _declare_queue(channel, group.name, queue, queue_arguments(group))


def fixed_exists(connection: Opener, names: Names) -> bool:
    """Say whether publishers can publish: `shards.<group>` is declared last, so it proves the rest."""
    return all_exist(connection, Look(names.publish, "fanout"))


def ring_exists(connection: Opener, names: Names, generation: int) -> bool:
    """Say whether the broker still has the ring of `generation`."""
    return all_exist(connection, Look(names.ring(generation), RING_TYPE))


def missing_shards(connection: Opener, names: Names, generation: int, shards: int) -> list[int]:
    """Return the indexes of the generation's shard queues that do not exist."""
    missing: list[int] = []
    index = 0
    while index < shards:
        with brief_channel(connection) as channel:
            try:
                while index < shards:
                    channel.queue_declare(names.shard(generation, index), passive=True)
                    index += 1
            except amqp_errors.NotFound as exc:
                if not is_out_of_reach(exc):
                    missing.append(index)
                index += 1
    return missing


def _declare_queue(channel: Any, group: str, queue: str, arguments: dict[str, Any]) -> None:
    with explained(group, queue):
        channel.queue_declare(queue, durable=True, exclusive=False, auto_delete=False, arguments=arguments)


def _declare_fanout(channel: Any, group: str, exchange: str, alternate: str | None) -> None:
    with explained(group, exchange):
        channel.exchange_declare(
            exchange, "fanout", durable=True, auto_delete=False, arguments=fanout_arguments(alternate)
        )
