"""Where the library's bootstep stands among Celery's: a new version that changes that must be noticed here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from celery import Celery
from celery.worker.consumer import Control, Gossip, Tasks

from celery_sharding import ShardGroup, Sharding
from celery_sharding.wire import RUN_ATTRIBUTES
from celery_sharding.worker.bootstep import ShardsStep
from celery_sharding.worker.celery_hooks.strays import Strays


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
    step = SimpleNamespace(_strays=Strays({}))
    headers = dict.fromkeys(RUN_ATTRIBUTES, "orders/3") | {"trace": "1"}
    request = SimpleNamespace(message=SimpleNamespace(delivery_info={}), name="mail", request_dict=headers)
    handed_on: list[Any] = []
    # When Celery hands its request on
    ShardsStep._wrap(step, handed_on.append)(request)  # type: ignore[arg-type]
    # Then they are gone
    assert handed_on == [request]
    assert headers == {"trace": "1"}
