"""The groups of one app on RabbitMQ."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from celery_sharding.brokers.base import Application
from celery_sharding.config import ShardGroup
from celery_sharding.layout.cleanup import remove_drained
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.layout.model import Layout
from celery_sharding.publish.publisher import Publisher

if TYPE_CHECKING:
    from celery_sharding.worker.log import Poster
    from celery_sharding.worker.log_writer import LogWriter


class RabbitBacking:
    """Publishes, keeps a group's queues in order, and gives a worker its connection and log."""

    has_logs = True

    def __init__(self, application: Application) -> None:
        self._connect = application.connect
        settings = application.settings
        self._publisher = Publisher(
            application.connect,
            lambda name: settings.group(name, needed_by="a published task"),
            timeout_seconds=settings.publish_timeout_seconds,
            retry_policy=application.app.conf.task_publish_retry_policy or {},
        )
        self.publish = self._publisher.publish

    def ensure(self, group: ShardGroup, *, owner: str, known: Layout | None = None) -> Layout:
        layout = ensure_group(self._connect, group, owner=owner, known=known)
        if known is not None:  # not while a worker starts
            remove_drained(self._connect, group.name, owner=owner, known=layout)
        return layout

    def consumer_connection(self, consumer: Any, group: ShardGroup) -> Any:
        return consumer.connection

    def require_logs(self, what: str) -> None:
        """Nothing: they are there."""

    def open_log(self, calls: Poster, *, inline: AbstractContextManager[None] | None) -> LogWriter:
        from celery_sharding.worker.log_writer import LogWriter  # as in `base`

        return LogWriter(self._connect, calls, inline=inline)
