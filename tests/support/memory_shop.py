"""A shop on `memory://`, whose worker is a thread of this process."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from celery import Celery
from celery.contrib.testing.worker import TestWorkController, start_worker
from celery.worker import state as worker_state

from celery_sharding import ShardGroup, Sharding
from celery_sharding.topology import Names


class Shop:
    """An app with one group, and what its tasks did, in order."""

    def __init__(self, group: str, *, shards: int = 4, **options: object) -> None:
        self.names = Names(group)
        self.effects: queue.Queue[tuple[str, int]] = queue.Queue()
        self.app = Celery(group, broker="memory://", backend="cache+memory://", set_as_current=False)
        self.app.conf.broker_transport_options = {"polling_interval": 0.01}
        self.app.conf.sharding_routes = {"elsewhere.*": {"group": group, "key": "key"}}
        self.app.conf.task_default_queue = f"{group}-plain"
        Sharding(self.app, groups=[ShardGroup(group, shards=shards, **options)])

        def step(key: str, number: int) -> None:
            self.effects.put((key, number))

        def nudge() -> None:
            pass

        self.step = self.task(step, name="step")
        self.nudge = self.app.task(shared=False, name="nudge")(nudge)

    def task(self, function: Callable[..., object], **options: object):
        return self.app.task(shared=False, shard_group=self.names.group, shard_key="key", **options)(function)

    @contextmanager
    def worker(self, pool: str = "threads") -> Iterator[TestWorkController]:
        """Run a worker in a thread, and stop it warm."""
        with start_worker(self.app, pool=pool, concurrency=4, perform_ping_check=False) as worker:
            yield worker
            worker_state.should_stop = 0
            for _ in range(3):  # its loop looks for its end when a message comes, or every two seconds
                self.nudge.delay()
            assert worker.blueprint.shutdown_complete.wait(20)
        worker_state.should_stop = None

    def wait_for(self, count: int) -> list[tuple[str, int]]:
        return [self.effects.get(timeout=20) for _ in range(count)]

    def waiting(self) -> int:
        """Return how many messages lie in the shards, without those that a worker holds."""
        with self.app.connection_for_read() as connection:
            queues = [self.names.shard(1, index) for index in range(4)]
            return sum(connection.default_channel.queue_declare(name).message_count for name in queues)

    def dead_letter(self):
        with self.app.connection_for_read() as connection:
            return connection.default_channel.basic_get(self.names.dead, no_ack=True)
