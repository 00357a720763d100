"""Where py-amqp and kombu are bent for all that speaks to a broker.

It imports nothing of ours, so what stands below the other hooks may use it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from amqp import spec
from celery._state import _task_stack

_TRY_SECONDS_MIN = 0.1


def bound_reads(connection: Any, deadline: float) -> None:
    """Let no read on a connection of py-amqp go on beyond `deadline` (monotonic), until `unbound_reads`."""
    stock = type(connection).blocking_read

    def blocking_read(timeout: float | None = None) -> Any:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time is over")
        return stock(connection, left if timeout is None else min(timeout, left))

    connection.blocking_read = blocking_read


def unbound_reads(connection: Any) -> None:
    """Take `bound_reads` back."""
    vars(connection).pop("blocking_read", None)


def bound_tries(connection: Any, deadline: float) -> None:
    """Let no try of a kombu connection to connect wait for an answer beyond `deadline` (monotonic).

    kombu calls `_connection_factory` for each try, and asks its transport for the class of the connection.
    """
    given_seconds = connection.connect_timeout
    stock = connection._connection_factory

    def connect() -> Any:
        # Each time, since a switch of nodes sets what was configured.
        left = max(deadline - time.monotonic(), _TRY_SECONDS_MIN)
        connection.connect_timeout = min(given_seconds or left, left)
        opened_class = type(connection.transport).Connection

        def make(**settings: Any) -> Any:
            made = opened_class(**settings)
            bound_reads(made, deadline)
            return made

        connection.transport.Connection = make
        return stock()

    connection._connection_factory = connect


def begin_confirms(channel: Any) -> bool:
    """Let a channel confirm what is published on it; say whether its tags begin anew.

    They do on a new channel, and on one that py-amqp has opened again after the broker closed it. The broker's answer
    is not waited for, since it may be far away.
    """
    if channel._confirm_selected:
        return False
    channel.confirm_select(nowait=True)
    channel._confirm_selected = True
    return True


def publish_unwaited(channel: Any, message: Any, exchange: str, key: str, *, timeout: float | None) -> None:
    """Publish, mandatory; `basic_publish` would wait for each confirm if the application has set `confirm_publish`."""
    channel._basic_publish(message, exchange=exchange, routing_key=key, mandatory=True, timeout=timeout)


def encode_properties(message: Any) -> bytes:
    """Return the properties and headers of a message as they are sent.

    Raises:
        Exception: They cannot be encoded. py-amqp has no error of its own for all of it: FrameSyntaxError,
            struct.error, UnicodeError, AttributeError, …
    """
    return message._serialize_properties()  # type: ignore[no-any-return]


class Written:
    """Watches whether any of a message leaves a connection.

    py-amqp asks for the properties when it begins to write; before that, it reads and answers.
    """

    def __init__(self, connection: Any, message: Any, properties: bytes) -> None:
        self._connection = connection
        self._properties = properties
        self._frames_before: int | None = None
        message._serialize_properties = self._begin

    @property
    def has_left(self) -> bool:
        """Whether a frame of it was handed over."""
        return self._frames_before is not None and self._connection.bytes_sent != self._frames_before

    def _begin(self) -> bytes:
        self._frames_before = self._connection.bytes_sent  # counts frames, each after its last byte was handed over
        return self._properties


def open_unwaited(channel: Any, refused: Callable[..., None], there: Callable[[], None]) -> None:
    """Open a channel, and wait neither for that nor, if the broker closes it, for its being opened again.

    Args:
        refused: Called with the broker's code, text, class and method when it closes the channel.
        there: Called when it answers `basic.qos`.
    """
    channel._callbacks[spec.Channel.Close] = refused
    channel._callbacks[spec.Basic.QosOk] = there
    channel.send_method(spec.Channel.Open, "s", ("",))


def close_unwaited(channel: Any) -> None:
    """Close a channel, and do not wait until the broker says so; it is read with what comes on the connection."""
    channel.is_closing = True
    channel.send_method(spec.Channel.Close, "BsBB", (0, "", 0, 0))


def forget_socket(connection: Any) -> None:
    """Give up the copy of a connection of py-amqp that a fork left here.

    Closing it the usual way would shut the shared TCP stream down.
    """
    transport = getattr(connection, "_transport", None)
    sock = getattr(transport, "sock", None)
    if transport is not None and sock is not None:
        transport.sock = None
        os.close(sock.detach())


def running_requests() -> list[Any]:
    """Return the requests of all tasks that this thread runs, one inside the other.

    A task that applies itself is on the stack twice, and its `request` is only the inner one's.
    """
    return [request for task in _task_stack.stack for request in task.request_stack.stack]
