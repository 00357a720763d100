"""Opening connections that reach every node of the broker and never wait for ever.

A broker of several nodes is there as long as one of them answers, so each is tried, beginning with the one that the
caller names by its number in the URL: a node that hangs takes connections and does not answer, and would cost every
caller a time-out before the next is tried.

py-amqp waits without a limit for the answers to most methods, so every wait on the socket gets one. A wait that comes
to it raises TimeoutError, after which the connection is to be closed: the answer may still come, and would be taken for
that to something else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from amqp import exceptions as amqp_errors
from kombu.connection import Connection

Connect = Callable[[], Connection]

# No single answer of a broker that works takes this long.
ANSWER_SECONDS = 30.0
ANSWER_SECONDS_MIN = 5.0
FAREWELL_SECONDS = 2.0


def open_connection(connection: Connection, *, first_node: int = 0, answer_seconds: float = ANSWER_SECONDS) -> Any:
    """Connect an unconnected kombu connection to the first of its nodes that answers, one round, and return it.

    Raises:
        OSError, kombu and amqp errors: No node could be reached; the error is that of the last.
    """
    opened: Any = connection  # kombu is typed in part only
    try:
        # `connect` would try two nodes at most.
        connect_from(opened, first_node, max_retries=max(1, len(opened.alt) - 1))
    except BaseException:
        opened.collect()
        raise
    bound_waits(opened, answer_seconds)
    return opened


def connect_from(connection: Any, first_node: int, **options: Any) -> int:
    """Connect a kombu connection, trying its nodes in turn from `first_node` on; return the number of the one reached.

    Args:
        options: Of kombu's `ensure_connection`: how often, how long.

    Raises:
        OSError, kombu and amqp errors: As for `open_connection`.
    """
    nodes = max(1, len(connection.alt))
    node = first_node % nodes
    for _ in range(node):
        connection.maybe_switch_next()

    def go_on(*_: Any) -> None:
        nonlocal node
        node += 1

    connection.ensure_connection(go_on, reraise_as_library_errors=False, **options)
    return node % nodes


def bound_waits(connection: Any, answer_seconds: float) -> None:
    """Let no wait for an answer on a connected kombu connection take longer; other transports than AMQP have none."""
    if connection.connected:
        sock = getattr(getattr(connection.connection, "transport", None), "sock", None)
        if sock is not None:
            sock.settimeout(answer_seconds)


def close_connection(connection: Any) -> None:
    """Close a kombu connection; in short time also if the broker does not answer any more."""
    with contextlib.suppress(amqp_errors.AMQPError, OSError, AttributeError):
        bound_waits(connection, FAREWELL_SECONDS)
    with contextlib.suppress(amqp_errors.AMQPError, OSError):
        connection.release()
