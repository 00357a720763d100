"""`Sharding(app)`: the one place that wires everything into a Celery app.

What it changes on the app:

    app.sharding            this object
    app.steps["consumer"]   gains the bootsteps of a worker: one consumes shards, one says that it lives
    app's hooks             `celery_hooks.table` lists them

Nothing here reads the configuration, opens a connection or finalizes the app: all of it happens at the first publish,
or when a worker starts. So `Sharding(app)` may stand before or after the configuration and the tasks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Container, Iterable
from functools import cached_property
from typing import Any

from celery import Celery
from kombu import Connection

from celery_sharding.brokers import open_backing
from celery_sharding.brokers.base import Backing
from celery_sharding.celery_hooks.installer import install_hooks
from celery_sharding.celery_hooks.queues import Selection
from celery_sharding.celery_hooks.table import Stage
from celery_sharding.celery_hooks.tasks import find_task
from celery_sharding.config import Settings, ShardGroup, read_settings, suggest
from celery_sharding.dedup.mark import deduplicated_tasks
from celery_sharding.errors import ConfigurationError
from celery_sharding.publish.hook import PublishWatcher
from celery_sharding.publish.router import TaskRules
from celery_sharding.setting_names import check_names

logger = logging.getLogger(__name__)

STEPS = ("celery_sharding.worker.bootstep:ShardsStep", "celery_sharding.worker.liveness_file:HeartbeatStep")


class Sharding:
    """Adds shard groups to a Celery app.

    Args:
        app: Any Celery app, configured or not.
        groups: Groups given in code, beside those of the setting `sharding_groups`.

    Attributes:
        own_groups: The groups given in code.
        publish_watcher: For instrumentation; None: nobody watches what is published.
        consumer_thread: The thread that consumes, in the main process of a worker; else None.

    Raises:
        ConfigurationError: Two groups have one name, or the app has a `Sharding` already.
    """

    def __init__(self, app: Celery, groups: Iterable[ShardGroup] = ()) -> None:
        if "sharding" in vars(app):
            raise ConfigurationError(f"app {app.main!r} has a Sharding already; give it all groups at once")
        self.own_groups = tuple(groups)
        read_settings({}, self.own_groups)
        self.app = app
        self.publish_watcher: PublishWatcher | None = None
        self.consumer_thread: int | None = None
        self.rules = TaskRules(self)
        self._backing: Backing | None = None
        self._lock = threading.Lock()
        self._has_warned = False
        app.sharding = self
        app.steps["consumer"].update(STEPS)
        install_hooks(Stage.APP, app)

    @cached_property
    def settings(self) -> Settings:
        """The checked configuration; read when it is first needed.

        Raises:
            ConfigurationError: It is wrong; the message says where.
        """
        return read_settings(self.app.conf, self.own_groups)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What may be a mistake in the settings, though it may be meant."""
        return check_names(self.app.conf)

    def connect(self) -> Connection:
        """Return a new, unconnected connection to the broker."""
        connection: Connection = self.app.connection_for_write()
        return connection

    def backing(self) -> Backing:
        """Return what stands behind the groups: RabbitMQ, or an embedded broker.

        Raises:
            UnsupportedBroker: The transport can't keep the order.
        """
        if self._backing is None:
            with self._lock:
                if self._backing is None:
                    self._backing = open_backing(self)
        return self._backing

    def is_sharded(self, task_name: str) -> bool:
        """Say whether the tasks of this name belong to a group."""
        return self.group_of(task_name) is not None

    def group_of(self, task_name: str) -> str | None:
        """Return the group of the tasks of this name, None if they are not sharded."""
        rule = self.rules.rule_for(task_name, find_task(self.app, task_name))
        return None if rule is None else rule.group.name

    def is_own_broker(self, connection: Any) -> bool:
        """Say whether a kombu connection leads to the app's broker; names of hosts are compared, not addresses."""
        return _place(connection) in self._places

    @cached_property
    def _places(self) -> frozenset[tuple[str, int, str]]:
        own = self.connect()
        return frozenset(_place(Connection(url)) for url in own.alt) | {_place(own)}

    def selection(self) -> Selection:
        """Return group name → shard indexes that this worker consumes, None for all."""
        return self.app.amqp.queues.selection()  # type: ignore[no-any-return]

    def log_warnings(self, more: Iterable[str] = (), *, worker: bool = False) -> None:
        """Log what may be a mistake: in the settings, once per process, and `more`.

        Reading the settings does not log it: a worker reads them before it has a log.

        Args:
            worker: A worker starts. It has all its tasks, so routes that fit none of them are logged, too.
        """
        warnings = list(more)
        if worker:
            warnings += self.find_idle_routes(self.selection())
        if not self._has_warned:
            self._has_warned = True
            warnings += self.warnings
        for warning in warnings:
            logger.warning("%s", warning)

    def find_idle_routes(self, groups: Container[str]) -> list[str]:
        """Return a warning for each route to these groups that fits no task of this process."""
        names = [name for name in self.app.tasks if not name.startswith("celery.")]
        return [
            f"sharding_routes[{route.pattern!r}] fits no task that is registered here{suggest(route.pattern, names)}"
            for route in self.settings.routes
            if route.group in groups and not any(route.fits(name) for name in self.app.tasks)
        ]

    def check_stores(self, *, has_child_processes: bool) -> None:
        """Check, when a worker starts, that deduplicated tasks have a store for their claims.

        Args:
            has_child_processes: The worker's pool runs tasks in processes of their own.

        Raises:
            NoUsableStore: The result backend can't hold claims.
        """
        if deduplicated_tasks(self.app):
            from celery_sharding.dedup.stores import check_tasks

            check_tasks(self.app, has_child_processes=has_child_processes)


def _place(connection: Any) -> tuple[str, int, str]:
    """Return host, port and virtual host of a connection, defaults filled in."""
    host = connection.hostname or "localhost"
    port = connection.port or connection.transport.default_port or 0
    return ("127.0.0.1" if host == "localhost" else host, int(port), connection.virtual_host or "/")
