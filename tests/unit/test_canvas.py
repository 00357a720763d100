"""Sharded tasks in chains, groups, chords, links, beat, and called from tasks: what really leaves and runs.

A worker on the embedded broker runs them. Each task notes the exchange and the key that its message came with.
"""

from __future__ import annotations

import queue
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery, _state, chain, chord, group
from celery.beat import Service
from celery.contrib.testing.worker import start_worker
from celery.worker import state as worker_state

from celery_sharding import ShardGroup, Sharding
from celery_sharding.errors import ShardKeyError

pytestmark = pytest.mark.timeout(60)


class Shop:
    """An app with one group, sharded and ordinary tasks, and what they were sent with."""

    def __init__(self, **conf: Any) -> None:
        self.group = f"t{uuid.uuid4().hex[:12]}"
        self.ran: queue.Queue[tuple[str, Any, Any]] = queue.Queue()
        self.app = Celery(self.group, broker="memory://", backend="cache+memory://", set_as_current=False)
        self.app.conf.update(
            task_default_queue=f"{self.group}-plain",
            broker_transport_options={"polling_interval": 0.01},
            result_chord_retry_interval=0.1,
            **conf,
        )
        Sharding(self.app, groups=[ShardGroup(self.group, shards=2)])
        shop = self

        def pay(self, key, number=0):
            shop.note(self)
            return number + 1

        def total(self, numbers, key="total"):
            shop.note(self)
            return sum(numbers)

        def plain(self, *args):
            shop.note(self)
            return args[0] if args else None

        def fail(self, key):
            shop.note(self)
            raise ValueError("no luck")

        def failed(self, request, exc, traceback):
            shop.note(self)

        def parent(self, key):
            shop.pay.delay(f"{key}-child", 1)
            shop.plain.delay()
            shop.note(self)

        def moved(self, key):
            raise self.replace(shop.pay.s(f"{key}-moved", 5))

        self.pay, self.total, self.fail = self.sharded(pay), self.sharded(total), self.sharded(fail)
        self.parent, self.moved = self.sharded(parent), self.sharded(moved)
        self.failed = self.sharded(failed, shard_key=lambda a: "errors")
        self.plain = self.app.task(bind=True, shared=False, name="plain")(plain)

    def sharded(self, function: Any, **options: Any) -> Any:
        options = {"shard_group": self.group, "shard_key": "key", **options}
        return self.app.task(bind=True, shared=False, name=function.__name__, **options)(function)

    def note(self, task: Any) -> None:
        info = task.request.delivery_info
        self.ran.put(
            (task.name, info["exchange"] == f"shards.{self.group}" and info["routing_key"], info.get("priority"))
        )

    def wait_for(self, count: int) -> list[tuple[str, Any]]:
        return [self.ran.get(timeout=20)[:2] for _ in range(count)]


@pytest.fixture
def shop() -> Shop:
    """A shop of which nothing runs."""
    return Shop()


@pytest.fixture(scope="module", params=[False, True], ids=["", "inherited priority"])
def open_shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """A shop whose worker runs all the time; a test takes what it put in."""
    shop = Shop(task_inherit_parent_priority=request.param)
    with worker_of(shop):
        yield shop


@contextmanager
def worker_of(shop: Shop) -> Iterator[None]:
    """Run a worker in a thread, and undo what it sets in this process for good."""
    default = _state.default_app
    worker_state.should_stop = None
    with start_worker(shop.app, pool="threads", concurrency=4, perform_ping_check=False) as worker:
        yield
        worker_state.should_stop = 0
        for _ in range(3):  # its loop looks for its end when a message comes, or every two seconds
            shop.plain.delay()
        assert worker.blueprint.shutdown_complete.wait(20)
    worker_state.should_stop = None
    _state.set_default_app(default)
    _state._set_current_app(default)


def test_every_link_of_a_chain_goes_by_its_own_key(open_shop: Shop) -> None:
    # Given a chain of sharded and ordinary tasks
    result = chain(
        open_shop.pay.s("a", 1), open_shop.plain.s(), open_shop.pay.si("b", 7), open_shop.pay.s(number=1)
    ).apply_async()
    # When it has run, then each came by its group and key, results being arguments as ever
    assert open_shop.wait_for(4) == [("pay", "a"), ("plain", False), ("pay", "b"), ("pay", "8")]
    assert result.get(timeout=10, disable_sync_subtasks=False) == 2


def test_groups_and_chords_go_by_the_keys_of_their_members(open_shop: Shop) -> None:
    members = group(open_shop.pay.s("a", 1), open_shop.pay.s("b", 2), open_shop.plain.s(3))
    members.apply_async()
    assert sorted(open_shop.wait_for(3), key=str) == [("pay", "a"), ("pay", "b"), ("plain", False)]

    result = chord(members)(open_shop.total.s())
    assert sorted(open_shop.wait_for(4), key=str) == [("pay", "a"), ("pay", "b"), ("plain", False), ("total", "total")]
    assert result.get(timeout=10, disable_sync_subtasks=False) == 8


def test_links_and_error_links_go_by_their_own_keys(open_shop: Shop) -> None:
    open_shop.pay.apply_async(("a", 1), link=open_shop.pay.si("linked", 2))
    assert open_shop.wait_for(2) == [("pay", "a"), ("pay", "linked")]

    open_shop.fail.apply_async(("a",), link_error=open_shop.pay.si("cleanup", 1))
    assert open_shop.wait_for(2) == [("fail", "a"), ("pay", "cleanup")]


def test_tasks_called_by_tasks_and_in_place_of_them_go_by_their_own_keys(open_shop: Shop) -> None:
    # In place of them: at the tail of the other key
    open_shop.parent.delay("a")
    assert sorted(open_shop.wait_for(3), key=str) == [("parent", "a"), ("pay", "a-child"), ("plain", False)]

    result = open_shop.moved.delay("a")
    assert open_shop.wait_for(1) == [("pay", "a-moved")]
    assert result.get(timeout=10, disable_sync_subtasks=False) == 6


def test_keys_given_in_a_signature_travel_with_it(open_shop: Shop) -> None:
    signature = open_shop.pay.s("a", 1).set(shard_key="explicit")
    chain(
        open_shop.plain.si(), open_shop.pay.si("x", 1).set(shard_key="second"), signature.set(immutable=True)
    ).apply_async()
    assert open_shop.wait_for(3) == [("plain", False), ("pay", "second"), ("pay", "explicit")]


def test_a_priority_handed_down_from_the_parent_is_dropped(open_shop: Shop) -> None:
    # When ordinary tasks with a priority call, link and chain sharded ones
    open_shop.plain.apply_async((), priority=5, link=open_shop.pay.si("linked", 1))
    chain(open_shop.plain.si().set(priority=5), open_shop.pay.si("chained", 1), open_shop.plain.si()).apply_async()
    found = [open_shop.ran.get(timeout=20) for _ in range(5)]
    # Then those run, and have none
    assert sorted(key for name, key, _ in found if name == "pay") == ["chained", "linked"]
    assert all(priority in (None, 0) for name, _, priority in found if name == "pay")
    assert 5 in {priority for name, _, priority in found if name == "plain"}


def test_entries_of_beat_go_by_their_keys(open_shop: Shop, tmp_path) -> None:
    # Given entries with a key in the arguments, and one in the options
    open_shop.app.conf.beat_schedule = {
        "arguments": {"task": "pay", "schedule": 3600, "kwargs": {"key": "nightly"}},
        "options": {"task": "pay", "schedule": 3600, "args": ("x",), "options": {"shard_key": "explicit"}},
    }
    scheduler = Service(open_shop.app, schedule_filename=str(tmp_path / "schedule")).get_scheduler(lazy=True)
    scheduler.setup_schedule()
    # When beat sends them
    for name in ("arguments", "options"):
        scheduler.apply_async(scheduler.schedule[name], advance=False)
    scheduler.close()
    assert sorted(open_shop.wait_for(2)) == [("pay", "explicit"), ("pay", "nightly")]


def test_a_chain_that_begins_without_a_key_raises_at_the_caller(shop: Shop) -> None:
    with pytest.raises(ShardKeyError):
        chain(shop.pay.s(None), shop.plain.s()).apply_async()
    with pytest.raises(ShardKeyError):
        group(shop.pay.s(None)).apply_async()


def test_stamps_travel_with_sharded_tasks(shop: Shop) -> None:
    signature = shop.pay.s("a", 1)
    signature.stamp(tenant="t1")
    signature.apply_async()
    with shop.app.connection_for_read() as connection:
        queues = [f"shards.{shop.group}.g001.{index:03d}" for index in (0, 1)]
        (message,) = filter(None, (connection.default_channel.basic_get(name, no_ack=True) for name in queues))
    assert message.headers["stamps"] == {"tenant": "t1"}
    assert message.headers["shard_key"] == "a"


def test_eager_tasks_run_as_ever(shop: Shop) -> None:
    # Given an app that runs its tasks at once
    shop.app.conf.task_always_eager = True
    shop.app.conf.task_eager_propagates = True
    # When they are called in every way, then they run, and publish nothing; keys are not looked at
    assert shop.pay.delay("a", 1).get() == 2
    assert shop.pay.apply_async(("a", 1), shard_key="k").get() == 2
    assert chain(shop.pay.s("a", 1), shop.pay.s(number=4)).apply_async().get() == 5
    assert shop.pay.apply(("a", 1)).get() == 2
    with shop.app.connection_for_read() as connection:
        assert connection.default_channel.basic_get(f"shards.{shop.group}.g001.000") is None
