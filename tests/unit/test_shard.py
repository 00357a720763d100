"""One shard: what it is delivered, what it acknowledges, and what it leaves to the next owner."""

from __future__ import annotations

from typing import Any

import pytest

from celery_sharding.wire import CONTROL_HEADER
from support.stand_ins import Owner

JOURNAL = "shards.orders.journal"


@pytest.fixture
def owner() -> Owner:
    return Owner()


def handovers(owner: Owner) -> list[Any]:
    return [event["change"] for event in owner.services.log.to(JOURNAL)]


def test_a_standby_becomes_the_owner_with_its_first_delivery_and_says_so_once(owner: Owner) -> None:
    assert not owner.shard.owned
    owner.channel.deliver_task("a", "a")
    owner.channel.deliver_task("b", "b")
    assert owner.shard.owned
    assert handovers(owner) == ["taken"]


def test_a_probe_tells_a_worker_that_it_is_the_owner_and_is_acknowledged(owner: Owner) -> None:
    owner.channel.deliver({CONTROL_HEADER: "probe"})
    assert owner.shard.owned
    assert owner.channel.acknowledged == [1]


def test_an_acknowledgement_that_is_lost_stops_the_shard_until_the_loss_is_noticed(owner: Owner) -> None:
    # Given a shard with two runs, whose connection is lost
    for task_id in ("a", "b"):
        owner.channel.deliver_task(task_id, task_id)
    owner.connection.is_lost = True
    # When one ends, then nothing more starts, since nothing could be acknowledged
    owner.services.finish()
    owner.channel.deliver_task("c", "c")
    assert owner.services.begun == ["b"]
    # And when the loss is noticed, all of it is the broker's again
    owner.shard.drop()
    assert len(owner.shard.held) == 0
    owner.services.finish()
    assert owner.channel.acknowledged == []


def test_what_comes_while_the_channel_is_being_closed_is_left_to_the_broker(owner: Owner) -> None:
    owner.channel.deliver_task("a", "a")
    owner.shard.close()
    owner.channel.deliver_task("late", "late")
    assert owner.services.begun == ["a"]
    assert handovers(owner) == ["taken", "released"]


def test_who_only_stood_by_says_nothing_when_it_goes(owner: Owner) -> None:
    owner.shard.close()
    assert handovers(owner) == []


def test_a_broker_that_does_not_answer_has_the_shard_consumed_anew(owner: Owner) -> None:
    # Given a shard whose acknowledgements must be with the broker before a fact is written
    assert owner.shard.confirm_acknowledged()
    # When the broker does not answer in time
    owner.connection.answers = False
    assert not owner.shard.confirm_acknowledged()
    # Then its group hears of it
    assert owner.lost == [owner.shard]


def test_a_control_message_of_a_newer_protocol_is_kept_for_who_knows_it(owner: Owner) -> None:
    owner.channel.deliver({CONTROL_HEADER: "end", "protocol": 99})
    assert (owner.needed_protocol, owner.channel.acknowledged) == (99, [])
