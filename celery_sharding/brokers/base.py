"""What stands behind the groups: RabbitMQ, or an embedded broker without a server.

A backing publishes, makes a group ready, and opens the log of a worker. It is chosen by the transport of the broker's
URL, once, when it is first needed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from celery_sharding.config import ShardGroup
from celery_sharding.errors import UnsupportedBroker
from celery_sharding.layout.cleanup import remove_drained
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.layout.model import Layout
from celery_sharding.publish.publisher import Publisher

if TYPE_CHECKING:
    from celery_sharding.extension import Sharding
    from celery_sharding.worker.log import Log
    from celery_sharding.worker.log_writer import LogWriter

RABBITMQ = ("amqp",)
EMBEDDED = ("memory", "sql")


class Backing(Protocol):
    """A broker that groups can live on. `has_logs`: manifest, journal and attempts exist and can be tailed."""

    has_logs: bool

    @property
    def publish(self) -> Callable[..., None]:
        """Publishes one message and returns when it is stored; `Publisher.publish` says how it is called."""

    def ensure(self, group: ShardGroup, *, owner: str, known: Layout | None = None) -> Layout:
        """Make the group ready for workers and return its layout; remove what it left behind if `known` is given."""

    def consumer_connection(self, consumer: Any, group: ShardGroup) -> Any:
        """Return what the shards of a group open their channels on, in the worker of `consumer`."""

    def open_log(
        self, *, post: Callable[[Callable[[], None]], None], inline: AbstractContextManager[None] | None
    ) -> Log:
        """Return what a worker writes to: beside it, or, if `inline` is given, while the caller waits, within that."""


class RabbitBacking:
    """The groups of one app on RabbitMQ."""

    has_logs = True

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        settings = sharding.settings
        self._publisher = Publisher(
            sharding.connect,
            lambda name: settings.group(name, needed_by="a published task"),
            timeout_seconds=settings.publish_timeout_seconds,
            retry_policy=sharding.app.conf.task_publish_retry_policy or {},
        )
        self.publish = self._publisher.publish

    def ensure(self, group: ShardGroup, *, owner: str, known: Layout | None = None) -> Layout:
        layout = ensure_group(self._sharding.connect, group, owner=owner, known=known)
        if known is not None:  # not while a worker starts
            remove_drained(self._sharding.connect, group.name, owner=owner, known=layout)
        return layout

    def consumer_connection(self, consumer: Any, group: ShardGroup) -> Any:
        return consumer.connection

    def open_log(
        self, *, post: Callable[[Callable[[], None]], None], inline: AbstractContextManager[None] | None
    ) -> LogWriter:
        # Publishers go without what only workers need: it takes a third of the time of the import.
        from celery_sharding.worker.log_writer import LogWriter

        return LogWriter(self._sharding.connect, post=post, inline=inline)


def open_backing(sharding: Sharding) -> Backing:
    """Return the backing that fits the app's broker.

    Raises:
        UnsupportedBroker: The transport can't keep the order.
    """
    transport = sharding.connect().transport
    if transport.driver_type in RABBITMQ:
        return RabbitBacking(sharding)
    if transport.driver_type in EMBEDDED:
        from celery_sharding.brokers.embedded import EmbeddedBacking

        return EmbeddedBacking(sharding)
    raise UnsupportedBroker(
        f"shard groups need RabbitMQ (amqp://); the transport {transport.driver_name!r} may requeue out of order. For "
        "tests and small installs memory:// and sqla+sqlite:// serve, with one worker"
    )


def process_name() -> str:
    """Return how this process signs what it does to a group's layout."""
    return f"{os.getpid()}@{socket.gethostname()}"
