"""Where a benchmark runs: a broker, a worker of one side, a backlog, and the time from its first end to its last.

The backlog is published before the worker starts, so that publishing costs neither side anything. A sharded backlog
goes to the group's exchange as `celery_sharding` would publish it, but in one batch of confirms.
"""

from __future__ import annotations

import struct
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import amqp
from celery import Celery
from kombu import Connection
from kombu.serialization import dumps

from celery_sharding import ShardGroup
from celery_sharding.layout.cleanup import delete_group
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.testing import ServerNotReady, WorkerNode
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names
from celery_sharding.wire import GROUP_HEADER, KEY_HEADER, MESSAGE_ID_HEADER, SENT_AT_HEADER, new_message_id

SIDES = ("stock", "sharded")
CONFIRM_EVERY = 500
RUN_SECONDS_MAX = 300.0


class Field:
    """Both sides of one benchmark on one broker.

    Args:
        folder: For logs and files of ends.
        shards: Of the group; each side may hold `prefetch` messages in all, whatever `shards` is.
    """

    def __init__(self, broker_url: str, redis_url: str, folder: Path, *, shards: int) -> None:
        self.broker_url = broker_url
        self.redis_url = redis_url
        self.folder = folder
        self.name = f"bench{uuid.uuid4().hex[:8]}"
        self.group = ShardGroup(self.name, shards=shards)
        self._plain = Celery("shop", broker=broker_url, set_as_current=False)
        self._workers = 0

    def connect(self) -> Connection:
        return Connection(self.broker_url)

    @property
    def stock_queue(self) -> str:
        return f"{self.name}-stock"

    def declare(self) -> None:
        """Make the queues of both sides, before anything is measured."""
        with self.connect() as connection:
            connection.default_channel.queue_declare(
                self.stock_queue, durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"}
            )
        ensure_group(self.connect, self.group, owner="benchmarks")

    def remove(self) -> None:
        """Delete everything that `declare` made."""
        with self.connect() as connection:
            connection.default_channel.queue_delete(self.stock_queue)
            delete_group(connection, self.name)

    def fill(self, side: str, task: str, keys: Sequence[str], *, ignore_result: bool = True) -> None:
        """Publish a backlog of `task`, one message a key, and return when all is confirmed."""
        exchange = Names(self.name).publish if side == "sharded" else ""
        with self.connect() as connection:
            channel = connection.default_channel
            channel.confirm_select()
            unconfirmed: set[int] = set()

            def on_ack(tag: int, multiple: bool) -> None:
                # Shards confirm for themselves, so a later message may come first.
                unconfirmed.difference_update([known for known in unconfirmed if known <= tag] if multiple else [tag])

            channel.events["basic_ack"].add(on_ack)
            for number, key in enumerate(keys, start=1):
                unconfirmed.add(number)
                message = self._message(task, key, side, ignore_result)
                channel.basic_publish(message, exchange, key if side == "sharded" else self.stock_queue)
                if number % CONFIRM_EVERY == 0 or number == len(keys):
                    while unconfirmed:
                        connection.drain_events(timeout=30)

    def time_worker(
        self, side: str, task: str, keys: Sequence[str], *, concurrency: int, ignore_result: bool = True
    ) -> float:
        """Run a backlog on a new worker and return the tasks it ended a second, from its first to its last.

        Raises:
            ServerNotReady: It did not end them all, or ended some twice.
        """
        self.fill(side, task, keys, ignore_result=ignore_result)
        with self.worker(side, concurrency=concurrency) as (node, ends):
            wait_until(lambda: count_ends(ends) >= len(keys) or not node.is_running, timeout_seconds=RUN_SECONDS_MAX)
            node.stop()
            times = read_ends(ends)
        if len(times) != len(keys):
            raise ServerNotReady(f"{side}: {len(times)} tasks ended, not {len(keys)}; see {node.log}")
        return (len(times) - 1) / (max(times) - min(times))

    @contextmanager
    def worker(
        self, side: str, *, concurrency: int, level: str = "warning", gossip: bool = False
    ) -> Iterator[tuple[WorkerNode, Path]]:
        """Start a worker and yield it with its file of ends; kill it if it still runs."""
        self._workers += 1
        ends = self.folder / f"{self.name}-{self._workers}.ends"
        # What a group prefetches is the default of each shard; the stock side may hold as many in all.
        prefetch = max(100, 16 * concurrency) * self.group.shards
        env = {
            "BENCH_SIDE": side,
            "BENCH_NAME": self.name,
            "BENCH_SHARDS": str(self.group.shards),
            "BENCH_ENDS": str(ends),
            "BENCH_BROKER": self.broker_url,
            "BENCH_BACKEND": self.redis_url,
            "BENCH_PREFETCH_MULTIPLIER": str(prefetch // concurrency),
        }
        node = WorkerNode(
            "benchmarks.shop",
            f"{self.name}-{self._workers}@bench",
            ["-l", level, "-c", str(concurrency), "--without-mingle", *([] if gossip else ["--without-gossip"])],
            env=env,
            folder=self.folder,
        )
        node.start(wait_seconds=0)
        try:
            yield node, ends
        finally:
            node.kill()

    def _message(self, task: str, key: str, side: str, ignore_result: bool) -> amqp.Message:
        task_id = str(uuid.uuid4())
        message = self._plain.amqp.create_task_message(
            task_id, f"benchmarks.shop.{task}", (key, task_id), {}, ignore_result=ignore_result
        )
        content_type, content_encoding, body = dumps(message.body, serializer="json")
        headers = dict(message.headers)
        if side == "sharded":
            headers |= {GROUP_HEADER: self.name, KEY_HEADER: key}
            headers |= {SENT_AT_HEADER: time.time(), MESSAGE_ID_HEADER: new_message_id()}
        return amqp.Message(
            body,
            content_type=content_type,
            content_encoding=content_encoding,
            application_headers=headers,
            delivery_mode=2,
            **message.properties,
        )


def count_ends(path: Path) -> int:
    """Return how many tasks have ended. Cheap: it is asked often, beside the worker."""
    return path.stat().st_size // 8 if path.exists() else 0


def read_ends(path: Path) -> list[float]:
    """Return when each task ended, as far as it is written."""
    if not path.exists():
        return []
    data = path.read_bytes()
    return [end for (end,) in struct.iter_unpack("d", data[: len(data) // 8 * 8])]


@contextmanager
def open_field(broker_url: str, redis_url: str, folder: Path, *, shards: int) -> Iterator[Field]:
    """Yield a declared field, and remove it."""
    field = Field(broker_url, redis_url, folder, shards=shards)
    field.declare()
    try:
        yield field
    finally:
        field.remove()
