"""Stamps that are called as options are: refused where they would decide where a message goes, else only stamps."""

from __future__ import annotations

import uuid

import pytest
from celery import Celery, chain, group
from celery.signals import before_task_publish

from celery_sharding import ShardGroup, Sharding
from celery_sharding.errors import UnsupportedOption


@pytest.fixture
def app() -> Celery:
    app = Celery("stamped", broker="memory://", set_as_current=False)
    app.conf.task_default_queue = f"plain-{uuid.uuid4().hex}"
    Sharding(app, groups=[ShardGroup("stamped", shards=2)])

    @app.task(shared=False, name="step", shard_group="stamped", shard_key="key")
    def step(key):
        pass

    @app.task(shared=False, name="plain")
    def plain(key):
        pass

    return app


PLACES = ["shard_key", "queue", "exchange", "exchange_type", "routing_key", "declare", "priority", "redelivered"]


@pytest.mark.parametrize("stamp", PLACES)
def test_a_stamp_that_takes_the_place_of_an_option_is_refused(app: Celery, stamp: str) -> None:
    step = app.tasks["step"].s("a")
    for signature in (step, chain(step, app.tasks["plain"].si("a")), group(step)):
        stamped = signature.clone()
        stamped.stamp(**{stamp: "x"})
        with pytest.raises(UnsupportedOption, match=rf"a stamp named '{stamp}'.*name the stamp otherwise") as caught:
            stamped.apply_async()
        assert (caught.value.task, caught.value.option) == ("step", stamp)


def test_a_key_beside_such_a_stamp_is_not_lost_in_silence(app: Celery) -> None:
    signature = app.tasks["step"].s("a").set(shard_key="k")
    signature.stamp(shard_key="x")
    with pytest.raises(UnsupportedOption, match="a stamp named 'shard_key'"):
        signature.apply_async()


@pytest.mark.parametrize("task", ["step", "plain"])
@pytest.mark.parametrize("stamp", ["shard_group", "shard_sent_at", "shard_message_id", "shard", "customer"])
def test_any_other_stamp_is_a_stamp(app: Celery, task: str, stamp: str) -> None:
    found: list[dict[str, object]] = []
    signature = app.tasks[task].s("a")
    signature.stamp(**{stamp: "x"})
    assert message_of(app, signature, found)["stamps"][stamp] in ("x", ["x"])
    assert found[0].get("shard_key") == ("a" if task == "step" else None)


def test_an_ordinary_task_may_have_a_stamp_named_as_our_key(app: Celery) -> None:
    found: list[dict[str, object]] = []
    signature = app.tasks["plain"].s("a")
    signature.stamp(shard_key="x")
    assert message_of(app, signature, found)["stamped_headers"] == ["shard_key"]


def message_of(app: Celery, signature, found: list[dict[str, object]]) -> dict[str, object]:
    """Publish, and return the headers of the message."""

    def note(headers: dict[str, object], **_: object) -> None:
        found.append(headers)

    before_task_publish.connect(note)
    try:
        signature.apply_async()
    finally:
        before_task_publish.disconnect(note)
    return found[0]
