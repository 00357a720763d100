"""One shard in this worker: it takes what its queue delivers, and acknowledges what is done.

    closed ──open──▶ standby ──first delivery──▶ owner ──close──▶ closed
    standby or owner ──cancelled by the broker──▶ lost: forgotten by its group, which opens it anew if it still exists

The broker picks the queue's active consumer, and a worker learns that it is the owner when something is delivered. To
learn it on an idle queue, workers put a probe into it, which the owner acknowledges.

To give a shard up, freeze its lanes, let what runs settle, and close the channel: that returns all messages in order,
in one step. After `basic.cancel` and a requeue, later ones could overtake.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

from celery_sharding.journal.events import Handover
from celery_sharding.layout.model import Segment
from celery_sharding.layout.protocol import is_known, protocol_of
from celery_sharding.wire import PROBE, control_headers, control_of
from celery_sharding.worker.place import Place
from celery_sharding.worker.redelivery.attempts import Attempts
from celery_sharding.worker.run.delivery import Delivery
from celery_sharding.worker.services import WorkerServices
from celery_sharding.worker.shard.channel import ShardChannel
from celery_sharding.worker.shard.held import Held
from celery_sharding.worker.shard.segment_end import SegmentEnd
from celery_sharding.worker.shard.segment_gate import Gate
from celery_sharding.worker.tally import Tally

logger = logging.getLogger(__name__)


class ShardHost(Protocol):
    """What a shard needs of its group."""

    @property
    def attempts(self) -> Attempts: ...

    def note_lost(self, shard: Shard) -> None:
        """The broker has ended the shard's consumer, or does not answer it."""

    def close_shard(self, shard: Shard) -> None:
        """Close a shard that this worker gives up; it is opened anew if it is still wanted."""

    def stand_by(self, protocol: int) -> None:
        """A control message asks for a protocol that is not known here. It is not acknowledged."""


class Shard:
    """A queue of a group as this worker consumes it.

    Attributes:
        owned: This worker is the owner, as far as it knows.
        held: What was delivered and is not acknowledged.
        tally: What it has counted since it became the owner.
        end: How far the end of its segment is.
        gate: What its messages wait for; None: nothing.
    """

    def __init__(self, place: Place, *, host: ShardHost, services: WorkerServices, gate: Gate | None = None) -> None:
        self.place = place
        self.owned = False
        self.held = Held()
        self.tally = Tally()
        self.end = SegmentEnd(place, services)
        self.gate = gate
        self._host = host
        self._services = services
        self._channel = ShardChannel(place.queue)
        self._caught_up = False

    def __repr__(self) -> str:
        return f"<Shard {self.queue}>"

    @property
    def queue(self) -> str:
        return self.place.queue

    @property
    def attempts(self) -> Attempts:
        return self._host.attempts

    def open(self, connection: Any, prefetch: int) -> None:
        """Start consuming, as owner or standby: the broker decides."""
        self._channel.open(connection, self, prefetch=prefetch, tag=self._services.node)

    def learn(self, segment: Segment | None, gate: Gate | None) -> None:
        """Take note of what the manifest says of its segment, and of those before it."""
        self.gate = gate
        self.end.learn(segment, self)

    def check_waiting(self) -> None:
        """Once a second: see whether what stands before the end of its segment has only waited."""
        self.end.check_waiting(self)

    def catch_up(self) -> bool:
        """Read what earlier owners have written of attempts; say whether all of it is known. Call it as the owner."""
        if not self._caught_up:
            self._caught_up = True
            self.attempts.catch_up()
        return self.attempts.is_complete

    def holds(self, delivery: Delivery) -> bool:
        """Say whether a message is neither acknowledged nor the broker's again."""
        return delivery in self.held

    def note_unnamed(self, message_id: str) -> bool:
        """Take note of a redelivered message that has no id of its own; say whether an equal one came before."""
        return self.held.note_unnamed(message_id)

    def probe(self) -> None:
        """Let the owner, who may be this worker, notice that it is."""
        headers = control_headers(PROBE, by=self._services.node)
        self._services.log.put(self.queue, b"", optional=True, application_headers=headers)

    def freeze(self) -> None:
        """Start nothing more; what runs goes on."""
        self._services.executor.lanes.freeze(self)

    def thaw(self) -> None:
        """Take a freeze back."""
        self._services.executor.lanes.thaw(self)

    def withdraw(self) -> None:
        """Before it is given up: take back what was announced and has not begun."""
        for delivery in self.held.to_list():
            self._services.executor.redeliveries.announcer.withdraw(delivery)

    def depart(self) -> None:
        """Have its group close it, and open it anew if it is still wanted."""
        self._host.close_shard(self)

    def close(self) -> None:
        """Give the shard up: what is not settled goes back to the broker, in order."""
        self.tell_done()
        if self._channel.is_open:
            self._note_handover("released")
            self.freeze()
            self._channel.close()
        self.drop()

    def drop(self) -> None:
        """Forget what was delivered, after the channel was closed or lost."""
        self._channel.forget()
        self.owned = False
        self.withdraw()
        self.held.clear()
        self.end.reset()
        self._services.executor.forget(self)

    def acknowledge(self, delivery: Delivery, *, gather: bool) -> None:
        """Acknowledge a message of this consumer; one of an earlier channel is the broker's again.

        Args:
            gather: Leave it to `tell_done`, which tells several at a time.
        """
        if not self.held.remove(delivery):
            return
        if gather:
            self.held.gather(delivery)
        else:
            self.acknowledge_tag(delivery.tag)
        if self.end.markers:
            self.tell_done()
            self.end.advance(self)

    def tell_done(self) -> None:
        """Tell the broker what was gathered."""
        for tag, multiple in self.held.take_done(unsettled=self.end.markers):
            self.acknowledge_tag(tag, multiple=multiple)

    @property
    def keys_left(self) -> set[str]:
        return self.held.keys

    def only_waits(self) -> bool:
        return self._services.executor.lanes.only_waits(self)

    def confirm_acknowledged(self) -> bool:
        """Wait until the broker has taken all acknowledgements; False if the channel is gone."""
        self.tell_done()
        try:
            return self._channel.wait_for_broker()
        except TimeoutError:
            # Nobody else would notice: without the fact that was to be written, the segment would never end.
            logger.warning("%s: the broker did not answer in time; it is consumed anew", self.queue)
            self._host.note_lost(self)
            return False

    def acknowledge_tag(self, tag: Any, *, multiple: bool = False) -> None:
        if not self._channel.acknowledge(tag, multiple=multiple):
            # Until the loss is noticed nothing more may start, since nothing could be acknowledged.
            self.freeze()

    def on_cancel(self, tag: str) -> None:
        """The broker has ended the consumer."""
        self._host.note_lost(self)

    def on_message(self, raw: Any) -> None:
        """Take what the broker delivers."""
        if not self._channel.is_open:
            return  # it came while the channel was being closed, and is the broker's again
        message = self._channel.decode(raw)
        if not self.owned:
            self.owned = True
            self.tally.restart()
            self._note_handover("taken")
        headers = message.headers or {}
        control = control_of(headers)
        if control is not None:
            protocol = protocol_of(headers)
            if is_known(protocol):
                self.end.on_control(control, message, self)
            else:
                self._host.stand_by(protocol)
            return
        delivery = Delivery(message, self, raw=raw)
        self.held.add(delivery)
        self.tally.newest_sent_at = delivery.sent_at
        self.tally.count("delivered")
        self._services.receiver.receive(delivery)

    def _note_handover(self, change: str) -> None:
        if self.owned:
            counted = self.tally.to_counted(with_times=True) if change == "released" else None
            event = Handover(self.queue, self._services.node, change, counted=counted)
            self._services.log.append(self.place.names.journal, event.as_dict(), optional=True)
