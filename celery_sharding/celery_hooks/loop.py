"""The rounds of Celery's loop for pools without an event loop, and reading in them.

That loop, `synloop`, handles one message, and then waits up to 0.1 s for something on the connection of its events: ten
messages in a second, of which a stream that is read behind them gets none for long. It calls
`consumer.perform_pending_operations` in each round, where its connection may be read.
"""

from __future__ import annotations

import time
from typing import Any

from celery.bootsteps import RUN

from celery_sharding.celery_hooks.site import WorkerSite

# In a round; between rounds heartbeats are looked at. A solo pool runs ordinary tasks while it reads.
_MESSAGES_MAX = 200
_SECONDS_MAX = 0.05


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
