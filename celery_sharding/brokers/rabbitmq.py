"""The groups of one app on RabbitMQ."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from celery_sharding.config import ShardGroup
from celery_sharding.layout.cleanup import remove_drained
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.layout.model import Layout
from celery_sharding.publish.message import Application
from celery_sharding.publish.publisher import Publisher

if TYPE_CHECKING:
    from celery_sharding.worker.log import Log, Poster


class RabbitBacking:
    """Publishes, keeps a group's queues in order, and gives a worker its connection and log."""

    has_logs = True

    def __init__(self, application: Application) -> None:
        self._application = application
        self._publisher = Publisher(application)
        self.publish = self._publisher.publish

    def ensure(self, group: ShardGroup, *, owner: str, known: Layout | None = None) -> Layout:
        connect = self._application.connect
        layout = ensure_group(connect, group, owner=owner, known=known)
        if known is not None:  # not while a worker starts
            remove_drained(connect, group.name, owner=owner, known=layout)
        return layout

    def join_group(self, consumer: Any, group: ShardGroup) -> Any:
        return consumer.connection

    def require_logs(self, what: str) -> None:
        """Nothing: they are there."""

    def open_log(self, calls: Poster, *, inline: AbstractContextManager[None] | None) -> Log:
        from celery_sharding.worker.log_writer import InlineLogWriter, LogWriter  # as in `base`

        if inline is None:
            return LogWriter(self._application, calls)
        return InlineLogWriter(self._application, calls, inline)
