"""Confirmed writes of a worker to its groups' logs and queues, beside the event loop.

A worker writes attempts, drained facts, vitals, seals and dead letters. It must not publish from inside a message
handler: py-amqp reads the socket before it writes, so another message would be handled in the middle of the first. So
one thread with a connection of its own publishes what it is given, in order and in batches, and reports each confirm
through `post`, which runs the callback where lanes may be moved.

    queued ──▶ sent ──▶ confirmed ──▶ its callback is posted
      ▲          │
      └──────────┘ connection lost, nacked or returned: sent again (these writes may come twice), or dropped if optional

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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import amqp
from amqp.exceptions import AMQPError
from kombu import Connection
from kombu.exceptions import OperationalError

from celery_sharding.connecting import open_connection
from celery_sharding.errors import LogError
from celery_sharding.streams import encode

if TYPE_CHECKING:
    from celery_sharding.worker.log import Record

logger = logging.getLogger(__name__)

# A broker that is only slow must not be sent the same again and again, so each time-out doubles the next.
_CONFIRM_FIRST_SECONDS, _CONFIRM_SECONDS = 2.0, 10.0
_OPTIONAL_SECONDS = 1.0
_PAUSE_SECONDS = 0.5
_BATCH = 500
_OPTIONAL_WAIT_SECONDS = 0.2
_LOST = (OSError, AMQPError, OperationalError, LogError)


@dataclass(slots=True, eq=False)
class _Write:
    queue: str
    body: bytes
    properties: dict[str, Any]
    then: Callable[[], None] | None
    optional: bool
    is_event: bool


def _event_write(stream: str, event: dict[str, Any], then: Callable[[], None] | None, *, optional: bool) -> _Write:
    properties = {"delivery_mode": 2, "content_type": "application/json"}
    return _Write(stream, encode(event), properties, then, optional, is_event=True)


class LogWriter:
    """Publishes to queues by name, confirmed, from a thread of its own."""

    def __init__(
        self,
        connect: Callable[[], Connection],
        *,
        post: Callable[[Callable[[], None]], None],
        inline: AbstractContextManager[None] | None,
    ) -> None:
        self._connect = connect
        self._post = post
        self._within = inline
        self._waiting: deque[_Write] = deque()
        self._wake = threading.Condition()
        self._busy = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._channel: Any = None
        self._connection: Any = None
        self._unconfirmed: dict[int, _Write] = {}
        self._refused: list[_Write] = []
        self._tag = 0
        self._first_node = 0
        self._was_nacked = False
        self._answered_at = self._written_at = 0.0
        self._patience_seconds = _CONFIRM_FIRST_SECONDS

    def append(
        self, stream: str, event: dict[str, Any], then: Callable[[], None] | None = None, *, optional: bool = False
    ) -> None:
        """Append an event to a stream, as `put` does; it is sent again sooner, since readers do not mind it twice."""
        self._add([_event_write(stream, event, then, optional=optional)])

    def append_all(self, records: list[Record]) -> None:
        """Append events that are confirmed together: as (stream, event, called when it is stored)."""
        self._add([_event_write(stream, event, then, optional=False) for stream, event, then in records])

    def put(
        self,
        queue: str,
        body: bytes,
        then: Callable[[], None] | None = None,
        *,
        optional: bool = False,
        **properties: Any,
    ) -> None:
        """Publish `body` to `queue`; call `then` when the broker has stored it.

        Args:
            optional: Dropped instead of repeated when the broker can't be reached.
            properties: Of the AMQP message, as py-amqp names them.
        """
        self._add([_Write(queue, body, {"delivery_mode": 2, **properties}, then, optional, is_event=False)])

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

    def _add(self, items: list[_Write]) -> None:
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
        batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
        self._unconfirmed, self._refused, self._was_nacked = {}, [], False
        sent = 0
        try:
            self._ensure_connected()
            for item in batch:
                self._tag += 1
                self._unconfirmed[self._tag] = item
                sent += 1
                self._channel.basic_publish(
                    amqp.Message(item.body, message_id=str(self._tag), **item.properties),
                    exchange="",
                    routing_key=item.queue,
                    mandatory=True,
                )
            self._await_confirms()
        except _LOST as exc:
            queues = ", ".join(sorted({item.queue for item in self._unconfirmed.values()}))
            logger.warning("writing to the shards' logs failed, trying again: %r; not confirmed: %s", exc, queues)
            self._first_node += 1
            self._disconnect()
        if self._was_nacked:
            # RabbitMQ 3.10 may go on refusing on a channel whose first publish fell into a leader's failover.
            self._disconnect()
        again = [item for item in (*self._refused, *self._unconfirmed.values(), *batch[sent:]) if not item.optional]
        self._unconfirmed = {}
        if again:
            self._waiting.extendleft(reversed(again))
            time.sleep(_PAUSE_SECONDS)

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

    def _take(self, tag: int, multiple: bool) -> list[_Write]:
        tags = [known for known in self._unconfirmed if known <= tag] if multiple else [tag]
        return [item for known in tags if (item := self._unconfirmed.pop(known, None)) is not None]
