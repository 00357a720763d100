"""Where the library's bootstep stands among Celery's: a new version that changes that must be noticed here."""

from __future__ import annotations

from celery import Celery
from celery.worker.consumer import Control, Gossip, Tasks

from celery_sharding import ShardGroup, Sharding
from celery_sharding.worker.step import ShardsStep


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
