"""How a message leaves its lane: it is acknowledged, and then the lane goes on.

    done ──acknowledged, now or with others──▶ its process is gone, if it is being killed ──▶ left: the lane goes on

What is on record of a message that its publisher did not name is settled first, and acknowledged when that is
confirmed: the next message may be the same to the byte, and must not be taken for this one.

Called where lanes may be moved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from celery_sharding.celery_hooks.prefork import is_gone
from celery_sharding.journal.events import Settled
from celery_sharding.worker.log import Log
from celery_sharding.worker.ports import Clock, Source
from celery_sharding.worker.run.ack_batch import Acks
from celery_sharding.worker.run.delivery import GONE, Delivery, State
from celery_sharding.worker.run.lanes import Lanes
from celery_sharding.worker.run.waits import Waits

_POLL_SECONDS = 0.01


class ShardCloser(Protocol):
    """Gives up shards while the worker stops."""

    def give_up(self, shard: Any) -> None: ...


class Settling:
    """The ends of the messages of one worker.

    Attributes:
        acks: What gathers acknowledgements; None: each is told at once.
    """

    def __init__(self, lanes: Lanes[Delivery], waits: Waits, log: Log, clock: Clock, acks: Acks | None) -> None:
        self._lanes = lanes
        self._waits = waits
        self._log = log
        self._clock = clock
        self.acks = acks
        self._closer: ShardCloser | None = None

    def begin(self) -> None:
        """Begin with a new connection: what was gathered is the broker's again."""
        if self.acks is not None:
            self.acks.forget()

    def stop(self, closer: ShardCloser | None) -> None:
        """From now on tell everything at once, and give up each shard when the last of its runs has ended."""
        self._closer = closer
        acks, self.acks = self.acks, None
        if acks is not None:
            acks.tell_all()

    def settle(self, delivery: Delivery, *, killed_pid: int | None = None) -> None:
        """Acknowledge a message, and let its lane go on, if need be when the process that ran it has ended."""
        record = delivery.record
        if record is not None and record.is_known:
            event = Settled(delivery.message_id).as_dict()
            if not delivery.is_named:
                end = partial(self._end_unnamed, delivery, killed_pid)
                self._log.append(delivery.place.names.attempts, event, end)
                return
            delivery.shard.acknowledge(delivery, gather=False)
            self._log.append(delivery.place.names.attempts, event, optional=True)
        elif self.acks is None or delivery.state is State.NEW:
            delivery.shard.acknowledge(delivery, gather=False)
        else:
            delivery.shard.acknowledge(delivery, gather=True)
            self.acks.gather(delivery.lane, delivery.shard)
        if killed_pid is None:
            self.leave(delivery)
        else:
            self.call_when_gone(killed_pid, partial(self.leave, delivery))

    def leave(self, delivery: Delivery) -> None:
        """Let the lane of a message go on that is acknowledged, or the broker's again."""
        if delivery.state in GONE or delivery.state is State.NEW:
            return
        self._waits.forget(delivery)
        self._lanes.settle(delivery)
        if self._closer is not None:
            self.note_end(delivery.shard)

    def leave_orphan(self, delivery: Delivery) -> bool:
        """If a run's message is the broker's again, only unlock its lane; say whether that was so."""
        if delivery.state is not State.ORPHAN:
            return False
        self.leave(delivery)
        return True

    def note_end(self, shard: Source) -> None:
        """While the worker stops: see whether that was the last run of a shard."""
        if self._closer is not None and not self._lanes.running(shard):
            self._closer.give_up(shard)

    def call_when_gone(self, pid: int | None, call: Callable[[], None]) -> None:
        """Call when a process has ended; at once if there is none."""
        if pid is None or is_gone(pid):
            call()
        else:
            self._clock.call_after(_POLL_SECONDS, partial(self.call_when_gone, pid, call))

    def _end_unnamed(self, delivery: Delivery, killed_pid: int | None) -> None:
        delivery.shard.acknowledge(delivery, gather=False)
        self.call_when_gone(killed_pid, partial(self.leave, delivery))
