"""The turns of Celery's event loop, as the executor knows them (`ports.Loop`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery_sharding.celery_hooks.connecting import WorkerConnection
from celery_sharding.celery_hooks.pool import WorkerPool
from celery_sharding.worker.calls import Calls
from celery_sharding.worker.ports import Loop


class _PreforkLoop:
    reads_first = False

    def __init__(self, hub: Any) -> None:
        self._hub = hub

    def call_next(self, call: Callable[[], None]) -> object:
        return self._hub.call_soon(call)

    def read(self) -> bool:
        return False


class _SoloLoop:
    reads_first = True

    def __init__(self, connection: WorkerConnection, calls: Calls) -> None:
        self._connection = connection
        self._calls = calls

    def call_next(self, call: Callable[[], None]) -> None:
        self._calls.call_next(call)

    def read(self) -> bool:
        return self._connection.read()


def loop_of(consumer: Any, pool: WorkerPool, connection: WorkerConnection, calls: Calls) -> Loop | None:
    """Return the event loop in which the runs of a worker begin and end; None: they do so in any thread."""
    if consumer.hub and pool.has_children:
        return _PreforkLoop(consumer.hub)
    return _SoloLoop(connection, calls) if consumer.hub and pool.is_solo else None
