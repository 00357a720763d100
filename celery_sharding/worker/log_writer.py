"""Confirmed writes of a worker to its groups' logs and queues, beside the event loop.

A worker writes attempts, drained facts, vitals, seals and dead letters. It must not publish from inside a message
handler: py-amqp reads the socket before it writes, so another message would be handled in the middle of the first. So
one thread with a connection of its own publishes what it is given, in order and in batches, and reports each confirm
through `post`, which runs the callback where lanes may be moved.

    queued ──▶ sent ──▶ confirmed ──▶ its callback is posted
      ▲          │
      ├──────────┤ connection lost, nacked or returned: sent again (these writes may come twice), or dropped if optional
      │          └─▶ refused for good: set aside, and who gave it is told; its neighbours go on
      └───────────── sent together with what was refused: sent again, one by one until that is found

Refused for good is what cannot be encoded, headers that fit no frame of this connection, and what makes the broker
close the channel or the connection with an error about the message (too large, or malformed). The first two are found
before they are sent, since what answers a frame that is too large may be a connection that is reset.

A pool that runs tasks in the main thread has no loop that another thread could wake: there `inline` publishes at once,
in the caller, under a lock. What is optional there does not make the caller wait for each: it goes along with the next
write that must be confirmed, or with the first a fifth of a second later, such as the vitals.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import amqp
from amqp.exceptions import AMQPError
from kombu import Connection
from kombu.exceptions import OperationalError

from celery_sharding.errors import LogError
from celery_sharding.rabbitmq.connect import open_connection
from celery_sharding.worker.log import Log, Poster, Refusal, Write

logger = logging.getLogger(__name__)

# A broker that is only slow must not be sent the same again and again, so each time-out doubles the next.
_CONFIRM_FIRST_SECONDS, _CONFIRM_SECONDS = 2.0, 10.0
_OPTIONAL_SECONDS = 1.0
_PAUSE_SECONDS = 0.5
_BATCH = 500
_LARGE_BYTES = 64 * 1_024
_OPTIONAL_WAIT_SECONDS = 0.2
_LOST = (OSError, AMQPError, OperationalError, LogError)
# Replies of the broker that will be the same next time: content too large, precondition failed (the message is above
# `max_message_size`), frame error, syntax error, unexpected frame. Missing rights may be given.
_REPLIES_FOR_GOOD = frozenset({311, 406, 501, 502, 505})
# Of a frame, beside the properties: its own eight bytes and the twelve before them, and a message id that grows.
_FRAME_RESERVED_BYTES = 64


class LogWriter(Log):
    """Publishes to queues by name, confirmed, from a thread of its own."""

    def __init__(
        self,
        connect: Callable[[], Connection],
        calls: Poster,
        *,
        inline: AbstractContextManager[None] | None,
    ) -> None:
        self._connect = connect
        self._post = calls.post
        self._within = inline
        self._waiting: deque[Write] = deque()
        self._wake = threading.Condition()
        self._busy = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._channel: Any = None
        self._connection: Any = None
        self._unconfirmed: dict[int, Write] = {}
        self._refused: list[Write] = []
        self._tag = 0
        self._first_node = 0
        self._was_nacked = False
        self._alone = 0  # writes to be sent one by one: one of them is refused for good
        self._said: set[tuple[str, str]] = set()
        self._answered_at = self._written_at = 0.0
        self._patience_seconds = _CONFIRM_FIRST_SECONDS

    def write(self, writes: list[Write]) -> None:
        self._add(writes)

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until everything is confirmed; False if it took too long."""
        deadline = time.monotonic() + timeout_seconds
        if self._within is not None:
            with self._within, self._wake:
                while self._waiting and time.monotonic() < deadline:
                    self._write_batch()
            return not self._waiting
        with self._wake:
            while self._waiting or self._busy:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                self._wake.wait(min(remaining, 0.1))
        return True

    def stop(self) -> None:
        """Write what is waiting, briefly, and close the connection."""
        self.flush(2.0)
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(2.0)
        self._disconnect()

    def _add(self, items: list[Write]) -> None:
        with self._wake:
            self._waiting.extend(items)
            if self._within is None:
                self._wake.notify()
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="shards-log-writer", daemon=True)
                    self._thread.start()
                return
            if (
                all(item.optional for item in items)
                and time.monotonic() - self._written_at < _OPTIONAL_WAIT_SECONDS
                and len(self._waiting) < _BATCH
            ):
                return
        is_awaited = any(item.then is not None and not item.optional for item in items)
        while not self.flush(_CONFIRM_SECONDS) and is_awaited:
            logger.warning("a write to %s is not confirmed yet", items[0].queue)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._stopping:
                    self._wake.wait()
                if self._stopping:
                    return
                self._busy = True
            try:
                self._write_batch()
            except Exception:
                logger.exception("writing to the shards' logs failed")
                self._disconnect()
            finally:
                with self._wake:
                    self._busy = False
                    self._wake.notify_all()

    def _write_batch(self) -> None:
        self._written_at = time.monotonic()
        batch = self._take_batch()
        left = deque(batch)
        self._unconfirmed, self._refused, self._was_nacked = {}, [], False
        is_answered = False
        try:
            self._ensure_connected()
            while left:
                self._send(left.popleft())
            self._await_confirms()
            self._alone = max(0, self._alone - len(batch))
        except Exception as exc:
            self._disconnect()
            is_answered = self._look_into(exc, batch)
        if self._was_nacked:
            # RabbitMQ 3.10 may go on refusing on a channel whose first publish fell into a leader's failover.
            self._disconnect()
        again = [item for item in (*self._refused, *self._unconfirmed.values(), *left) if not item.optional]
        self._unconfirmed = {}
        if again:
            self._waiting.extendleft(reversed(again))
            if not is_answered:
                time.sleep(_PAUSE_SECONDS)

    def _take_batch(self) -> list[Write]:
        """Take what is to be confirmed together; what is large goes alone, since it is what a broker may refuse."""
        most = 1 if self._alone else _BATCH
        batch: list[Write] = []
        while self._waiting and len(batch) < most:
            if len(self._waiting[0].body) > _LARGE_BYTES and batch:
                break
            batch.append(self._waiting.popleft())
            if len(batch[0].body) > _LARGE_BYTES:
                break
        return batch

    def _send(self, item: Write) -> None:
        """Publish one write, or set it aside if it can be seen that the broker would refuse it."""
        self._tag += 1
        message = amqp.Message(item.body, message_id=str(self._tag), **item.properties)
        refusal = None if item.is_event else _find_refusal(message, frame_bytes_max=self._channel.connection.frame_max)
        if refusal is not None:
            self._tag -= 1
            self._set_aside(item, refusal)
            return
        self._unconfirmed[self._tag] = item
        self._channel.basic_publish(message, exchange="", routing_key=item.queue, mandatory=True)

    def _look_into(self, exc: Exception, batch: list[Write]) -> bool:
        """Decide what a failed batch means: the connection was lost, or one of it is refused for good.

        Returns:
            Whether the broker has refused something, and so is there.
        """
        unconfirmed = self._unconfirmed
        is_for_good = isinstance(exc, AMQPError) and exc.code in _REPLIES_FOR_GOOD
        if is_for_good and len(unconfirmed) == 1:
            (item,) = unconfirmed.values()
            unconfirmed.clear()
            self._alone = max(0, self._alone - 1)
            self._set_aside(item, Refusal(str(exc) or repr(exc)))
            return True
        if is_for_good and unconfirmed:
            logger.warning("the broker refused one of %d writes; sending them one by one: %s", len(unconfirmed), exc)
            self._alone = len(batch)
            return True
        queues = ", ".join(sorted({item.queue for item in unconfirmed.values()}))
        logger.warning(
            "writing to the shards' logs failed, trying again: %r; not confirmed: %s",
            exc,
            queues,
            exc_info=None if isinstance(exc, _LOST) else exc,
        )
        self._first_node += 1
        return False

    def _set_aside(self, item: Write, refusal: Refusal) -> None:
        """Tell who gave a write that it can never be stored as it is."""
        if item.refused is not None:
            self._post(partial(item.refused, refusal))
        elif (item.queue, refusal.why[:40]) not in self._said:
            self._said.add((item.queue, refusal.why[:40]))
            logger.error(
                "%s: %s can never be stored and is left out: %s",
                item.queue,
                "what is only told" if item.optional else "a record",
                refusal.why,
            )

    def _await_confirms(self) -> None:
        """Wait until the batch is confirmed; for what is optional not long: it must not hold up the next batch.

        A queue without a leader may keep its confirms for as long as it has none, or lose them: then a run would wait
        for its record although a new channel could write it.
        """
        started = time.monotonic()
        while self._unconfirmed:
            needed = [item for item in self._unconfirmed.values() if not item.optional]
            is_needed = bool(needed)
            patience = self._patience_seconds if is_needed else _OPTIONAL_SECONDS
            if not all(item.is_event for item in needed):
                patience = _CONFIRM_SECONDS  # people read dead letters, and would find them twice
            try:
                self._connection.drain_events(timeout=max(0.001, started + patience - time.monotonic()))
            except TimeoutError:
                if is_needed:
                    self._patience_seconds = min(2 * self._patience_seconds, _CONFIRM_SECONDS)
                    raise
                if time.monotonic() - self._answered_at > _CONFIRM_SECONDS:
                    raise
                return
        self._patience_seconds = _CONFIRM_FIRST_SECONDS

    def _ensure_connected(self) -> None:
        if self._channel is not None and self._connection.connected:
            return
        self._disconnect()
        self._connection = open_connection(
            self._connect(), first_node=self._first_node, answer_seconds=_CONFIRM_SECONDS
        )
        self._answered_at = time.monotonic()
        self._channel = self._connection.channel()
        self._channel.confirm_select()
        self._tag = 0
        self._channel.events["basic_ack"].add(self._on_ack)
        self._channel.events["basic_nack"].add(self._on_nack)
        self._channel.events["basic_return"].add(self._on_return)

    def _disconnect(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            try:
                connection.collect(socket_timeout=1.0)
            except (OSError, AMQPError):
                logger.debug("closing the log connection failed", exc_info=True)

    def _on_ack(self, tag: int, multiple: bool) -> None:
        self._answered_at = time.monotonic()
        for item in self._take(tag, multiple):
            if item.then is not None:
                self._post(item.then)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._was_nacked = True
        self._refused.extend(self._take(tag, multiple))

    def _on_return(self, error: Exception, exchange: str, queue: str, message: Any) -> None:
        # The broker acknowledges a returned message too, right after it.
        item = self._unconfirmed.pop(int(message.properties.get("message_id", 0)), None)
        if item is not None:
            logger.error(
                "the queue %r is gone; a worker that connects declares it again, or run `shards declare`", queue
            )
            self._refused.append(item)

    def _take(self, tag: int, multiple: bool) -> list[Write]:
        tags = [known for known in self._unconfirmed if known <= tag] if multiple else [tag]
        return [item for known in tags if (item := self._unconfirmed.pop(known, None)) is not None]


def _find_refusal(message: amqp.Message, *, frame_bytes_max: int) -> Refusal | None:
    """Return why a message cannot be sent on a connection, None if it can."""
    try:
        size_bytes = len(message._serialize_properties())  # there is no public way
    except Exception as exc:
        # py-amqp has no error of its own for all of it: FrameSyntaxError, struct.error, UnicodeError, AttributeError, …
        return Refusal(f"its headers cannot be encoded: {exc!r}")
    most = frame_bytes_max - _FRAME_RESERVED_BYTES
    if size_bytes <= most:
        return None
    return Refusal(
        f"its headers have {size_bytes:,} bytes, and a frame of this connection takes {most:,} (frame_max of the "
        "broker)",
        headers_bytes_max=most,
    )
