"""One shard in this worker: a queue, its channel and consumer, and what was delivered and not yet acknowledged.

    closed ──open──▶ standby ──first delivery──▶ owner ──close──▶ closed
    standby or owner ──cancelled by the broker──▶ lost: forgotten by its group, which opens it anew if it still exists

The broker makes one of the consumers of the queue its active one; this worker learns that it is the owner by being
delivered something. To learn it on an idle queue, workers put a probe into it, which whoever is active acknowledges.

The end of a segment: an end marker stands behind the last message that was routed here.

    marker seen ──all before it acknowledged──▶ sealing: a seal of this consumer's own is put into the queue
    sealing ──the seal comes back and nothing else is left──▶ drained: written to the manifest, confirmed,
                                                                       then marker and seal are acknowledged
    sealing ──something came in between──▶ marker seen: it is run first, then sealed anew

The seal that comes back proves that this consumer is still the owner and that nothing is left behind. Whoever loses the
queue before it acknowledges the marker leaves it to the next owner, who does the same again; the fact may be written
twice. A foreign seal is acknowledged and ignored.

Giving a shard up is freezing its lanes, letting what runs settle, and closing the channel, which returns all messages
in order and in one step; `basic.cancel` and requeue would let later ones overtake.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

from amqp.exceptions import AMQPError
from kombu.message import Message

from celery_sharding.config import ShardGroup
from celery_sharding.journal import handover_event
from celery_sharding.manifest import drained_event
from celery_sharding.topology import Names
from celery_sharding.worker.acks import fewest_acks
from celery_sharding.worker.delivery import Delivery

if TYPE_CHECKING:
    from celery_sharding.worker.attempts import Attempts
    from celery_sharding.worker.runs import Log, Runs

logger = logging.getLogger(__name__)

CONTROL_HEADER = "shard_control"
# py-amqp raises AttributeError on a channel whose connection it has already cleared.
CHANNEL_ERRORS = (OSError, AMQPError, AttributeError)
# What a shard asks of a broker that knows the argument (3.12 and newer): a lane may hold a message for a long time.
# Room for an end marker and its seal beside the messages.
_CONTROL_MESSAGES = 2
CONSUMER_TIMEOUT_MS = 24 * 3_600 * 1_000


class Shard:
    """A queue of a group as this worker consumes it.

    Args:
        index: The shard's index; for a limbo queue 0.
        receive: Takes each task message.
        on_cancel: Told that the broker has ended the consumer: the queue was deleted, or a run took too long.
        node: The worker's name, used as consumer tag.
    """

    def __init__(
        self,
        group: ShardGroup,
        segment: str,
        index: int,
        queue: str,
        *,
        runs: Runs,
        log: Log,
        attempts: Attempts,
        receive: Callable[[Delivery], None],
        on_cancel: Callable[[Shard], None],
        node: str,
    ) -> None:
        self.group = group
        self.names = Names(group.name)
        self.segment = segment
        self.index = index
        self.queue = queue
        self.attempts = attempts
        self.owned = False
        self.counters: Counter[str] = Counter()
        self._runs = runs
        self._log = log
        self._receive = receive
        self._on_cancel = on_cancel
        self._node = node
        self._channel: Any = None
        self._deliveries: dict[Any, Delivery] = {}
        self._done: list[Any] = []
        self._markers: list[Any] = []
        self._seal: str | None = None

    def __repr__(self) -> str:
        return f"<Shard {self.queue}>"

    @property
    def held(self) -> dict[Any, Delivery]:
        """Messages delivered and not acknowledged, by delivery tag, oldest first."""
        return self._deliveries

    def open(self, connection: Any, prefetch: int) -> None:
        """Start consuming, as owner or standby: the broker decides."""
        self._channel = channel = connection.channel()
        channel.basic_qos(0, prefetch + _CONTROL_MESSAGES, False)
        arguments = {"x-consumer-timeout": CONSUMER_TIMEOUT_MS}
        channel.basic_consume(
            self.queue,
            consumer_tag=self._node,
            callback=self._on_message,
            no_ack=False,
            arguments=arguments,
            on_cancel=lambda tag: self._on_cancel(self),
        )

    def probe(self) -> None:
        """Let the owner, who may be this worker, notice that it is."""
        self._log.put(self.queue, b"", optional=True, application_headers={CONTROL_HEADER: "probe", "by": self._node})

    def freeze(self) -> None:
        """Start nothing more; what runs goes on."""
        self._runs.lanes.freeze(self)

    def thaw(self) -> None:
        """Take a freeze back."""
        self._runs.lanes.thaw(self)

    def withdraw(self) -> None:
        """Before it is given up: take back what was announced and has not begun."""
        for delivery in self._deliveries.values():
            self._runs.withdraw(delivery)

    def close(self) -> None:
        """Give the shard up: what is not settled goes back to the broker, in order."""
        self.tell_done()
        channel, self._channel = self._channel, None
        if channel is not None:
            self._journal("released")
            self.freeze()
            with contextlib.suppress(*CHANNEL_ERRORS):
                channel.close()
        self.drop()

    def drop(self) -> None:
        """Forget what was delivered, after the channel was closed or lost."""
        self._channel = None
        self.owned = False
        self.withdraw()
        self._deliveries.clear()
        self._done.clear()
        self._markers.clear()
        self._seal = None
        self._runs.forget(self)

    def acknowledge(self, delivery: Delivery, *, gather: bool) -> None:
        """Acknowledge a message of this consumer; one of an earlier channel is the broker's again.

        Args:
            gather: Leave it to `tell_done`, which tells several at a time.
        """
        if self._deliveries.get(delivery.tag) is not delivery:
            return
        del self._deliveries[delivery.tag]
        if gather:
            self._done.append(delivery.tag)
        else:
            self._acknowledge_tag(delivery.tag)
        if self._markers:
            self.tell_done()
            self._end_if_idle()

    def tell_done(self) -> None:
        """Tell the broker what was gathered."""
        if not self._done:
            return
        done, self._done = self._done, []
        left = [*islice(self._deliveries, 1), *self._markers[:1]]
        for tag, multiple in fewest_acks(done, first_left=min(left, default=None)):
            self._acknowledge_tag(tag, multiple=multiple)

    def count(self, what: str) -> None:
        self.counters[what] += 1

    def _journal(self, change: str) -> None:
        if self.owned:
            event = handover_event(self.queue, owner=self._node, change=change)
            self._log.append(self.names.journal, event, optional=True)

    def _acknowledge_tag(self, tag: Any, *, multiple: bool = False) -> None:
        if self._channel is None:
            return
        try:
            self._channel.basic_ack(tag, multiple)
        except CHANNEL_ERRORS as exc:
            # What was not acknowledged the broker delivers again, here or elsewhere. The consumer notices the loss when
            # it reads; until then nothing more may start, since nothing could be acknowledged.
            logger.warning("an acknowledgement did not reach the broker: %r", exc)
            self.freeze()

    def _on_message(self, raw: Any) -> None:
        # py-amqp hands over its own message, kombu's virtual transports a kombu message.
        if self._channel is None:
            return  # it came while the channel was being closed, and is the broker's again
        message = raw if isinstance(raw, Message) else self._channel.message_to_python(raw)
        if not self.owned:
            self.owned = True
            self._journal("taken")
        control = (message.headers or {}).get(CONTROL_HEADER)
        if control is None:
            delivery = Delivery(message, self, self._runs)
            self._deliveries[delivery.tag] = delivery
            self._receive(delivery)
        elif control == "end" and not self._markers:
            self._markers.append(message.delivery_tag)
            self._end_if_idle()
        elif control == "seal" and message.headers.get("nonce") == self._seal:
            self._seal = None
            if self._deliveries:
                logger.warning(
                    "%s: %d messages came behind the end of %s", self.queue, len(self._deliveries), self.segment
                )
                self._acknowledge_tag(message.delivery_tag)
            else:
                self._markers.append(message.delivery_tag)
                self._write_drained()
        else:
            self._acknowledge_tag(message.delivery_tag)

    def _end_if_idle(self) -> None:
        if self._deliveries or self._seal is not None:
            return
        self._seal = uuid.uuid4().hex
        headers = {CONTROL_HEADER: "seal", "segment": self.segment, "nonce": self._seal}
        self._log.put(self.queue, b"", application_headers=headers)

    def _write_drained(self) -> None:
        channel = self._channel

        def written() -> None:
            if self._channel is channel:
                markers = self._markers.copy()
                self._markers.clear()
                for tag in markers:
                    self._acknowledge_tag(tag)

        self._log.append(
            self.names.manifest, drained_event(self.segment, self.queue, by=self._node, reason="idle"), written
        )
