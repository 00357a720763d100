"""Publishing several messages at once, confirmed and mandatory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import amqp
from amqp import exceptions as amqp_errors

from celery_sharding.errors import TopologyError

_PATIENCE_SECONDS = 30.0


class ConfirmedBatches:
    """Publishes batches on a channel that nobody else uses."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._tag = 0
        self._waiting: dict[int, int] = {}
        self._refused: set[int] = set()
        self._returned: set[tuple[str, str]] = set()
        channel.confirm_select()
        channel.events["basic_ack"].add(self._on_ack)
        channel.events["basic_nack"].add(self._on_nack)
        channel.events["basic_return"].add(self._on_return)

    def publish(self, batch: Sequence[tuple[amqp.Message, str, str]]) -> set[int]:
        """Publish messages, each to an exchange under a routing key, and return the positions of those not stored.

        Args:
            batch: No message that might be returned has the exchange and key of another.

        Raises:
            TopologyError: An exchange is gone, or it is unknown which were stored, since the broker did not answer.
        """
        self._refused.clear()
        self._returned.clear()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        try:
            for position, (message, exchange, key) in enumerate(batch):
                self._tag += 1
                self._waiting[self._tag] = position
                self._channel.basic_publish(message, exchange=exchange, routing_key=key, mandatory=True)
            while self._waiting:
                self._channel.connection.drain_events(timeout=max(0.001, deadline - time.monotonic()))
        except TimeoutError as exc:
            raise TopologyError(
                f"the broker did not confirm in {_PATIENCE_SECONDS:.0f} s; it is not known what it has stored of the "
                "last messages sent"
            ) from exc
        except amqp_errors.ChannelError as exc:
            raise TopologyError(f"the broker refused ({exc.reply_text}); run `celery shards declare`") from exc
        returned = {position for position, (_, *place) in enumerate(batch) if tuple(place) in self._returned}
        return self._refused | returned

    def _on_ack(self, tag: int, multiple: bool) -> None:
        self._take(tag, multiple)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._refused |= self._take(tag, multiple)

    def _on_return(self, error: Exception, exchange: str, key: str, message: Any) -> None:
        self._returned.add((exchange, key))  # the ack that follows it says nothing

    def _take(self, tag: int, multiple: bool) -> set[int]:
        tags = [known for known in self._waiting if known <= tag] if multiple else [tag]
        return {self._waiting.pop(known) for known in tags if known in self._waiting}
