"""One shard in this worker: a queue, its channel and consumer, and what was delivered and not yet acknowledged.

    closed ──open──▶ standby ──first delivery──▶ owner ──close──▶ closed
    standby or owner ──cancelled by the broker──▶ lost: forgotten by its group, which opens it anew if it still exists

The broker makes one of the consumers of the queue its active one; this worker learns that it is the owner by being
delivered something. To learn it on an idle queue, workers put a probe into it, which whoever is active acknowledges.

Giving a shard up is freezing its lanes, letting what runs settle, and closing the channel, which returns all messages
in order and in one step; `basic.cancel` and requeue would let later ones overtake.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

from amqp.exceptions import AMQPError
from kombu.message import Message

from celery_sharding.config import ShardGroup
from celery_sharding.journal.events import Counted, Handover
from celery_sharding.journal.histogram import Histogram
from celery_sharding.layout.protocol import is_known, protocol_of
from celery_sharding.rabbitmq.connect import cleared_is_lost
from celery_sharding.rabbitmq.foreign import decoded_message, read_foreign
from celery_sharding.topology import Names
from celery_sharding.wire import CONTROL_HEADER
from celery_sharding.worker.run.ack_batch import fewest_acks
from celery_sharding.worker.run.delivery import Delivery
from celery_sharding.worker.shard.segment_end import Ending
from celery_sharding.worker.shard.segment_gate import Gate

if TYPE_CHECKING:
    from celery_sharding.worker.executor import Runs
    from celery_sharding.worker.log import Log
    from celery_sharding.worker.redelivery.attempts import Attempts

logger = logging.getLogger(__name__)

CHANNEL_ERRORS = (OSError, AMQPError)
# Room for an end marker and its seal beside the messages.
_CONTROL_MESSAGES = 2
# What a shard asks of a broker that knows the argument (3.12 and newer): a lane may hold a message for a long time.
CONSUMER_TIMEOUT_MS = 24 * 3_600 * 1_000


class Shard:
    """A queue of a group as this worker consumes it.

    Args:
        index: The shard's index; for a limbo queue 0.
        receive: Takes each task message.
        on_protocol: Told of a control message that asks for a protocol which is not known here. It is not acknowledged.
        call_soon: Calls a function where the channel may be read.
        on_cancel: Told that the broker has ended the consumer: the queue was deleted, or a run took too long.
        node: The worker's name, used as consumer tag.

    Attributes:
        newest_sent_at: When the newest message that it was delivered was published, in seconds since the epoch.
        gate: Says whether a message may start; None: all may.
        ending: How far the end of its segment is.
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
        on_protocol: Callable[[int], None],
        call_soon: Callable[[Callable[[], None]], Any],
        node: str,
    ) -> None:
        self.group = group
        self.names = Names(group.name)
        self.segment = segment
        self.index = index
        self.queue = queue
        self.attempts = attempts
        self.owned = False
        self._begin_counting()
        self.newest_sent_at: float | None = None
        self._runs = runs
        self._log = log
        self._receive = receive
        self._on_cancel = on_cancel
        self._on_protocol = on_protocol
        self._node = node
        self._channel: Any = None
        self._deliveries: dict[Any, Delivery] = {}
        self._done: list[Any] = []
        self._unnamed: set[str] = set()
        self._prefetch = 0
        self._caught_up = False
        self.gate: Gate | None = None
        self.ending = Ending(self, log=log, node=node, call_soon=call_soon)

    def __repr__(self) -> str:
        return f"<Shard {self.queue}>"

    @property
    def held(self) -> dict[Any, Delivery]:
        """Messages delivered and not acknowledged, by delivery tag, oldest first."""
        return self._deliveries

    def open(self, connection: Any, prefetch: int) -> None:
        """Start consuming, as owner or standby: the broker decides."""
        self._channel = channel = connection.channel()
        read_foreign(channel)
        self._prefetch = prefetch + _CONTROL_MESSAGES
        channel.basic_qos(0, self._prefetch, False)
        arguments = {"x-consumer-timeout": CONSUMER_TIMEOUT_MS}
        channel.basic_consume(
            self.queue,
            consumer_tag=self._node,
            callback=self._on_message,
            no_ack=False,
            arguments=arguments,
            on_cancel=lambda tag: self._on_cancel(self),
        )

    def knows_attempts(self) -> bool:
        """Say whether everything is known that earlier owners have written of attempts; ask only as the owner."""
        if not self._caught_up:
            self._caught_up = True
            self.attempts.catch_up()
        return self.attempts.is_complete

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
        # A copy: runs of a thread pool end meanwhile.
        for delivery in list(self._deliveries.values()):
            self._runs.announcements.withdraw(delivery)

    def close(self) -> None:
        """Give the shard up: what is not settled goes back to the broker, in order."""
        self.tell_done()
        channel, self._channel = self._channel, None
        if channel is not None:
            self._journal("released")
            self.freeze()
            with contextlib.suppress(*CHANNEL_ERRORS), cleared_is_lost():
                channel.close()
        self.drop()

    def drop(self) -> None:
        """Forget what was delivered, after the channel was closed or lost."""
        self._channel = None
        self.owned = False
        self.withdraw()
        self._deliveries.clear()
        self._done.clear()
        self._unnamed.clear()
        self.ending.reset()
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
            self.acknowledge_tag(delivery.tag)
        if self.ending.markers:
            self.tell_done()
            self.ending.look()

    def tell_done(self) -> None:
        """Tell the broker what was gathered."""
        if not self._done:
            return
        done, self._done = self._done, []
        left = [*islice(self._deliveries, 1), *self.ending.markers[:1]]
        for tag, multiple in fewest_acks(done, first_left=min(left, default=None)):
            self.acknowledge_tag(tag, multiple=multiple)

    @property
    def keys_left(self) -> set[str]:
        return {delivery.key for delivery in list(self._deliveries.values())}

    def only_waits(self) -> bool:
        return self._runs.lanes.only_waits(self)

    def confirm_acknowledged(self) -> bool:
        """Wait until the broker has taken all acknowledgements; False if the channel is gone."""
        self.tell_done()
        if self._channel is None:
            return False
        try:
            # The broker takes what comes on a channel one after the other; any call that it answers would do.
            with cleared_is_lost():
                self._channel.basic_qos(0, self._prefetch, False)
        except TimeoutError:
            # Nobody else would notice: without the fact that was to be written, the segment would never end.
            logger.warning("%s: the broker did not answer in time; it is consumed anew", self.queue)
            self._on_cancel(self)
            return False
        except CHANNEL_ERRORS as exc:
            logger.debug("%s: the channel is gone: %r", self.queue, exc)
            return False
        return self._channel is not None

    def saw_before(self, message_id: str) -> bool:
        """Say whether a message of this id, which is no name, was redelivered here before, and keep it in mind."""
        seen = message_id in self._unnamed
        self._unnamed.add(message_id)
        return seen

    def count(self, what: str) -> None:
        self._counters[what] += 1

    def note_wait(self, seconds: float) -> None:
        """A message runs for the first time, so long after it was published."""
        self._waits.note(seconds)

    def note_run(self, seconds: float) -> None:
        """A run has ended that took so long."""
        self._runs_took.note(seconds)

    def counted(self, *, with_times: bool) -> Counted:
        """Return what was counted since it became the owner: waits and runs, too, if asked for."""
        waits, runs = (self._waits.to_list(), self._runs_took.to_list()) if with_times else ((), ())
        return Counted(self._taken_at, dict(self._counters), waits, runs)

    def _begin_counting(self) -> None:
        self._taken_at = time.time()
        self._counters: Counter[str] = Counter()
        self._waits = Histogram()
        self._runs_took = Histogram()

    def _journal(self, change: str) -> None:
        if self.owned:
            counted = self.counted(with_times=True) if change == "released" else None
            event = Handover(self.queue, self._node, change, counted=counted)
            self._log.append(self.names.journal, event.as_dict(), optional=True)

    def acknowledge_tag(self, tag: Any, *, multiple: bool = False) -> None:
        if self._channel is None:
            return
        try:
            with cleared_is_lost():
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
        message = raw if isinstance(raw, Message) else decoded_message(self._channel.message_to_python(raw))
        if not self.owned:
            self.owned = True
            self._begin_counting()
            self._journal("taken")
        headers = message.headers or {}
        control = headers.get(CONTROL_HEADER)
        if isinstance(control, str) and "task" not in headers:
            protocol = protocol_of(headers)
            if is_known(protocol):
                self.ending.on_control(control, message)
            else:
                self._on_protocol(protocol)
            return
        delivery = Delivery(message, self, self._runs, raw=raw)
        self._deliveries[delivery.tag] = delivery
        self.newest_sent_at = delivery.sent_at
        self.count("delivered")
        self._receive(delivery)
