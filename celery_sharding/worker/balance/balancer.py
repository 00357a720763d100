"""Who owns the queues of one group: what this worker tells of its own, hears of the others', and does about it.

`group` follows the manifest, which says what is consumed; this follows the journal, from which `ownership` plans who
should. Once a second, of what the worker consumes:

    tell      the vitals of its shards are written: what it owns, and what it stands by for
    probe     a queue that nobody says he owns is probed, so that its owner notices that it is
    balance   queues are offered, frozen and given up, as planned; and one of which a message was held for long, before
              the broker closes its channel over it

A queue that another worker offers to a third makes this one step back in its line of standbys.

None of it changes what is consumed: what is given up goes by `departures`, and is opened again as a standby. Ticks and
messages of the journal come from Celery's timer and from whoever reads the connection; what closes channels waits until
it may be read (`calls`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery_sharding.journal.events import Handover, Vitals
from celery_sharding.rabbitmq.streams import decode
from celery_sharding.topology import Names
from celery_sharding.worker.balance.handover import Departures
from celery_sharding.worker.balance.plan import Balancer, Member
from celery_sharding.worker.balance.vitals import describe_owned
from celery_sharding.worker.calls import Calls
from celery_sharding.worker.log import Log
from celery_sharding.worker.run.lanes import Lanes
from celery_sharding.worker.run.waits import Waits

if TYPE_CHECKING:
    from celery_sharding.worker.shard.shard import Shard

_OWNER_SILENT_SECONDS = 4.0
_FREEZE_POLL_SECONDS = 0.05


class Balancing:
    """The balancing of one group, in one of its workers.

    Args:
        shards: Queue → shard, of what the worker consumes at the moment.
        hold_seconds: How long a message may be held where the broker alone sets the time-out of consumers.
        prefetch: How many messages a shard holds at most.
        connection: Returns what the shards are consumed on; None while nothing may be given up.
        step_back: Leaves the line of a queue's standbys and joins its end; called where the connection may be read.
    """

    def __init__(
        self,
        names: Names,
        shards: dict[str, Shard],
        departures: Departures,
        *,
        lanes: Lanes,
        waits: Waits,
        log: Log,
        calls: Calls,
        node: str,
        hold_seconds: float,
        prefetch: int,
        connection: Callable[[], Any],
        step_back: Callable[[str], None],
    ) -> None:
        self._names = names
        self._shards = shards
        self._departures = departures
        self._lanes = lanes
        self._waits = waits
        self._log = log
        self._calls = calls
        self._node = node
        self._hold_seconds = hold_seconds
        self._prefetch = prefetch
        self._connection = connection
        self._step_back = step_back
        self._ticks = 0
        self._probed_at: dict[str, float] = {}
        self._balancer = Balancer(
            node,
            offer=self._offer,
            freeze=lambda queue: shards[queue].freeze(),
            thaw=lambda queue: shards[queue].thaw(),
            is_idle=lambda queue: lanes.is_idle(shards[queue]),
            release=lambda queue: departures.begin(shards[queue]),
        )

    def tick(self, now: float, *, generation: int, stands_by: bool) -> None:
        """Tell, probe, and balance soon, once a second.

        Args:
            now: The wall clock.
            stands_by: The worker will take what it is given.
        """
        self._tell(now, generation=generation, stands_by=stands_by)
        for queue, shard in list(self._shards.items()):
            if shard.owned or self._balancer.owner_of(queue, time.monotonic()) is not None:
                continue
            if now - self._probed_at.get(queue, 0.0) > _OWNER_SILENT_SECONDS:
                self.probe(shard, now)
        self._calls.call_soon(self._balance)

    def probe(self, shard: Shard, now: float) -> None:
        """Let the owner of a shard notice that it is. `now` is the wall clock."""
        self._probed_at[shard.queue] = now
        shard.probe()

    def on_message(self, body: bytes, offset: int) -> None:
        """Take one message of the journal."""
        event = decode(body, stream=self._names.journal, offset=offset)
        if event is None:
            return
        vitals, handover = Vitals.parse(event), Handover.parse(event)
        if vitals is not None and vitals.by != self._node:
            member = Member(frozenset(vitals.owned), frozenset(vitals.standby))
            self._balancer.hear(vitals.by, member, time.monotonic())
            for queue in vitals.owned:
                shard = self._shards.get(queue)
                if shard is not None and not shard.held:
                    shard.owned = False
        elif handover is not None and handover.change == "offered" and self._node not in (handover.owner, handover.to):
            self._calls.call_soon(lambda: self._step_back(handover.queue))

    def reset(self) -> None:
        """Forget what is being given up: the connection is gone, or the worker stops."""
        self._balancer.reset()

    def _tell(self, now: float, *, generation: int, stands_by: bool) -> None:
        self._ticks += 1
        shards = list(self._shards.values())
        owned = describe_owned(
            shards, self._lanes, self._waits, node=self._node, now=now, tick=self._ticks, prefetch=self._prefetch
        )
        standby = [shard.queue for shard in shards if not shard.owned] if stands_by else []
        event = Vitals(self._node, generation, owned, standby, at=now)
        self._log.append(self._names.journal, event.as_dict(), optional=True)

    def _balance(self) -> None:
        connection = self._connection()
        if connection is None:
            return
        if not _takes_consumer_timeout(connection):
            self._recycle()
        staying = {queue: shard for queue, shard in self._shards.items() if shard not in self._departures}
        owned = frozenset(queue for queue, shard in staying.items() if shard.owned)
        self._balancer.tick(Member(owned, frozenset(staying) - owned), time.monotonic())
        if self._balancer.is_freezing:
            self._calls.call_after(_FREEZE_POLL_SECONDS, lambda: self._calls.call_soon(self._balance))

    def _recycle(self) -> None:
        """Give back shards that hold a message for long, before the broker closes their channels over it."""
        due = time.time() - self._hold_seconds
        for queue, shard in self._shards.items():
            oldest = next(iter(shard.held.values()), None)
            if oldest is not None and oldest.received_at < due and shard not in self._departures:
                self._balancer.give_up(queue, time.monotonic())

    def _offer(self, queue: str, target: str) -> None:
        event = Handover(queue, self._node, "offered", to=target)
        self._log.append(self._names.journal, event.as_dict(), optional=True)


def _takes_consumer_timeout(connection: Any) -> bool:
    """Say whether the broker lets a consumer choose its time-out, as RabbitMQ does since 3.12."""
    version = str(connection.connection.server_properties.get("version", "0")).split(".")
    return [int(part) if part.isdecimal() else 0 for part in version[:2]] >= [3, 12]
