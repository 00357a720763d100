"""Batches of confirmed writes on a connection of their own, and what a failure of one means.

    waiting ──▶ sent ──▶ confirmed ──▶ `then` is posted
      ▲          │
      ├──────────┤ connection lost, nacked or returned: sent again (and may be stored twice), or dropped if optional
      │          └─▶ refused for good: set aside, and `refused` is posted; its neighbours go on
      └───────────── sent together with a refused one: sent again, one by one until that one is found

Refused for good is what cannot be encoded, what has headers that fit no frame of this connection, and what makes the
broker close the channel or the connection because of the message (too large, or malformed). The first two are found
before they are sent: the broker may answer a frame that is too large by a reset of the connection.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from functools import partial
from typing import Any

import amqp
from amqp.exceptions import AMQPError
from kombu.exceptions import OperationalError

from celery_sharding.celery_hooks.client import encode_properties
from celery_sharding.errors import LogError
from celery_sharding.rabbitmq.confirms import Confirms, Outcome
from celery_sharding.rabbitmq.connect import Broker, open_connection
from celery_sharding.worker.log import Poster, Refusal, Write

logger = logging.getLogger(__name__)

BATCH_WRITES_MAX = 500
CONFIRM_SECONDS = 10.0
# A slow broker must not be sent the same writes again and again, so each time-out doubles the next.
_CONFIRM_FIRST_SECONDS = 2.0
_OPTIONAL_SECONDS = 1.0
_PAUSE_SECONDS = 0.5
_LARGE_BYTES = 64 * 1_024
_LOST = (OSError, AMQPError, OperationalError, LogError)
# Replies that will be the same next time: content too large, precondition failed (the message is above
# `max_message_size`), frame error, syntax error, unexpected frame. Missing rights may be granted later.
_REPLIES_FOR_GOOD = frozenset({311, 406, 501, 502, 505})
# Of a frame, beside the properties: its own eight bytes and the twelve before them, and a message id that grows.
_FRAME_RESERVED_BYTES = 64


class BatchWriter:
    """Writes batches, used by one thread at a time."""

    def __init__(self, broker: Broker, calls: Poster) -> None:
        self._broker = broker
        self._calls = calls
        self._connection: Any = None
        self._confirms: Confirms[Write] | None = None
        self._was_nacked = False
        self._first_node = 0
        self._alone = 0  # writes to be sent one by one: one of them is refused for good
        self._told: set[tuple[str, str]] = set()
        self._answered_at = 0.0
        self._patience_seconds = _CONFIRM_FIRST_SECONDS

    def write_from(self, waiting: deque[Write]) -> None:
        """Write a batch from the head of `waiting`; put back what must be written again, and pause."""
        batch = self._take_batch(waiting)
        unsent, refused = deque(batch), list[Write]()
        pending: list[Write] = []
        is_answered = False
        try:
            confirms = self._ensure_connected()
            while unsent:
                self._send(confirms, unsent.popleft())
                refused += self._settle(confirms)
            self._await_confirms(confirms, refused)
            self._alone = max(0, self._alone - len(batch))
        except Exception as exc:
            if self._confirms is not None:
                refused += self._settle(self._confirms)
                pending = self._confirms.pending
            self.close()
            is_answered = self._look_into(exc, len(batch), pending)
        if self._was_nacked:
            # RabbitMQ 3.10 may go on refusing on a channel whose first publish fell into a leader's failover.
            self.close()
        again = [write for write in (*refused, *pending, *unsent) if not write.optional]
        if again:
            waiting.extendleft(reversed(again))
            if not is_answered:
                time.sleep(_PAUSE_SECONDS)

    def _take_batch(self, waiting: deque[Write]) -> list[Write]:
        """Take what is confirmed together; a large write goes alone, since the broker may refuse it."""
        most = 1 if self._alone else BATCH_WRITES_MAX
        batch: list[Write] = []
        while waiting and len(batch) < most:
            is_large = len(waiting[0].body) > _LARGE_BYTES
            if is_large and batch:
                break
            batch.append(waiting.popleft())
            if is_large:
                break
        return batch

    def _send(self, confirms: Confirms[Write], write: Write) -> None:
        """Publish one write, or set it aside if the broker is certain to refuse it."""
        message = amqp.Message(write.body, message_id=str(confirms.next_tag), delivery_mode=2, **write.properties)
        if not write.is_event:
            refusal = _find_refusal(message, frame_bytes_max=confirms.channel.connection.frame_max)
            if refusal is not None:
                self._set_aside(write, refusal)
                return
        confirms.publish(write, message, "", write.queue)

    def _settle(self, confirms: Confirms[Write]) -> list[Write]:
        """Post `then` of each confirmed write; return those that were nacked or returned."""
        refused = []
        for write, outcome in confirms.take_settled():
            self._answered_at = time.monotonic()
            if outcome is Outcome.CONFIRMED:
                if write.then is not None:
                    self._calls.post(write.then)
                continue
            refused.append(write)
            if outcome is Outcome.NACKED:
                self._was_nacked = True
            else:
                logger.error(
                    "the queue %r is gone; a worker that connects declares it again, or run `shards declare`",
                    write.queue,
                )
        return refused

    def _await_confirms(self, confirms: Confirms[Write], refused: list[Write]) -> None:
        """Wait until the batch is confirmed, and not long for optional writes, which must not delay the next batch.

        A queue without a leader may keep its confirms for as long as it has none, or lose them: then a run would wait
        for its record although a new channel could write it.
        """
        started = time.monotonic()
        while pending := confirms.pending:
            needed = [write for write in pending if not write.optional]
            patience = self._patience_seconds if needed else _OPTIONAL_SECONDS
            if not all(write.is_event for write in needed):
                patience = CONFIRM_SECONDS  # people read dead letters, and would find them twice
            try:
                confirms.read(max(started + patience, time.monotonic() + 0.001))
            except TimeoutError:
                if needed:
                    self._patience_seconds = min(2 * self._patience_seconds, CONFIRM_SECONDS)
                    raise
                if time.monotonic() - self._answered_at > CONFIRM_SECONDS:
                    raise
                return
            refused += self._settle(confirms)
        self._patience_seconds = _CONFIRM_FIRST_SECONDS

    def _look_into(self, exc: Exception, batch_size: int, pending: list[Write]) -> bool:
        """Decide what a failed batch means: the connection was lost, or one of it is refused for good.

        Returns:
            Whether the broker has refused something, and so is there.
        """
        is_for_good = isinstance(exc, AMQPError) and exc.code in _REPLIES_FOR_GOOD
        if is_for_good and len(pending) == 1:
            self._alone = max(0, self._alone - 1)
            self._set_aside(pending.pop(), Refusal(str(exc) or repr(exc)))
            return True
        if is_for_good and pending:
            logger.warning("the broker refused one of %d writes; sending them one by one: %s", len(pending), exc)
            self._alone = batch_size
            return True
        logger.warning(
            "writing to the shards' logs failed, trying again: %r; not confirmed: %s",
            exc,
            ", ".join(sorted({write.queue for write in pending})),
            exc_info=None if isinstance(exc, _LOST) else exc,
        )
        self._first_node += 1
        return False

    def _set_aside(self, write: Write, refusal: Refusal) -> None:
        """Report that a write can never be stored as it is."""
        if write.refused is not None:
            self._calls.post(partial(write.refused, refusal))
        elif (write.queue, refusal.why[:40]) not in self._told:
            self._told.add((write.queue, refusal.why[:40]))
            what = "an optional record" if write.optional else "a record"
            logger.error("%s: %s can never be stored and is left out: %s", write.queue, what, refusal.why)

    def _ensure_connected(self) -> Confirms[Write]:
        if self._confirms is not None and self._connection.connected:
            self._confirms.forget()
            return self._confirms
        self.close()
        self._connection = open_connection(
            self._broker.connect(), first_node=self._first_node, answer_seconds=CONFIRM_SECONDS
        )
        self._answered_at = time.monotonic()
        self._was_nacked = False
        self._confirms = Confirms(self._connection.channel())
        return self._confirms

    def close(self) -> None:
        """Close the connection; the next batch opens another."""
        connection, self._connection, self._confirms = self._connection, None, None
        if connection is not None:
            try:
                connection.collect(socket_timeout=1.0)
            except (OSError, AMQPError):
                logger.debug("closing the log connection failed", exc_info=True)


def _find_refusal(message: amqp.Message, *, frame_bytes_max: int) -> Refusal | None:
    """Return why a message cannot be sent on a connection, None if it can."""
    try:
        size_bytes = len(encode_properties(message))
    except Exception as exc:
        return Refusal(f"its headers cannot be encoded: {exc!r}")
    most = frame_bytes_max - _FRAME_RESERVED_BYTES
    if size_bytes <= most:
        return None
    return Refusal(
        f"its headers have {size_bytes:,} bytes, and a frame of this connection takes {most:,} (frame_max of the "
        "broker)",
        headers_bytes_max=most,
    )
