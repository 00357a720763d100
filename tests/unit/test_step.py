"""Where the library's bootstep stands among Celery's: a new version that changes that must be noticed here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from celery import Celery
from celery.worker.consumer import Control, Gossip, Tasks

from celery_sharding import ShardGroup, Sharding
from celery_sharding.celery_hooks.requests import take_requests
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
