"""Opening connections that reach every node of the broker and never wait for ever.

A broker of several nodes is up as long as one of them answers, so each is tried, beginning with the one that the
caller names by its number in the URL. Otherwise a node that hangs, which takes connections and does not answer, would
cost every caller a time-out before the next node is tried.

py-amqp waits without a limit for the answers to most methods, so every wait on the socket gets a limit. A wait that
reaches it raises TimeoutError. Then the connection must be closed: a late answer would be taken for the answer to
something else. A limit holds for each answer, or for all of them together (`bound_reads`): a slow or distant broker
answers each question in time, and a hundred of them too late.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from amqp import exceptions as amqp_errors
from kombu.connection import Connection

from celery_sharding.celery_hooks.client import bound_reads, bound_tries

Connect = Callable[[], Connection]


class Broker(Protocol):
    """Where connections lead to."""

    def connect(self) -> Connection:
        """Return a new, unconnected connection to the broker."""


# No single answer of a broker that works takes this long.
ANSWER_SECONDS = 30.0
ANSWER_SECONDS_MIN = 5.0
FAREWELL_SECONDS = 2.0


def open_connection(
    connection: Connection,
    *,
    first_node: int = 0,
    answer_seconds: float = ANSWER_SECONDS,
    deadline: float | None = None,
) -> Any:
    """Connect a kombu connection to the first of its nodes that answers, trying each once, and return it.

    Args:
        answer_seconds: For each answer.
        deadline: For all of them together, on the monotonic clock; None: none.

    Raises:
        OSError, kombu and amqp errors: No node could be reached; the error is the last node's.
    """
    opened: Any = connection  # kombu is typed in part only
    try:
        # `connect` would try two nodes at most.
        connect_from(opened, first_node, deadline=deadline, max_retries=max(1, len(opened.alt) - 1))
    except BaseException:
        opened.collect()
        raise
    bound_waits(opened, answer_seconds)
    if deadline is not None:
        bound_reads(opened.connection, deadline)
    return opened


def connect_from(connection: Any, first_node: int, *, deadline: float | None = None, **options: Any) -> int:
    """Connect a kombu connection, trying its nodes in turn from `first_node` on; return the number of the one reached.

    Args:
        deadline: No try begins after it, or waits beyond it for an answer (monotonic); None: none.
        options: Of kombu's `ensure_connection`: how often.

    Raises:
        OSError, kombu and amqp errors: As for `open_connection`.
    """
    nodes = max(1, len(connection.alt))
    node = first_node % nodes
    for _ in range(node):
        connection.maybe_switch_next()

    if deadline is not None:
        bound_tries(connection, deadline)

    def go_on(error: Exception, *_: Any) -> None:
        nonlocal node
        if deadline is not None and time.monotonic() >= deadline:
            raise error
        node += 1

    connection.ensure_connection(go_on, reraise_as_library_errors=False, **options)
    return node % nodes


def bound_waits(connection: Any, answer_seconds: float) -> None:
    """Limit each wait for an answer on a connected kombu connection; only AMQP's transports wait."""
    if connection.connected:
        sock = getattr(getattr(connection.connection, "transport", None), "sock", None)
        if sock is not None:
            sock.settimeout(answer_seconds)


def close_connection(connection: Any) -> None:
    """Close a kombu connection, quickly even if the broker does not answer any more."""
    with contextlib.suppress(amqp_errors.AMQPError, OSError), cleared_is_lost():
        bound_waits(connection, FAREWELL_SECONDS)
    with contextlib.suppress(amqp_errors.AMQPError, OSError):
        connection.release()


def process_name() -> str:
    """Return how this process signs what it does to a group."""
    return f"{os.getpid()}@{socket.gethostname()}"


@contextlib.contextmanager
def cleared_is_lost() -> Iterator[None]:
    """Raise RecoverableConnectionError where py-amqp stumbles over a connection that it has cleared itself.

    When the broker closes a connection, py-amqp sets its attributes to None, and goes on with what it was doing: that
    raises AttributeError on None (read in 5.4.2). An AttributeError on anything else is a fault, and passes.
    """
    try:
        yield
    except AttributeError as exc:
        if exc.obj is not None:
            raise
        raise amqp_errors.RecoverableConnectionError(f"the connection is lost ({exc})") from exc
