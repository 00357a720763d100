"""Reading in a worker of greenlets.

Celery's loop for pools of greenlets handles one message, and then waits up to 0.1 s for something on the connection of
its events: ten messages in a second, of which a stream that is read behind them gets none for long. Read of Celery
5.7.0: that `synloop` calls `consumer.perform_pending_operations` in each round, where its connection may be read.
"""

from __future__ import annotations

from typing import Any

from celery.bootsteps import RUN

_MESSAGES_MAX = 200  # in a round; between rounds heartbeats are looked at


def read_more(consumer: Any) -> None:
    """Let `consumer`, Celery's, read in each round of its loop what has come."""
    stock = consumer.perform_pending_operations

    def perform_pending_operations() -> None:
        stock()
        if consumer.blueprint.state != RUN:
            return  # Celery's shutdown asks once more, and an error would keep it from shutting down.
        connection = consumer.connection
        try:
            for _ in range(_MESSAGES_MAX if connection is not None else 0):
                connection.drain_events(timeout=0)
        except TimeoutError:
            pass  # that was all

    consumer.perform_pending_operations = perform_pending_operations
