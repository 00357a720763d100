"""Celery's loops: the turns of the event loop, and the rounds of the loop for pools without one.

The second, `synloop`, handles one message, and then waits up to 0.1 s for something on the connection of its events:
ten messages in a second, of which a stream that is read behind them gets none for long. It calls
`consumer.perform_pending_operations` in each round, where its connection may be read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from celery.bootsteps import RUN

from celery_sharding.celery_hooks.site import Pool, WorkerSite

# In a round; between rounds heartbeats are looked at. A solo pool runs ordinary tasks while it reads.
_MESSAGES_MAX = 200
_SECONDS_MAX = 0.05


class Turns(Protocol):
    """The turns of the event loop."""

    def call_next(self, call: Callable[[], None]) -> object:
        """Run a call in the next turn, not in this one, whoever asks."""


class Reads(Protocol):
    """The connection of the worker."""

    def read(self) -> bool:
        """Read what has come, and say whether that was anything."""


def follow_rounds(site: WorkerSite) -> None:
    """Read in each round what has come, in a worker of greenlets, and tell whoever watches the rounds.

    Celery's shutdown asks once more, and an error would keep it from shutting down: nothing is done then.
    """
    consumer = site.consumer
    if consumer.hub:
        return
    stock = consumer.perform_pending_operations

    def perform_pending_operations() -> None:
        stock()
        if consumer.blueprint.state != RUN:
            return
        if site.reads_more and consumer.connection is not None:
            read_what_came(consumer.connection)
        for each in site.watchers:
            each.turned()

    consumer.perform_pending_operations = perform_pending_operations


class EventLoop:
    """The event loop in which the runs of a worker begin and end.

    Attributes:
        reads_first: The pool runs tasks in the thread of the loop, so it reads before each.
    """

    def __init__(self, hub: Any, connection: Reads, turns: Turns, *, reads_first: bool) -> None:
        self._hub = hub
        self._connection = connection
        self._turns = turns
        self.reads_first = reads_first

    def call_next(self, call: Callable[[], None]) -> object:
        return self._turns.call_next(call) if self.reads_first else self._hub.call_soon(call)

    def read(self) -> bool:
        return self.reads_first and self._connection.read()


def loop_of(consumer: Any, pool: Pool, connection: Reads, turns: Turns) -> EventLoop | None:
    """Return the event loop in which the runs of a worker begin and end; None: they do so in any thread."""
    if not consumer.hub or not (pool.has_children or pool.is_solo):
        return None
    return EventLoop(consumer.hub, connection, turns, reads_first=pool.is_solo)


def read_what_came(connection: Any) -> bool:
    """Read what a kombu connection has received, within limits, and say whether that was anything."""
    was_any = False
    ends_at = time.monotonic() + _SECONDS_MAX
    try:
        for _ in range(_MESSAGES_MAX):
            connection.drain_events(timeout=0)
            was_any = True
            if time.monotonic() > ends_at:
                break
    except TimeoutError:
        pass  # that was all
    return was_any
