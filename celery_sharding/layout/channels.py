"""How many channels a worker needs on its connection, and whether the broker gives it as many.

A worker opens one channel for each queue that it consumes, one for each of a group's logs that it follows, and some
beside them. A broker's `channel_max` bounds them: 2047 unless it is set.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Manifest, attempts and journal.
LOGS = 3
# Three that Celery keeps on the same connection, for ordinary queues, remote control and gossip (measured on 5.7.0 and
# RabbitMQ 3.10 with 4 and 9 shards, in prefork, threads and solo; two without gossip), and one for short looks.
OTHERS = 4


def needed_channels(queues: Iterable[int], *, others: int = OTHERS) -> int:
    """Return how many channels a worker needs that consumes so many queues of each group."""
    return sum(count + LOGS for count in queues) + others


def allowed_channels(connection: Any) -> int | None:
    """Return how many channels a connected kombu connection may have; None if its transport knows no limit."""
    inner = connection.connection
    limit = getattr(inner, "channel_max", None) if hasattr(inner, "server_properties") else None
    return limit if isinstance(limit, int) and limit else None


def describe_shortage(needed: int, allowed: int) -> tuple[str, str]:
    """Return what is wrong, and what to do about it."""
    text = (
        f"a worker that consumes these shards needs {needed} channels, one for each and some more, and the broker "
        f"allows {allowed} on a connection (channel_max)"
    )
    fix = (
        f"set channel_max = {max(2047, 2 * needed)} in rabbitmq.conf, or give each worker fewer shards by -Q, as in "
        "`-Q orders.000,orders.001`"
    )
    return text, fix
