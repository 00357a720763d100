"""What a worker is to consume of a layout: what was selected for it and is not paused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from celery_sharding.layout.fold import fold
from celery_sharding.layout.model import Layout
from celery_sharding.topology import Names
from celery_sharding.worker.consume.wanted import find_blocked, find_paused, find_wanted

ORDERS = Names("orders")
SWITCH = {"event": "switch", "kind": "recover", "generation": 1, "shards": 4, "limbo": 1, "next_limbo": 2}
RESHARD = {"event": "switch", "kind": "reshard", "generation": 2, "shards": 2}


def layout_of(*events: dict[str, Any]) -> Layout:
    layout = Layout()
    for offset, event in enumerate(({"event": "created", "limbo": 1}, SWITCH, *events)):
        layout = fold(layout, offset, {"base": layout.offset, **event})
    return layout


def end(segment: str, queues: Iterable[str]) -> list[dict[str, Any]]:
    facts = [{"event": "drained", "segment": segment, "queue": queue, "by": "w"} for queue in queues]
    return [{"event": "ended", "segment": segment}, *facts]


PAST_LIMBO = [{"event": "switched", "generation": 1}, *end("limbo001", [ORDERS.limbo(1)])]


def pause(shard: int | None) -> dict[str, Any]:
    return {"event": "pause", "shard": shard}


def indexes(found: dict[str, tuple[str, int]]) -> list[str]:
    return [queue.removeprefix("shards.orders.") for queue in found]


def test_a_paused_shard_is_left_alone_and_the_selection_keeps_its_meaning():
    # Given a group with a paused shard
    layout = layout_of(*PAST_LIMBO, pause(2))
    # Then workers consume what was selected for them of the others
    assert indexes(find_wanted(ORDERS, layout, None)) == ["g001.000", "g001.001", "g001.003"]
    assert indexes(find_wanted(ORDERS, layout, frozenset({2, 3}))) == ["g001.003"]
    assert indexes(find_paused(ORDERS, layout, frozenset({2, 3}))) == ["g001.002"]
    assert find_wanted(ORDERS, layout, frozenset()) == find_paused(ORDERS, layout, frozenset()) == {}
    # When it is resumed, then it is consumed again
    resumed = fold(layout, 99, {"event": "resume", "shard": 2, "base": layout.offset})
    assert indexes(find_wanted(ORDERS, resumed, frozenset({2, 3}))) == ["g001.002", "g001.003"]


def test_a_limbo_is_paused_with_the_group_only():
    # Given a group whose limbo is consumed first, when a shard is paused, then the limbo is consumed all the same
    assert indexes(find_wanted(ORDERS, layout_of(pause(0)), frozenset({0}))) == ["limbo001"]
    # When the group is paused, then nothing is, and what comes after the limbo waits for it
    assert find_wanted(ORDERS, layout_of(pause(None)), None) == {}
    assert find_blocked(ORDERS, layout_of(pause(None))) == [ORDERS.limbo(1)]


def test_surplus_shards_of_an_earlier_generation_are_paused_with_the_shard_they_fall_to():
    # Given a group that goes from four shards to two, when shard 1 is paused
    layout = layout_of(*PAST_LIMBO, RESHARD, {"event": "switched", "generation": 2}, pause(1))
    # Then two of the four are, and the new generation waits for both
    assert indexes(find_wanted(ORDERS, layout, None)) == ["g001.000", "g001.002"]
    assert find_blocked(ORDERS, layout) == [ORDERS.shard(1, 1), ORDERS.shard(1, 3)]
    # And when all of the four are drained, one of the two is consumed
    for event in end("g001", [ORDERS.shard(1, index) for index in range(4)]):
        layout = fold(layout, layout.offset + 1, {"base": layout.offset, **event})
    assert indexes(find_wanted(ORDERS, layout, None)) == ["g002.000"]
    assert find_blocked(ORDERS, layout) == []
