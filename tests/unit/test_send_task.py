"""`app.send_task`: whoever has put something of his own in its place keeps it, for ordinary and sharded tasks alike."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from celery.signals import before_task_publish
from kombu.transport.memory import Transport

from celery_sharding import ShardGroup, Sharding
from celery_sharding.errors import BackendUnavailable


def make_app(cls: type[Celery] = Celery) -> Celery:
    app = cls("shop", broker="memory://", set_as_current=False)
    app.conf.task_default_queue = f"plain-{uuid.uuid4().hex}"
    return app


def add_tasks(app: Celery) -> list[Any]:
    def pay(order_id: int) -> None: ...

    sharded = app.task(shared=False, name="sharded", shard_group="send-task", shard_key="order_id")(pay)
    return [app.task(shared=False, name="plain")(pay), sharded]


def test_a_subclass_of_celery_may_take_fewer_arguments_by_position() -> None:
    seen: list[str] = []

    class Tenant(Celery):
        def send_task(self, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
            seen.append(name)
            return super().send_task(name, args, kwargs, **options)

    app = make_app(Tenant)
    Sharding(app, groups=[ShardGroup("send-task", shards=1)])
    for task in add_tasks(app):
        task.delay(1)
        task.apply_async((1,), task_id="own")
        app.send_task(name=task.name, args=(1,))
    assert seen == 3 * ["plain"] + 3 * ["sharded"]


def test_what_stood_on_the_app_before_is_still_called() -> None:
    app, seen = make_app(), []
    stock = app.send_task

    def send_task(name: str, *args: Any, **options: Any) -> Any:
        seen.append(name)
        return stock(name, *args, **options)

    app.send_task = send_task
    Sharding(app, groups=[ShardGroup("send-task", shards=1)])
    for task in add_tasks(app):
        task.delay(1)
    assert seen == ["plain", "sharded"]


def test_a_task_that_is_sent_by_its_name_before_it_was_made_leaves_for_its_group() -> None:
    # Given an app that nobody has finalized
    app, seen = make_app(), []
    Sharding(app, groups=[ShardGroup("send-task", shards=1)])
    add_tasks(app)

    def note(exchange: str, **_: Any) -> None:
        seen.append(exchange)

    before_task_publish.connect(note)
    try:
        # When tasks are sent by their names, one of them that this process does not have
        for name in ("sharded", "plain", "elsewhere"):
            app.send_task(name, (1,))
    finally:
        before_task_publish.disconnect(note)
    # Then the sharded one goes to its group
    assert seen == ["shards.send-task", "", ""]


def test_an_app_that_must_not_be_finalized_by_itself_may_still_send_by_name() -> None:
    app = make_app()
    app.autofinalize = False
    Sharding(app, groups=[ShardGroup("send-task", shards=1)])
    app.send_task("elsewhere", (1,))
    assert not app.finalized


CALLS: list[Callable[[Celery], Any]] = [
    lambda app: app.send_task("sharded", (1,), None, None, None, "own"),
    lambda app: app.send_task("sharded", (1,), task_id="own"),
    lambda app: app.send_task("sharded", (1,)),
]


@pytest.mark.parametrize("known", [(), (OSError,)], ids=["as it is", "raised anew by kombu"])
@pytest.mark.parametrize("call", CALLS)
def test_the_error_of_a_backend_names_the_task(
    call: Callable[[Celery], Any], known: tuple[type[Exception], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Transport, "recoverable_connection_errors", known, raising=False)
    app = make_app()
    app.conf.broker_url = f"memory:///{uuid.uuid4().hex}"  # with connections of its own, which have not asked yet
    Sharding(app, groups=[ShardGroup("send-task", shards=1)])
    add_tasks(app)

    def on_task_call(producer: Any, task_id: str) -> None:
        raise OSError(f"no backend for {task_id}")

    monkeypatch.setattr(app.backend, "on_task_call", on_task_call)
    with pytest.raises(BackendUnavailable) as caught:
        call(app)
    assert f"no backend for {caught.value.task_id}" in str(caught.value)
