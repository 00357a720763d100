"""Channels that are opened for one purpose.

They are py-amqp's. A refusal closes its channel, and some close the connection, so a look takes a channel of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from amqp import exceptions as amqp_errors


class Opener(Protocol):
    """A connected kombu or py-amqp connection: something that opens channels."""

    def channel(self) -> Any: ...


@contextlib.contextmanager
def brief_channel(connection: Opener) -> Iterator[Any]:
    """Yield a new channel, closed afterwards unless the broker has closed it already."""
    channel = connection.channel()
    try:
        yield channel
    finally:
        close_channel(channel)


def close_channel(channel: Any) -> None:
    """Close a channel, unless a refusal has closed it, or the whole connection."""
    with contextlib.suppress(amqp_errors.AMQPError, OSError):
        if channel.is_open:
            channel.close()
