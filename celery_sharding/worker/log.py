"""What a worker writes that must survive it: events for its groups' streams, and messages for queues.

On RabbitMQ a `LogWriter` writes it. An embedded broker has no streams, and a log that keeps messages only.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from celery_sharding.rabbitmq.streams import encode
from celery_sharding.rabbitmq.tail import Tail

_EVENT = {"content_type": "application/json"}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something can never be stored as it is, however often it is sent.

    Attributes:
        headers_bytes_max: How much room its headers would have had, if they were too large for a frame.
    """

    why: str
    headers_bytes_max: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """One message for a queue, or an event for a stream.

    Attributes:
        properties: Of AMQP, as py-amqp names them; every message is persistent.
        then: Called when the broker has stored it.
        refused: Called in place of `then` if it can never be stored as it is.
        optional: Dropped, rather than repeated, when the broker cannot be reached, or when too much waits.
    """

    queue: str
    body: bytes
    properties: dict[str, Any]
    then: Callable[[], None] | None = None
    refused: Callable[[Refusal], None] | None = None
    optional: bool = False
    is_event: bool = False


Record = tuple[str, dict[str, Any], Callable[[], None]]


class Follower(Protocol):
    """Reads a stream."""

    def on_message(self, body: bytes, offset: int) -> None: ...


class Poster(Protocol):
    """Runs calls of any thread where lanes may be moved."""

    def post(self, call: Callable[[], None]) -> None: ...


class Tailing(Protocol):
    """A stream that is being read."""

    def close(self) -> None: ...


class Log(ABC):
    """Writes in the background, each stream and queue in the order of the calls.

    Attributes:
        keeps_events: Events can be read again; else they are dropped, and `then` is called at once.
    """

    keeps_events = True

    def append(
        self,
        stream: str,
        event: dict[str, Any],
        then: Callable[[], None] | None = None,
        *,
        optional: bool = False,
    ) -> None:
        """Append an event to a stream; see `Write`."""
        self.write([dataclasses.replace(event_write(stream, event), then=then, optional=optional)])

    def append_all(self, records: list[Record]) -> None:
        """Append events that are confirmed together: as (stream, event, called when it is stored)."""
        self.write([dataclasses.replace(event_write(stream, event), then=then) for stream, event, then in records])

    def put(self, queue: str, body: bytes, *, optional: bool = False, **properties: Any) -> None:
        """Publish `body` to a queue; see `Write`."""
        self.write([Write(queue, body, properties, optional=optional)])

    def tail(self, connection: Any, stream: str, offset: Any, follower: Follower) -> Tailing:
        """Let `follower` read a stream from `offset` on, while `connection` is drained."""
        return Tail(connection, stream, offset, follower.on_message)

    @abstractmethod
    def write(self, writes: list[Write]) -> None:
        """Write these, in their order."""

    @abstractmethod
    def flush(self, timeout_seconds: float) -> bool:
        """Wait until all is written; False if it took too long."""

    @abstractmethod
    def stop(self) -> None:
        """Write what waits, briefly, and write no more."""


def event_write(stream: str, event: dict[str, Any]) -> Write:
    """Return the write of an event."""
    return Write(stream, encode(event), _EVENT, is_event=True)
