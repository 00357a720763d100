"""The embedded backing: publishes, arranges a group, and gives a worker channels and a log."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from celery_sharding.brokers.embedded.broker import EmbeddedBroker
from celery_sharding.brokers.embedded.gate import gate
from celery_sharding.brokers.embedded.memory import MemoryBroker
from celery_sharding.brokers.embedded.ring import register
from celery_sharding.celery_hooks.pool import wait_for_no_slot
from celery_sharding.config import ShardGroup
from celery_sharding.errors import BrokerUnavailable, TopologyError, Unroutable, UnsupportedBroker
from celery_sharding.layout.model import Layout, Segment
from celery_sharding.publish.message import Application, Outgoing
from celery_sharding.topology import Names
from celery_sharding.worker.log import Follower, Log, Poster, Refusal, Tailing, Write

_PAUSE_SECONDS = 0.1
_LOG_PATIENCE_SECONDS = 30.0


class EmbeddedBacking:
    """The groups of one app on an embedded broker; safe for threads, and for forks if the broker is a file."""

    has_logs = False

    def __init__(self, application: Application) -> None:
        register()
        self._application = application
        connection = application.connect()
        if connection.transport.driver_type == "memory":
            self._broker: EmbeddedBroker = MemoryBroker()
        else:
            from celery_sharding.brokers.embedded.sql import SqlBroker  # needs the extra `sqlalchemy`

            self._broker = SqlBroker(connection)
        self._outlet = Outlet(application, self._broker)

    def publish(self, message: Outgoing) -> None:
        """Publish one message and return when it is stored.

        Raises:
            BrokerUnavailable: The database did not take it in time; nothing was stored.
        """
        settings = self._application.settings
        refused: tuple[type[Exception], ...] = (*self._broker.errors, BrokerUnavailable, Unroutable)
        timeout_seconds = message.timeout_seconds or settings.publish_timeout_seconds
        try:
            self._outlet.send(
                message.payload,
                exchange=Names(message.group).publish,
                routing_key=message.key,
                arranged=settings.group(message.group, needed_by="a published task"),
                timeout_seconds=max(timeout_seconds, message.patience_seconds(self._application)),
                content_type=message.content_type,
                content_encoding=message.content_encoding,
                headers=message.headers,
                properties={**message.properties, "delivery_mode": 2},
            )
        except refused as exc:
            cls = Unroutable if isinstance(exc, Unroutable) else BrokerUnavailable
            text = f"{message.label} was not stored: {exc}"
            raise cls(text, task_id=message.task_id, group=message.group) from exc

    def ensure(self, group: ShardGroup, *, owner: str, known: Layout | None = None) -> Layout:
        """Make the group ready for a worker; its layout is one ring that never changes.

        Raises:
            TopologyMismatch: The group has another number of shards, and messages wait in them.
        """
        try:
            self._outlet.arrange(group)
        except self._broker.errors as exc:
            raise TopologyError(f"group {group.name!r} could not be made ready: {exc}", group=group.name) from exc
        segment = Segment("ring", 1, group.shards, group.queue_type)
        return Layout(offset=0, segments=(segment,), generation=1, shards=group.shards)

    def join_group(self, consumer: Any, group: ShardGroup) -> ShardConnection:
        """Make a worker the group's only one, and return what its shards open their channels on.

        Raises:
            LockHeld: Another worker consumes the group.
        """
        self._broker.lock(group.name, owner=consumer.hostname)
        wait_for_no_slot(consumer.pool)
        return ShardConnection(consumer.connection, self._broker.channel_class)

    def require_logs(self, what: str) -> None:
        raise UnsupportedBroker(f"{what} needs RabbitMQ; this app's broker lives in its own processes")

    def open_log(self, calls: Poster, *, inline: AbstractContextManager[None] | None) -> EmbeddedLog:
        return EmbeddedLog(self._outlet, self._broker, calls)


class ShardConnection:
    """The worker's connection, opening channels that read shards."""

    def __init__(self, connection: Any, channel_class: type[Any]) -> None:
        self._connection = connection
        self._channel_class = channel_class

    def channel(self) -> Any:
        """Open a channel; the worker's loop reads it beside its own."""
        transport = self._connection.connection
        channel = self._channel_class(transport)
        transport.channels.append(channel)
        return channel


class Outlet:
    """Where this process publishes: one connection and channel, used by one thread at a time."""

    def __init__(self, application: Application, broker: EmbeddedBroker) -> None:
        self._application = application
        self._broker = broker
        self._connection: Any = None
        self._channel: Any = None
        self._arranged: set[str] = set()
        self._pid = os.getpid()

    def arrange(self, group: ShardGroup) -> None:
        """Make the queues and bindings of the group, whatever was done before."""
        with gate:
            self._arranged.discard(group.name)
            self._arrange(self._open(), group)

    def send(
        self,
        body: bytes,
        *,
        exchange: str,
        routing_key: str,
        timeout_seconds: float,
        arranged: ShardGroup | None = None,
        **message: Any,
    ) -> None:
        """Publish a message; a failed write has stored nothing, so it is tried again until the time is over.

        Args:
            arranged: The group that the exchange belongs to, made ready first.
            message: As `prepare_message` of a virtual channel takes it.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            with gate:
                try:
                    channel = self._open()
                    if arranged is not None:
                        self._arrange(channel, arranged)
                    headers = dict(message.get("headers") or {})
                    prepared = channel.prepare_message(body, **{**message, "headers": headers})
                    channel.basic_publish(prepared, exchange, routing_key)
                    return
                except self._broker.errors:
                    self._close()
                    if time.monotonic() + _PAUSE_SECONDS > deadline:
                        raise
            time.sleep(_PAUSE_SECONDS)

    def _open(self) -> Any:
        if self._pid != os.getpid():
            self._broker.after_fork()
            self._connection = self._channel = None
            self._arranged.clear()
            self._pid = os.getpid()
        if self._channel is None:
            self._connection = self._application.connect()
            self._channel = self._connection.channel()
        return self._channel

    def _arrange(self, channel: Any, group: ShardGroup) -> None:
        if group.name not in self._arranged:
            self._broker.arrange(channel, Names(group.name), group.shards)
            channel.queue_declare(Names(group.name).dead)
            self._arranged.add(group.name)

    def _close(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        self._arranged.clear()
        if connection is not None:
            connection.collect()


class EmbeddedLog(Log):
    """A worker's log without streams: what is optional is dropped, and letters are stored before `then` is called.

    What can't be stored is kept and tried again with the next write; its message stays unacknowledged meanwhile.
    """

    keeps_events = False

    def __init__(self, outlet: Outlet, broker: EmbeddedBroker, calls: Poster) -> None:
        self._outlet = outlet
        self._broker = broker
        self._calls = calls
        self._lock = threading.Lock()
        self._waiting: deque[Write] = deque()

    def tail(self, connection: Any, stream: str, offset: Any, follower: Follower) -> Tailing:
        """Read nothing: there is no stream."""
        return _NoTail()

    def write(self, writes: list[Write]) -> None:
        for write in writes:
            if not (write.is_event or write.optional):
                self._waiting.append(write)
                self.flush(_LOG_PATIENCE_SECONDS)
            elif write.then is not None:
                self._calls.post(write.then)

    def flush(self, timeout_seconds: float) -> bool:
        while self._waiting:
            with self._lock:
                if not self._waiting:
                    break
                write = self._waiting[0]
                told = write.then
                try:
                    self._store_letter(write, timeout_seconds)
                except self._broker.errors:
                    return False
                except Exception as exc:
                    # What the headers hold cannot be written as JSON, or what it may be.
                    told = None if write.refused is None else partial(write.refused, Refusal(repr(exc)))
                self._waiting.popleft()
            if told is not None:
                self._calls.post(told)
        return True

    def stop(self) -> None:
        """Store what waits, and let another worker have the groups."""
        self.flush(2.0)
        self._broker.unlock_all()

    def _store_letter(self, write: Write, timeout_seconds: float) -> None:
        properties = write.properties
        self._outlet.send(
            write.body,
            exchange="",
            routing_key=write.queue,
            timeout_seconds=timeout_seconds,
            content_type=properties.get("content_type"),
            content_encoding=properties.get("content_encoding"),
            headers=properties.get("application_headers"),
            properties={"correlation_id": properties.get("correlation_id"), "delivery_mode": 2},
        )


class _NoTail:
    """Stands in for a stream that is being read."""

    def close(self) -> None: ...
