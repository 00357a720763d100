"""The balance of one group: this worker tells the others what it owns, hears what they own, and gives up its share.

The manifest says what is consumed; the journal tells who owns it, and `plan` who should. Once a second:

    tell      the worker writes its vitals: what it owns, and what it stands by for
    probe     it probes a queue that no worker reports as its own, so that the owner learns that it is
    balance   it offers, freezes and gives up queues as planned; and a queue of which it has held a message for long,
              before the broker closes its channel over that

When another worker offers a queue to a third, this one steps back in that queue's line of standbys.

None of it changes what is consumed: a queue that is given up (`handover`) is opened again as a standby. Ticks come from
Celery's timer, and the journal's messages from whoever reads the connection; what closes channels is called later,
where the connection may be read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from celery_sharding.journal import events
from celery_sharding.rabbitmq.streams import decode
from celery_sharding.topology import Names
from celery_sharding.worker.balance.handover import Handover
from celery_sharding.worker.balance.moves import Moves
from celery_sharding.worker.balance.plan import Member, View
from celery_sharding.worker.balance.vitals import describe_owned
from celery_sharding.worker.services import WorkerServices
from celery_sharding.worker.shard.shard import Shard

_OWNER_SILENT_SECONDS = 4.0


class _Hands:
    """Moves the shards of one group."""

    def __init__(self, names: Names, shards: Mapping[str, Shard], handover: Handover, services: WorkerServices) -> None:
        self._names = names
        self._shards = shards
        self._handover = handover
        self._services = services

    def offer(self, queue: str, target: str) -> None:
        event = events.Handover(queue, self._services.node, "offered", to=target)
        self._services.log.append(self._names.journal, event.as_dict(), optional=True)

    def freeze(self, queue: str) -> None:
        self._shards[queue].freeze()

    def thaw(self, queue: str) -> None:
        self._shards[queue].thaw()

    def is_idle(self, queue: str) -> bool:
        return self._services.executor.lanes.is_idle(self._shards[queue])

    def release(self, queue: str) -> None:
        self._handover.begin(self._shards[queue])


class Balancer:
    """The balancing of one group, in one of its workers.

    Args:
        shards: Queue → shard, of what the worker consumes at the moment.
        prefetch: How many messages a shard holds at most.
    """

    def __init__(
        self,
        names: Names,
        shards: Mapping[str, Shard],
        handover: Handover,
        services: WorkerServices,
        *,
        prefetch: int,
    ) -> None:
        self._names = names
        self._shards = shards
        self._handover = handover
        self._services = services
        self._prefetch = prefetch
        self._ticks = 0
        self._probed_at: dict[str, float] = {}
        self._view = View()
        self._moves = Moves(services.node, self._view, _Hands(names, shards, handover, services))

    @property
    def is_moving(self) -> bool:
        """Whether a shard is frozen, so that `balance` should come again soon."""
        return self._moves.is_freezing

    def tell(self, now: float, *, generation: int, stands_by: bool) -> None:
        """Write this worker's vitals, and probe what has no owner, once a second.

        Args:
            now: The wall clock.
            stands_by: The worker will take what it is given.
        """
        self._ticks += 1
        services, shards = self._services, list(self._shards.values())
        owned = describe_owned(
            shards, services.executor, node=services.node, now=now, tick=self._ticks, prefetch=self._prefetch
        )
        standby = [shard.queue for shard in shards if not shard.owned] if stands_by else []
        event = events.Vitals(services.node, generation, owned, standby, at=now)
        services.log.append(self._names.journal, event.as_dict(), optional=True)
        for shard in shards:
            if shard.owned or self._view.owner_of(shard.queue, time.monotonic()) is not None:
                continue
            if now - self._probed_at.get(shard.queue, 0.0) > _OWNER_SILENT_SECONDS:
                self.probe(shard, now)

    def probe(self, shard: Shard, now: float) -> None:
        """Let the owner of a shard learn that it is. `now` is the wall clock."""
        self._probed_at[shard.queue] = now
        shard.probe()

    def on_message(self, body: bytes, offset: int) -> None:
        """Take one message of the journal."""
        event = decode(body, stream=self._names.journal, offset=offset)
        if event is None:
            return
        node, vitals, offer = self._services.node, events.Vitals.parse(event), events.Handover.parse(event)
        if vitals is not None and vitals.by != node:
            member = Member(frozenset(vitals.owned), frozenset(vitals.standby))
            self._view.hear(vitals.by, member, time.monotonic())
            for queue in vitals.owned:
                shard = self._shards.get(queue)
                if shard is not None and not shard.held:
                    shard.owned = False
        elif offer is not None and offer.change == "offered" and node not in (offer.owner, offer.to):
            shard = self._shards.get(offer.queue)
            if shard is not None:
                self._services.calls.call_soon(partial(_step_back, shard))

    def balance(self, connection: Any) -> None:
        """Carry the plan out. Call it where the `connection` that the shards are consumed on may be read."""
        if not _takes_consumer_timeout(connection):
            self._recycle()
        staying = {queue: shard for queue, shard in self._shards.items() if shard not in self._handover}
        owned = frozenset(queue for queue, shard in staying.items() if shard.owned)
        self._moves.tick(Member(owned, frozenset(staying) - owned), time.monotonic())

    def forget(self) -> None:
        """Forget moves under way: the connection is gone, or the worker stops."""
        self._moves.forget()

    def _recycle(self) -> None:
        """Give back shards that hold a message for long, before the broker closes their channels over it."""
        due = time.time() - self._services.hold_seconds
        for queue, shard in self._shards.items():
            oldest = shard.held.oldest
            if oldest is not None and oldest.received_at < due and shard not in self._handover:
                self._moves.give_up(queue, time.monotonic())


def _step_back(shard: Shard) -> None:
    """Join the end of a shard's line of standbys, so that the worker it is offered to is next."""
    if not shard.owned:
        shard.depart()


def _takes_consumer_timeout(connection: Any) -> bool:
    """Say whether the broker lets a consumer choose its time-out, as RabbitMQ does since 3.12."""
    version = str(connection.connection.server_properties.get("version", "0")).split(".")
    return [int(part) if part.isdecimal() else 0 for part in version[:2]] >= [3, 12]
