"""How many channels a worker needs on its connection, and how many the broker allows.

A worker opens one channel for each queue that it consumes, one for each log that it follows, and a few more. The
broker's `channel_max` limits them: to 2047 unless it is set.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Manifest, attempts and journal.
LOGS = 3
# Celery keeps three on the same connection, for ordinary queues, remote control and gossip (measured on 5.7.0 and
# RabbitMQ 3.10 with 4 and 9 shards, in prefork, threads and solo; two without gossip); one is for passive declarations.
OTHERS = 4


def needed_channels(queues: Iterable[int], *, others: int = OTHERS) -> int:
    """Return how many channels a worker needs, given how many queues of each group it consumes."""
    return sum(count + LOGS for count in queues) + others


def allowed_channels(connection: Any) -> int | None:
    """Return how many channels a connected kombu connection may have; None if its transport knows no limit."""
    inner = connection.connection
    limit = getattr(inner, "channel_max", None) if hasattr(inner, "server_properties") else None
    return limit if isinstance(limit, int) and limit else None


def describe_shortage(needed: int, allowed: int) -> tuple[str, str]:
    """Return what is wrong, and what to do about it."""
    text = (
        f"a worker that consumes these shards needs {needed} channels, but the broker allows {allowed} per connection "
        "(channel_max)"
    )
    fix = (
        f"set channel_max = {max(2047, 2 * needed)} in rabbitmq.conf, or give each worker fewer shards by -Q, as in "
        "`-Q orders.000,orders.001`"
    )
    return text, fix
