"""Where the library's bootstep stands among Celery's: a new version that changes that must be noticed here."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

from celery import Celery
from celery.concurrency.base import BasePool, apply_target
from celery.worker.consumer import Consumer, Control, Gossip, Tasks

from celery_sharding import ShardGroup, Sharding
from celery_sharding.celery_hooks.requests import take_requests
from celery_sharding.celery_hooks.table import HOOKS, Stage
from celery_sharding.wire import RUN_ATTRIBUTES
from celery_sharding.worker.bootstep import ShardsStep
from celery_sharding.worker.consume.strays import Strays


def test_shards_are_given_up_before_celery_waits_for_the_broker_to_cancel_its_own_consumers() -> None:
    # Given a worker that consumes shards, commands and gossip
    app = Celery("shop", broker="amqp://", backend="cache+memory://", set_as_current=False)
    Sharding(app, groups=[ShardGroup("orders", shards=2)])
    worker = app.WorkController(pool="solo")
    # When it stops, which goes backwards
    names = [step.alias for step in reversed(worker.consumer.blueprint.order)]
    # Then its shards come first; not by chance, since what steps do not require is in no fixed order
    assert next(name for name in names if name in ("Shards", "Tasks", "Control", "Gossip")) == "Shards"
    assert {Tasks, Control, Gossip} <= set(ShardsStep.requires)


def test_a_worker_has_each_hook_once() -> None:
    # Given a worker without an event loop, of an app with groups
    app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    Sharding(app, groups=[ShardGroup("orders", shards=2)])
    worker = app.WorkController(pool="solo")
    consumer, pool = worker.consumer, worker.pool
    # Then what the table names is bent there, by what the table names, around Celery's own
    bent = {
        consumer.on_task_request: ("take_requests", worker.process_task),
        consumer.cancel_active_requests: ("start_nothing_when_cancelling", Consumer.cancel_active_requests),
        consumer.ensure_connected: ("connect_within_limits", Consumer.ensure_connected),
        consumer.perform_pending_operations: ("follow_rounds", Consumer.perform_pending_operations),
        pool.on_apply: ("surround_tasks", apply_target),
        pool.apply_async: ("guard_exits", BasePool.apply_async),
    }
    installed = {hook.by.partition(":")[2] for hook in HOOKS[Stage.WORKER]}
    for function, (by, stock) in bent.items():
        assert by in installed
        assert function.__qualname__.startswith(f"{by}.<locals>")
        within = inspect.getclosurevars(function).nonlocals["stock"]
        assert getattr(within, "__func__", within) == getattr(stock, "__func__", stock)


def test_an_ordinary_message_has_no_lane_to_wait_in_whatever_its_headers_say() -> None:
    # Given a message from an ordinary queue with the attributes of a sharded run, which another app handed on
    headers = dict.fromkeys(RUN_ATTRIBUTES, "orders/3") | {"trace": "1"}
    request = SimpleNamespace(message=SimpleNamespace(delivery_info={}), name="mail", request_dict=headers)
    handed_on: list[Any] = []
    consumer = SimpleNamespace(on_task_request=handed_on.append)
    take_requests(SimpleNamespace(consumer=consumer, strays=Strays({})))  # type: ignore[arg-type]
    # When Celery hands its request on
    consumer.on_task_request(request)
    # Then they are gone
    assert handed_on == [request]
    assert headers == {"trace": "1"}
