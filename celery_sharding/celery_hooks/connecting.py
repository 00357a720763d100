"""How a worker gets back to a broker that it has lost: soon, by another node, and without waiting for ever.

Celery waits 2, 4, 6 … seconds between its tries, and has no setting for that: after an outage of ten seconds a shard
may stand still for six more. Here it is 0.5, 1, 1.5 … up to 30.

And its main thread waits without a limit when channels are opened and closed, and when it closes a connection; it
notices no missing heartbeat meanwhile. A node that hangs, with its connections open, would hold it for ever.

A connection may be lost before the event loop runs, while the groups are made ready. Celery forgets the sockets of a
lost connection where its loop breaks off, and nowhere else: children that were forked meanwhile keep such a socket
open, so the loop of the next connection would hear of it, and take that connection for lost, at its first turn.

kombu begins with the first node of the URL at each connect. That may be one that takes connections and refuses what a
worker needs, for as long as nobody restarts it: RabbitMQ 3.10 closes the connection (541) when a stream is consumed
whose replica on that node did not come back after a partition.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from celery_sharding.celery_hooks.loop import read_what_came
from celery_sharding.celery_hooks.site import WorkerSite
from celery_sharding.rabbitmq.connect import ANSWER_SECONDS_MIN, FAREWELL_SECONDS, bound_waits

logger = logging.getLogger(__name__)

# Of Celery's ticks in a heartbeat: of those that send, each second one may find that something was sent before.
BEATS = 4
_FIRST_SECONDS, _MORE_SECONDS = 0.5, 0.5


class WorkerConnection:
    """The connection on which the main thread of a worker consumes, whichever it is at the moment."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self.first_node = 0

    @property
    def current(self) -> Any:
        """The connection, of kombu; None while there is none."""
        return self._consumer.connection

    def beating(self) -> tuple[Any, ...]:
        """Return the kombu connections that the main thread sends heartbeats on."""
        return self._consumer.connection, self._events()

    def read(self) -> bool:
        """Read what the connection has received, and say whether that was anything."""
        connection = self._consumer.connection
        return connection is not None and read_what_came(connection)

    def leave_node(self) -> None:
        """The connection is lost: begin with the next node of the broker."""
        self.first_node += 1
        events = self._events()
        if events is not None:
            # Celery closes it at the next connect, and waits for the broker's farewell.
            bound_waits(events, FAREWELL_SECONDS)

    def forget_sockets(self) -> None:
        """The connection is lost: let the event loop do what is left of its last turn, and forget all sockets."""
        hub = self._consumer.hub
        if hub is None:
            return
        try:
            for call in hub._pop_ready():
                try:
                    call()
                except self._consumer.connection_errors as exc:
                    logger.debug("a call of the last turn, to read the lost connection for the most part: %r", exc)
        finally:
            hub.reset()

    def _events(self) -> Any:
        return getattr(self._consumer.event_dispatcher, "connection", None)


def connect_within_limits(site: WorkerSite) -> None:
    """Let the worker try sooner, begin with the node whose turn it is, and wait no longer for any answer than it may.

    In this order: whoever waits for the first connect is told, the node is chosen, Celery connects, the waits are
    limited.
    """
    consumer = site.consumer
    stock = consumer.ensure_connected
    answer_seconds = max(site.heartbeat_seconds, ANSWER_SECONDS_MIN)

    def ensure_connected(connection: Any) -> Any:
        for each in site.watchers:
            each.connecting()
        for _ in range(site.connection.first_node % max(1, len(connection.alt))):
            connection.maybe_switch_next()
        connection.ensure_connection = partial(
            connection.ensure_connection, interval_start=_FIRST_SECONDS, interval_step=_MORE_SECONDS
        )
        opened = stock(connection)
        bound_waits(opened, answer_seconds)
        return opened

    consumer.ensure_connected = ensure_connected


def beat_often(site: WorkerSite) -> None:
    """Ask for heartbeats as short as the setting says, where the pool leaves time to send them.

    A channel that the broker closes (consumer time-out) would end the worker; the setting lets it connect anew instead.
    """
    consumer = site.consumer
    consumer.app.conf.broker_channel_error_retry = True
    if consumer.hub or site.pool.is_green:
        consumer.amqheartbeat_rate = max(consumer.amqheartbeat_rate, BEATS)
        consumer.amqheartbeat = min(consumer.amqheartbeat or site.heartbeat_seconds, site.heartbeat_seconds)
