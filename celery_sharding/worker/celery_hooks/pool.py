"""Celery's pool and its event loop, as the executor knows them (`ports`). Read of Celery 5.7.0.

A strategy hands its request to `consumer.on_task_request`, which takes a place in the pool. The place is not given back
when the request cannot be handed over: `process_task` is `_process_task_sem` where there are places to be taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from celery_sharding.worker.calls import Calls
from celery_sharding.worker.celery_hooks.green import read_what_came
from celery_sharding.worker.consume.receiver import Buckets


class CeleryPool:
    """The pool of the worker of `consumer`, Celery's; made before `on_task_request` is wrapped."""

    def __init__(self, consumer: Any, buckets: Buckets) -> None:
        self._consumer = consumer
        self._buckets = buckets
        self._submit = consumer.on_task_request
        controller = consumer.controller
        self._has_places = getattr(controller, "process_task", None) == controller._process_task_sem
        self.is_green = bool(getattr(consumer.pool, "is_green", False))

    def slots(self) -> int:
        """Return how many runs it takes: none once it has stopped.

        A worker that is told to stop while it has no connection stops its pool, and tells nobody.
        """
        pool = self._consumer.pool
        return max(1, pool.num_processes) if pool.active else 0

    def submit(self, request: Any) -> object:
        try:
            return self._submit(request)
        except Exception:
            if self._has_places:
                self._consumer.controller._quick_release()
            raise

    def spawn(self, call: Callable[..., object], *args: Any) -> object:
        return self._consumer.pool.spawn_n(call, *args)

    def bucket_for(self, task_name: str) -> Any:
        return None if self._consumer.disable_rate_limits else self._buckets.get(task_name)

    def hears_broker(self) -> bool:
        """Say whether the broker was heard within one heartbeat; an owner that is cut off must start nothing more.

        The broker sends twice a heartbeat, and the main thread looks now and then whether something was read.
        """
        # kombu's `connection` would connect anew, in the middle of whatever asks.
        connection: Any = getattr(self._consumer.connection, "_connection", None)
        heartbeat_seconds = getattr(connection, "heartbeat", None)
        if not heartbeat_seconds or not connection.last_heartbeat_received:
            return True
        return bool(time.monotonic() - connection.last_heartbeat_received < 1.5 * heartbeat_seconds)


class HubLoop:
    """The event loop of a worker with a prefork pool."""

    reads_first = False

    def __init__(self, hub: Any) -> None:
        self._hub = hub

    def call_next(self, call: Callable[[], None]) -> object:
        return self._hub.call_soon(call)

    def read(self) -> bool:
        return False


class SoloLoop:
    """The event loop of a worker with a solo pool."""

    reads_first = True

    def __init__(self, consumer: Any, calls: Calls) -> None:
        self._consumer = consumer
        self._calls = calls

    def call_next(self, call: Callable[[], None]) -> None:
        self._calls.call_next(call)

    def read(self) -> bool:
        connection = self._consumer.connection
        return connection is not None and read_what_came(connection)
