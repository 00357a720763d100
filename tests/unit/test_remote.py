"""What the library reads of Celery's remote control: if one of these fails, Celery has changed."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery
from celery.worker.control import Panel

from celery_sharding import ShardGroup, Sharding
from celery_sharding.celery_hooks.commands import install_commands
from celery_sharding.errors import ConfigurationError, UnknownShard
from celery_sharding.shard_names import with_shards, without_shards

COMMANDS = ["cancel_consumer", "add_consumer"]


class Groups:
    """Stands in for the worker's groups: takes note of what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, int | None]] = []

    def cancel_shards(self, group: str, index: int | None) -> bool:
        self.told.append(("cancel", group, index))
        return True

    def add_shards(self, group: str, index: int | None, *, by_name: bool) -> frozenset[int] | None:
        if index is not None and index > 7:
            raise UnknownShard(f"there is no {group}.{index:03d}")
        self.told.append(("add", group, index))
        return None if index is None else frozenset({index})


class Consumer:
    """Stands in for Celery's consumer: takes note of what Celery's own commands ask of it."""

    def __init__(self) -> None:
        self.shards = Groups()
        self.asked: list[tuple[str, str]] = []

    def call_soon(self, call: Any, *arguments: Any, **options: Any) -> None:
        call(*arguments, **options)

    def cancel_task_queue(self, queue: str) -> None:
        self.asked.append(("cancel", queue))

    def add_task_queue(self, queue: str, *_: Any, **options: Any) -> None:
        self.asked.append(("add", queue))


class State:
    def __init__(self) -> None:
        self.app = Celery("shop", broker="memory://", set_as_current=False)
        Sharding(self.app, groups=[ShardGroup("orders", shards=8)])
        self.consumer = Consumer()


@pytest.fixture
def state() -> State:
    install_commands()
    return State()


def test_commands_that_name_groups_and_shards_go_to_the_step(state: State) -> None:
    # Given the commands as Celery calls them
    cancel, add = (Panel.data[name] for name in COMMANDS)
    # When they name a group, or a shard in either way
    replies = [cancel(state, queue="orders"), cancel(state, "orders.003"), add(state, queue="orders/3")]
    # Then the step is told, and Celery's consumer is not
    assert state.consumer.shards.told == [("cancel", "orders", None), ("cancel", "orders", 3), ("add", "orders", 3)]
    assert state.consumer.asked == []
    assert replies[0] == {"ok": "no longer consuming from orders"}
    assert "there is no orders.099" in add(state, queue="orders.099")["error"]


def test_commands_that_name_other_queues_are_celerys(state: State) -> None:
    # Given the commands, called as `app.control` does, when they name ordinary queues
    cancel, add = (Panel.data[name] for name in COMMANDS)
    replies = [
        cancel(state, queue="mails"),
        add(state, queue="mails", exchange=None, exchange_type="direct", routing_key=None),
    ]
    # Then Celery's consumer is asked, and Celery replies
    assert state.consumer.asked == [("cancel", "mails"), ("add", "mails")]
    assert replies == [{"ok": "no longer consuming from mails"}, {"ok": "add consumer mails"}]
    assert state.consumer.shards.told == []


def test_the_commands_are_installed_once_and_described_as_celerys(state: State) -> None:
    # Given the commands, when they are installed again
    before = [Panel.data[name] for name in COMMANDS]
    install_commands()
    # Then nothing is put in front of them twice, and the command line still knows their arguments
    assert [Panel.data[name] for name in COMMANDS] == before
    assert [Panel.meta[name].args[0] for name in COMMANDS] == [("queue", str)] * 2
    assert all(Panel.meta[name].help and Panel.meta[name].signature for name in COMMANDS)


def test_workers_can_be_asked_for_their_shards_and_the_command_line_knows_it(state: State) -> None:
    # Given what Celery's command line goes by
    assert (Panel.meta["shards"].type, Panel.meta["shards"].visible) == ("inspect", True)
    # When a worker is asked, then its step answers, and one without groups says so
    state.consumer.shards.roles = lambda: {"orders": {"shards.orders.g001.000": "owner"}}  # type: ignore[attr-defined]
    assert Panel.data["shards"](state) == {"orders": {"shards.orders.g001.000": "owner"}}
    del state.consumer.shards
    assert Panel.data["shards"](state) == {}


def test_the_consumer_still_has_what_the_commands_and_the_step_take_hold_of() -> None:
    # Given Celery's consumer, then what is wrapped or called by name is there
    from celery.worker.consumer import Consumer as CelerysConsumer

    for name in ("cancel_task_queue", "add_task_queue", "cancel_active_requests", "call_soon"):
        assert callable(getattr(CelerysConsumer, name))


def test_a_queue_with_the_name_of_a_shard_is_refused_whoever_makes_it(state: State) -> None:
    # Given an app's queues, when one is made that has the name of a group or shard, then it is refused
    for name in ("orders", "orders.003", "orders/3"):
        with pytest.raises(ConfigurationError, match="is the shard group"):
            state.app.amqp.queues.select_add(name, exchange=name, exchange_type="direct", routing_key=None)
    assert "orders" not in state.app.amqp.queues


def test_shards_are_taken_out_of_a_selection_and_put_back() -> None:
    # Given all shards of four, when one is taken out and put back, then it is all again
    three = without_shards(None, 3, 4)
    assert three == {0, 1, 2}
    assert with_shards(three, 3, 4) is None
    # When all are taken out, then none is left, and one comes back alone
    assert without_shards(three, None, 4) == frozenset()
    assert with_shards(frozenset(), 2, 4) == {2}
    assert with_shards(three, None, 4) is None
