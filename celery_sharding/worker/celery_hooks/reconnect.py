"""How a worker gets back to a broker that it has lost: soon, by another node, and without waiting for ever.

Celery waits 2, 4, 6 … seconds between its tries, and has no setting for that: after an outage of ten seconds a shard
may stand still for six more. Here it is 0.5, 1, 1.5 … up to 30.

And its main thread waits without a limit when channels are opened and closed, and when it closes a connection; it
notices no missing heartbeat meanwhile. A node that hangs, with its connections open, would hold it for ever.

Kombu begins with the first node of the URL at each connect. That may be one that takes connections and refuses what a
worker needs, for as long as nobody restarts it: RabbitMQ 3.10 closes the connection (541) when a stream is consumed
whose replica on that node did not come back after a partition.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from celery_sharding.rabbitmq.connect import bound_waits

_FIRST_SECONDS, _MORE_SECONDS = 0.5, 0.5


def reconnect_sooner(consumer: Any) -> None:
    """Let `consumer`, Celery's, begin with shorter waits between its tries to connect."""
    stock = consumer.ensure_connected

    def ensure_connected(connection: Any) -> Any:
        connection.ensure_connection = partial(
            connection.ensure_connection, interval_start=_FIRST_SECONDS, interval_step=_MORE_SECONDS
        )
        return stock(connection)

    consumer.ensure_connected = ensure_connected


def limit_waits(consumer: Any, answer_seconds: float) -> None:
    """Let `consumer`, Celery's, wait no longer for any answer on the connections that it opens."""
    stock = consumer.ensure_connected

    def ensure_connected(connection: Any) -> Any:
        opened = stock(connection)
        bound_waits(opened, answer_seconds)
        return opened

    consumer.ensure_connected = ensure_connected


def take_turns(consumer: Any) -> Callable[[], None]:
    """Return what makes `consumer`, Celery's, begin with the next node of the broker when it connects from now on."""
    stock = consumer.ensure_connected
    first_node = 0

    def ensure_connected(connection: Any) -> Any:
        for _ in range(first_node % max(1, len(connection.alt))):
            connection.maybe_switch_next()
        return stock(connection)

    def go_on() -> None:
        nonlocal first_node
        first_node += 1

    consumer.ensure_connected = ensure_connected
    return go_on
