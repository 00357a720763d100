"""One connection of a publisher, with one channel in confirm mode.

A link sends one message at a time and says what became of it. It never waits without a limit, never sends a message
twice, never reconnects, and is used by one thread at a time. It uses py-amqp's connection directly: kombu's would
reconnect in silence, under a channel that is gone.

    open ─send─▶ open        confirmed, returned, unsendable, or unknown while the broker blocks publishers
    open ─send─▶ unusable    nacked, refused, unsent, or unknown for any other reason; its user closes it
    unusable ─close─▶ closed
"""

from __future__ import annotations

import enum
import logging
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from amqp import exceptions as amqp_errors
from amqp.exceptions import AMQPError, ChannelError, NotFound
from kombu import Connection
from kombu.exceptions import OperationalError

from celery_sharding.celery_hooks.client import Written, bound_reads, encode_properties, forget_socket, unbound_reads
from celery_sharding.errors import BrokerUnavailable, PublishRefused
from celery_sharding.publish.message import Outgoing
from celery_sharding.rabbitmq.confirms import Confirms, Outcome
from celery_sharding.rabbitmq.connect import cleared_is_lost, connect_from
from celery_sharding.rabbitmq.refusals import explain_connecting
from celery_sharding.topology import Names
from celery_sharding.wire import MESSAGE_ID_HEADER

logger = logging.getLogger(__name__)

# Opening a connection and its channel may take this long at least, however little time is left for the publish.
_OPEN_SECONDS_MIN = 1.0
_CLOSE_SECONDS = 1.0
# Of a frame: its own 8 bytes, and 12 of a header's before the properties.
_HEADER_FRAME_BYTES = 20


class Fate(enum.Enum):
    """What became of one message."""

    CONFIRMED = enum.auto()
    RETURNED = enum.auto()
    NACKED = enum.auto()
    REFUSED = enum.auto()
    """The broker closed the channel or the connection because of it; not stored."""
    UNSENDABLE = enum.auto()
    """AMQP cannot carry it as it is; not sent."""
    UNSENT = enum.auto()
    """Not all of it left this process: the broker has nothing to store."""
    BLOCKED = enum.auto()
    """Not sent, because the broker would not take it now."""
    UNKNOWN = enum.auto()


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one message, and the error that told."""

    fate: Fate
    cause: Exception | None = None

    @property
    def is_unsent(self) -> bool:
        """Say whether the connection failed before the message had left; another connection may work."""
        return self.fate is Fate.UNSENT

    @property
    def is_gone(self) -> bool:
        """Say whether the broker has no such exchange."""
        return self.fate is Fate.REFUSED and isinstance(self.cause, NotFound)

    @property
    def is_refusal(self) -> bool:
        """Say whether the broker did not store the message, but may do so on a new channel."""
        return self.fate is Fate.NACKED or self.is_gone


_ANSWERS = {
    Outcome.CONFIRMED: Answer(Fate.CONFIRMED),
    Outcome.RETURNED: Answer(Fate.RETURNED),
    Outcome.NACKED: Answer(Fate.NACKED),
}


class Pool(Protocol):
    """What keeps links."""

    def note_blocked(self, link: Link) -> None:
        """Take note that the broker has begun or ceased to block publishers; `link.blocked` says which."""


class Link:
    """An open connection to publish on.

    Args:
        template: Its settings are used; the connection itself is not.
        policy: How often connecting is tried, in the words of Celery's `task_publish_retry_policy`.
        deadline: For connecting, all tries together, and for opening the channel (monotonic).
        first_node: The node of the broker to try first, by its number in the URL; `node` is the one reached.
        pool: Told when the broker blocks publishers, and when it does no more.

    Raises:
        BrokerUnavailable: There is no connection to the broker; the message says what took the time.
        PublishRefused: The broker does not let this user in, and will not without a change.
    """

    def __init__(
        self,
        template: Connection,
        *,
        policy: dict[str, Any],
        deadline: float,
        first_node: int,
        pool: Pool,
    ) -> None:
        self.blocked = False
        self.usable = True
        self.groups: set[str] = set()
        self._pool = pool
        self._amqp: Any = None
        limit_seconds = max(deadline - time.monotonic(), _OPEN_SECONDS_MIN)
        deadline = time.monotonic() + limit_seconds
        # Nobody sends heartbeats on an idle link; TCP keepalive, which py-amqp turns on, finds a dead peer.
        kombu_connection: Any = template.clone(
            heartbeat=0,
            connect_timeout=min(template.connect_timeout or limit_seconds, limit_seconds),
            transport_options={
                **(template.transport_options or {}),
                "confirm_publish": False,
                "on_blocked": self._on_blocked,
                "on_unblocked": self._on_unblocked,
            },
        )
        doing = "connecting"
        try:
            self.node = connect_from(kombu_connection, first_node, deadline=deadline, timeout=limit_seconds, **policy)
            self._amqp = kombu_connection.connection
            doing = "opening a channel"
            # Without this, py-amqp writes, and waits for most answers, without a limit.
            self._amqp.sock.settimeout(limit_seconds)
            with cleared_is_lost():
                self.channel = self._amqp.channel()
                self._confirms: Confirms[None] = Confirms(self.channel, mark=MESSAGE_ID_HEADER)
        except (OSError, AMQPError, OperationalError) as exc:
            self.close()
            refusal = explain_connecting(exc)
            if refusal is not None:
                raise PublishRefused(refusal) from exc
            raise BrokerUnavailable(f"no connection to the broker: {doing} failed: {_words(exc)}") from exc
        except BaseException:
            self.close()
            raise
        unbound_reads(self._amqp)

    @property
    def connection(self) -> Any:
        """The connection itself, to open further channels on."""
        return self._amqp

    @contextmanager
    def within(self, deadline: float) -> Iterator[Any]:
        """Yield the connection; until the block ends, no read on it goes beyond `deadline` (monotonic)."""
        bound_reads(self._amqp, deadline)
        try:
            with cleared_is_lost():
                yield self._amqp
        finally:
            unbound_reads(self._amqp)

    def send(self, message: Outgoing, *, deadline: float) -> Answer:
        """Publish a message and wait until `deadline` (monotonic) for what becomes of it."""
        prepared = self.channel.prepare_message(
            message.payload,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            headers=message.headers,
            properties={"delivery_mode": 2, **message.properties},
        )
        return self._send(prepared, Names(message.group).publish, message.key, deadline)

    def probe(self, queue: str, *, deadline: float) -> Answer:
        """Publish to a queue that does not exist, as `send` does."""
        return self._send(self.channel.prepare_message(b"probe"), "", queue, deadline)

    def _send(self, message: Any, exchange: str, key: str, deadline: float) -> Answer:
        try:
            properties = encode_properties(message)
        except Exception as exc:  # whatever the type of a header raises
            return Answer(Fate.UNSENDABLE, ValueError(f"a header or property cannot be encoded for AMQP: {exc!r}"))
        frame_bytes = len(properties) + _HEADER_FRAME_BYTES
        if 0 < self._amqp.frame_max < frame_bytes:
            return Answer(
                Fate.UNSENDABLE,
                ValueError(
                    f"its headers have {frame_bytes} bytes, and {self._amqp.frame_max} fit the frame that the broker "
                    "takes; put what is large into the arguments"
                ),
            )
        written = Written(self._amqp, message, properties)
        try:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError("no time left to send it")
            with cleared_is_lost():
                self._confirms.publish(None, message, exchange, key, timeout=remaining)
                self._confirms.wait(deadline)
        except (OSError, AMQPError) as exc:
            settled = self._confirms.take_settled()
            if not settled:
                return self._answer_lost(exc, is_unsent=not written.has_left)
            self.usable = False  # the answer was there, and something else came with it
        else:
            settled = self._confirms.take_settled()
        ((_, outcome),) = settled
        if outcome is Outcome.NACKED:
            # RabbitMQ 3.10 may go on refusing on a channel whose first publish fell into a leader's failover.
            self.usable = False
        return _ANSWERS[outcome]

    def _answer_lost(self, error: OSError | AMQPError, *, is_unsent: bool) -> Answer:
        """Return what a publish ends in that the broker has not answered for."""
        self.usable = False
        if is_unsent:
            # Our user closes this connection, so a part of the message that may have left is never completed.
            return Answer(Fate.UNSENT, error)
        if isinstance(error, ChannelError) or _is_unreadable(error):
            return Answer(Fate.REFUSED, error)
        # A blocked connection is kept: the broker processes what it holds when the alarm clears, and the next publish
        # must see that the broker is blocked instead of trying a new connection.
        self.usable = self.blocked and isinstance(error, TimeoutError)
        self._confirms.forget()  # it may be answered late
        return Answer(Fate.UNKNOWN, error)

    def refresh(self, *, deadline: float = 0.0) -> bool:
        """Read what the broker has sent since; return False if the connection is gone.

        Args:
            deadline: How long (monotonic) to wait for a broker that blocks publishers to unblock.
        """
        try:
            while self._amqp.connected:
                patience = max(0.0, deadline - time.monotonic()) if self.blocked else 0.0
                if not _is_readable(self._amqp.sock, patience):
                    return True
                with cleared_is_lost():
                    self._amqp.drain_events(timeout=_CLOSE_SECONDS)
        except (OSError, AMQPError) as exc:
            logger.debug("an idle publisher's connection is gone: %s", exc)
        return False

    def close(self) -> None:
        """Close without a word to a broker that may not answer."""
        self.usable = False
        if self._amqp is None:
            return
        try:
            with cleared_is_lost():
                if self._amqp.connected:
                    self._amqp.sock.settimeout(_CLOSE_SECONDS)  # for the farewell of TLS
                self._amqp.collect()
        except (OSError, AMQPError):
            logger.debug("closing a publisher's connection failed", exc_info=True)

    def forget(self) -> None:
        """Give up a connection that this process inherited by a fork; the parent goes on using it."""
        forget_socket(self._amqp)

    def _on_blocked(self, reason: str) -> None:
        logger.warning("the broker blocks publishers: %s", reason)
        self.blocked = True
        self._pool.note_blocked(self)

    def _on_unblocked(self) -> None:
        self.blocked = False
        self._pool.note_blocked(self)


def _is_readable(sock: Any, timeout_seconds: float) -> bool:
    """Say whether the socket has something to read, decrypted bytes in a TLS buffer included."""
    if getattr(sock, "pending", None) is not None and sock.pending():
        return True
    if not hasattr(select, "poll"):
        # eventlet removes it; its own `select` has no limit of file descriptors.
        return bool(select.select([sock], [], [], timeout_seconds)[0])
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLERR | select.POLLHUP)
    return bool(poll.poll(timeout_seconds * 1000))


def _is_unreadable(error: Exception) -> bool:
    """Say whether the broker could not read the message, and so has not stored it.

    py-amqp raises the same error for what it cannot read itself, which says nothing about the message; then the error
    names no method.
    """
    return isinstance(error, amqp_errors.FrameError) and error.method_sig is not None


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
