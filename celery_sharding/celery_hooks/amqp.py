"""`app.amqp` with a router, a sender and queues that know shard groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from celery import Celery
from celery.app.amqp import Queues
from celery.utils.imports import symbol_by_name
from kombu.utils.objects import cached_property

from celery_sharding.celery_hooks.queues import ShardedQueues
from celery_sharding.publish.hook import send_sharded
from celery_sharding.publish.router import ShardRouter


class ShardedAMQPMixin:
    """Stands in front of the app's own class of `app.amqp`."""

    app: Any

    def Queues(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802  # Celery's name
        queues = super().Queues(*args, **kwargs)  # type: ignore[misc]
        queues.attach(self.app.sharding.settings)
        return queues

    def Router(self, queues: Any = None, create_missing: Any = None) -> Any:  # noqa: N802  # Celery's name
        stock = super().Router(queues, create_missing)  # type: ignore[misc]
        self.app.sharding.log_warnings()
        return ShardRouter(self.app.sharding.rules, stock.routes, stock.queues, stock.create_missing, app=stock.app)

    @cached_property
    def send_task_message(self) -> Callable[..., Any]:
        stock = super().send_task_message  # type: ignore[misc]
        sharding = self.app.sharding

        def send_task_message(producer: Any, name: str, message: Any, **options: Any) -> Any:
            return send_sharded(stock, sharding, producer, name, message, **options)

        return send_task_message


@dataclass(frozen=True, slots=True)
class ShardedAMQP:
    """Makes `app.amqp`; in place of a class, since Celery pickles it with the app, and a copy needs its groups, too."""

    stock: Any  # a subclass of AMQP, which is not typed
    sharding_class: Any
    groups: tuple[Any, ...]

    def __call__(self, app: Any) -> Any:
        """Return a new `app.amqp`; an app that is a copy gets its own `Sharding` now."""
        if "sharding" not in vars(app):
            self.sharding_class(app, self.groups)
        return _sharded_class(self.stock)(app=app)


@cache
def _sharded_class(stock: Any) -> Any:
    queues_cls: type = ShardedQueues
    if stock.queues_cls is not Queues:
        queues_cls = type(f"Sharded{stock.queues_cls.__name__}", (ShardedQueues, stock.queues_cls), {})
    return type(f"Sharded{stock.__name__}", (ShardedAMQPMixin, stock), {"queues_cls": queues_cls})


def replace_amqp(app: Celery) -> None:
    """Let `app.amqp` be of the sharded class, even if the app has used it already."""
    sharding: Any = app.sharding
    stock = symbol_by_name(app.amqp_cls)
    if isinstance(stock, ShardedAMQP):
        stock = stock.stock
    app.amqp_cls = ShardedAMQP(stock, type(sharding), sharding.own_groups)
    used = vars(app).get("amqp")
    if used is None:
        return
    used.__class__ = _sharded_class(stock)
    for cached in ("router", "send_task_message"):
        vars(used).pop(cached, None)
    queues = vars(used).get("queues")
    if queues is not None:
        queues.__class__ = used.queues_cls
        queues.attach(sharding.settings)
