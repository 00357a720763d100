"""Reading in a worker of greenlets, and between the runs of a solo pool.

Celery's loop for pools of greenlets handles one message, and then waits up to 0.1 s for something on the connection of
its events: ten messages in a second, of which a stream that is read behind them gets none for long. Read of Celery
5.7.0: that `synloop` calls `consumer.perform_pending_operations` in each round, where its connection may be read.
"""

from __future__ import annotations

import time
from typing import Any

from celery.bootsteps import RUN

# In a round; between rounds heartbeats are looked at. A solo pool runs ordinary tasks while it reads.
_MESSAGES_MAX = 200
_SECONDS_MAX = 0.05


def read_more(consumer: Any) -> None:
    """Let `consumer`, Celery's, read in each round of its loop what has come."""
    stock = consumer.perform_pending_operations

    def perform_pending_operations() -> None:
        stock()
        if consumer.blueprint.state != RUN:
            return  # Celery's shutdown asks once more, and an error would keep it from shutting down.
        if consumer.connection is not None:
            read_what_came(consumer.connection)

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
