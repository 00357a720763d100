"""The channel and the consumer of a shard."""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Protocol

from amqp.exceptions import AMQPError
from kombu.message import Message

from celery_sharding.celery_hooks.foreign import decoded_message, read_foreign
from celery_sharding.rabbitmq.connect import cleared_is_lost

logger = logging.getLogger(__name__)

_LOST = (OSError, AMQPError)
# Room for an end marker and its seal beside the messages.
_CONTROL_MESSAGES = 2
# What a shard asks of a broker that knows the argument (3.12 and newer): a lane may hold a message for a long time.
CONSUMER_TIMEOUT_MS = 24 * 3_600 * 1_000


class Consumer(Protocol):
    """Takes what comes over the channel."""

    def on_message(self, raw: Any) -> None: ...

    def on_cancel(self, tag: str) -> None:
        """The broker has ended the consumer: the queue was deleted, or a run took too long."""


class ShardChannel:
    """Consumes one queue over a channel of its own."""

    def __init__(self, queue: str) -> None:
        self._queue = queue
        self._channel: Any = None
        self._prefetch = 0

    @property
    def is_open(self) -> bool:
        return self._channel is not None

    def open(self, connection: Any, consumer: Consumer, *, prefetch: int, tag: str) -> None:
        """Start consuming, as owner or standby: the broker decides."""
        self._channel = channel = connection.channel()
        read_foreign(channel)
        self._prefetch = prefetch + _CONTROL_MESSAGES
        channel.basic_qos(0, self._prefetch, False)
        channel.basic_consume(
            self._queue,
            consumer_tag=tag,
            callback=consumer.on_message,
            no_ack=False,
            arguments={"x-consumer-timeout": CONSUMER_TIMEOUT_MS},
            on_cancel=consumer.on_cancel,
        )

    def decode(self, raw: Any) -> Message:
        """Return a message as kombu has it. py-amqp hands over its own, kombu's virtual transports a kombu message."""
        return raw if isinstance(raw, Message) else decoded_message(self._channel.message_to_python(raw))

    def acknowledge(self, tag: Any, *, multiple: bool = False) -> bool:
        """Acknowledge a message, without effect on a channel that was closed; False if the channel is lost."""
        if self._channel is None:
            return True
        try:
            with cleared_is_lost():
                self._channel.basic_ack(tag, multiple)
        except _LOST as exc:
            # What was not acknowledged the broker delivers again, here or elsewhere. The consumer notices the loss when
            # it reads.
            logger.warning("an acknowledgement did not reach the broker: %r", exc)
            return False
        return True

    def wait_for_broker(self) -> bool:
        """Wait until the broker has taken all acknowledgements; False if the channel is gone.

        Raises:
            TimeoutError: The broker did not answer in time.
        """
        if self._channel is None:
            return False
        try:
            # The broker takes what comes on a channel one after the other; any call that it answers would do.
            with cleared_is_lost():
                self._channel.basic_qos(0, self._prefetch, False)
        except TimeoutError:
            raise
        except _LOST as exc:
            logger.debug("%s: the channel is gone: %r", self._queue, exc)
            return False
        return self._channel is not None

    def close(self) -> None:
        """Return what is not acknowledged to the broker, in order."""
        channel, self._channel = self._channel, None
        if channel is not None:
            with contextlib.suppress(*_LOST), cleared_is_lost():
                channel.close()

    def forget(self) -> None:
        """The channel is gone."""
        self._channel = None
