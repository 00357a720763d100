"""A task message on its way to its group, and what publishing it needs of the application."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from celery_sharding.config import Settings
from celery_sharding.publish.patience import patience_seconds
from celery_sharding.rabbitmq.connect import Broker


class Application(Broker, Protocol):
    """The Celery app, its configuration, and its broker."""

    @property
    def app(self) -> Any: ...

    @property
    def settings(self) -> Settings: ...

    @property
    def consumer_thread(self) -> int | None:
        """The thread that consumes, in the main process of a worker; else None."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message for a group.

    Attributes:
        properties: Of AMQP, beside those that have a field of their own.
        timeout_seconds: From the call to the confirm; None: as configured.
        retry_options: `retry` and `retry_policy` of the call; see `patience`.
    """

    group: str
    key: str
    payload: bytes
    content_type: str
    content_encoding: str
    headers: dict[str, Any]
    properties: dict[str, Any]
    timeout_seconds: float | None = None
    retry_options: Mapping[str, Any] = field(default_factory=dict)

    def patience_seconds(self, application: Application) -> float:
        """Return how long its publish, made now in this thread, may be tried again; see `patience`."""
        conf, consumer_thread = application.app.conf, application.consumer_thread
        return patience_seconds(conf, self.retry_options, consumer_thread=consumer_thread)

    @property
    def task_id(self) -> str | None:
        return self.headers.get("id") or self.properties.get("correlation_id")

    @property
    def label(self) -> str:
        """What errors call it."""
        return f"task {self.headers.get('task')}[{self.task_id}] of group {self.group!r}"
