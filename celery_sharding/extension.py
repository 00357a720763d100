"""`Sharding(app)`: the one place that wires everything into a Celery app.

What is touched, all of it through public hooks:

    app.amqp_cls            makes a subclass of what it was: its router asks for sharded tasks first, its sender
                            confirms them, its queues know the groups named by -Q and -X
    app.steps["consumer"]   the bootsteps that consume shards in a worker, and tell that it lives; loaded only there
    app.annotations         also put our checks in front of each task's `apply`, which is what runs in eager mode
    app.conf                shows our settings without their passwords
    app.Worker              ends with one line where a setting or an option of ours is wrong
    app.send_task           names what a result backend raises that Celery asks before it publishes a sharded task
    app.sharding            this object

Nothing here reads the configuration, opens a connection or finalizes the app: all of it happens at the first publish,
or when a worker starts. So `Sharding(app)` may stand before or after the configuration and the tasks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from celery import Celery
from celery.app.amqp import Queues
from celery.utils.imports import symbol_by_name
from kombu import Connection
from kombu.utils.objects import cached_property as amqp_property

from celery_sharding.brokers import open_backing
from celery_sharding.brokers.base import Backing
from celery_sharding.celery_hooks.app_settings import mask_settings
from celery_sharding.celery_hooks.eager import check_eager_calls
from celery_sharding.celery_hooks.result_backend import name_backend_errors
from celery_sharding.celery_hooks.worker_start import tell_start_errors
from celery_sharding.config import Settings, ShardGroup, read_settings, suggest
from celery_sharding.dedup.mark import deduplicated_tasks
from celery_sharding.errors import ConfigurationError
from celery_sharding.publish.hook import PublishWatcher, send_sharded
from celery_sharding.publish.router import ShardRouter, TaskRules
from celery_sharding.selection import Selection, ShardedQueues
from celery_sharding.setting_names import check_names

logger = logging.getLogger(__name__)

STEPS = ("celery_sharding.worker.bootstep:ShardsStep", "celery_sharding.worker.liveness_file:HeartbeatStep")


class Sharding:
    """Adds shard groups to a Celery app.

    Args:
        app: Any Celery app, configured or not.
        groups: Groups given in code, beside those of the setting `sharding_groups`.

    Attributes:
        publish_watcher: For instrumentation; None: nobody watches what is published.
        consumer_thread: The thread that consumes, in the main process of a worker; else None.

    Raises:
        ConfigurationError: Two groups have one name, or the app has a `Sharding` already.
    """

    def __init__(self, app: Celery, groups: Iterable[ShardGroup] = ()) -> None:
        if "sharding" in vars(app):
            raise ConfigurationError(f"app {app.main!r} has a Sharding already; give it all groups at once")
        self._groups = tuple(groups)
        read_settings({}, self._groups)
        self.app = app
        self.publish_watcher: PublishWatcher | None = None
        self.consumer_thread: int | None = None
        self.rules = TaskRules(self)
        self._backing: Backing | None = None
        self._lock = threading.Lock()
        self._has_told_doubts = False
        app.sharding = self
        mask_settings(app.conf)
        app.on_after_configure.connect(self._mask_settings)  # of a configuration that replaces it
        app.steps["consumer"].update(STEPS)
        _replace_amqp(app, self._groups)
        check_eager_calls(app)
        name_backend_errors(app, self.group_of)
        tell_start_errors(app)

    @cached_property
    def settings(self) -> Settings:
        """The checked configuration; read when it is first needed.

        Raises:
            ConfigurationError: It is wrong; the message says where.
        """
        return read_settings(self.app.conf, self._groups)

    @property
    def doubts(self) -> tuple[str, ...]:
        """What may be a mistake in the settings, though it could be meant."""
        return check_names(self.app.conf)

    def _mask_settings(self, source: Any, **_: Any) -> None:
        mask_settings(source)

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
        rule = self.rules.rule_for(task_name, self._find_task(task_name))
        return None if rule is None else rule.group.name

    def _find_task(self, name: str) -> Any | None:
        """Return the task of this name; None in a process that does not have it.

        Until an app is finalized, its tasks are not made, and nobody knows their names: one that is sent by its name
        would leave unsharded. Celery's `send_task` does not finalize; an app that must not be by itself is left alone.
        """
        app = self.app
        task = app._tasks.get(name)
        if task is None and (app.finalized or app.autofinalize):
            app.finalize(auto=True)  # waits, if another thread has not finished it
            task = app._tasks.get(name)
        return task

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

    def tell_doubts(self, more: Iterable[str] = (), *, worker: bool = False) -> None:
        """Log what may be a mistake: in the settings, once in a process, and `more`.

        Not when settings are read: a worker reads them before it has a log.

        Args:
            worker: A worker starts; it has the tasks that it is to run, so routes to others can be told, too.
        """
        doubts = list(more)
        if worker:
            doubts += self.find_idle_routes(self.selection())
        if not self._has_told_doubts:
            self._has_told_doubts = True
            doubts += self.doubts
        for doubt in doubts:
            logger.warning("%s", doubt)

    def find_idle_routes(self, groups: Container[str]) -> list[str]:
        """Return what is to be said of routes to these groups that no task of this process takes."""
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


class ShardedAMQPMixin:
    """Celery's `app.amqp` with a router, a sender and queues that know shard groups."""

    app: Any

    def Queues(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802  # Celery's name
        queues = super().Queues(*args, **kwargs)  # type: ignore[misc]
        queues.attach(self.app.sharding.settings)
        return queues

    def Router(self, queues: Any = None, create_missing: Any = None) -> Any:  # noqa: N802  # Celery's name
        stock = super().Router(queues, create_missing)  # type: ignore[misc]
        self.app.sharding.tell_doubts()
        return ShardRouter(self.app.sharding.rules, stock.routes, stock.queues, stock.create_missing, app=stock.app)

    @amqp_property
    def send_task_message(self) -> Callable[..., Any]:
        stock = super().send_task_message  # type: ignore[misc]
        sharding: Sharding = self.app.sharding

        def send_task_message(producer: Any, name: str, message: Any, **options: Any) -> Any:
            return send_sharded(stock, sharding, producer, name, message, **options)

        return send_task_message


@dataclass(frozen=True, slots=True)
class ShardedAMQP:
    """Makes `app.amqp`; in place of a class, since Celery pickles it with the app, and a copy needs its groups, too."""

    stock: Any  # a subclass of AMQP, which is not typed
    groups: tuple[ShardGroup, ...]

    def __call__(self, app: Any) -> Any:
        """Return a new `app.amqp`; an app that is a copy gets its own `Sharding` now."""
        if "sharding" not in vars(app):
            Sharding(app, self.groups)
        return _sharded_class(self.stock)(app=app)


@cache
def _sharded_class(stock: Any) -> Any:
    queues_cls: type = ShardedQueues
    if stock.queues_cls is not Queues:
        queues_cls = type(f"Sharded{stock.queues_cls.__name__}", (ShardedQueues, stock.queues_cls), {})
    return type(f"Sharded{stock.__name__}", (ShardedAMQPMixin, stock), {"queues_cls": queues_cls})


def _replace_amqp(app: Any, groups: tuple[ShardGroup, ...]) -> None:
    """Let `app.amqp` be of the sharded class, also if the app has used it already."""
    stock = symbol_by_name(app.amqp_cls)
    if isinstance(stock, ShardedAMQP):
        stock = stock.stock
    app.amqp_cls = ShardedAMQP(stock, groups)
    used = vars(app).get("amqp")
    if used is None:
        return
    used.__class__ = _sharded_class(stock)
    for cached in ("router", "send_task_message"):
        vars(used).pop(cached, None)
    queues = vars(used).get("queues")
    if queues is not None:
        queues.__class__ = used.queues_cls
        queues.attach(app.sharding.settings)


def _place(connection: Any) -> tuple[str, int, str]:
    """Return host, port and virtual host of a connection, defaults filled in."""
    host = connection.hostname or "localhost"
    port = connection.port or connection.transport.default_port or 0
    return ("127.0.0.1" if host == "localhost" else host, int(port), connection.virtual_host or "/")
