"""What the faces show, from a layout, counts and vitals; no broker."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from celery_sharding.layout.model import Layout, OpenSwitch, Segment
from celery_sharding.monitoring.ownership import OwnershipLog, fold_ownership
from celery_sharding.monitoring.snapshot import derive_status
from celery_sharding.monitoring.snapshot_json import to_json
from celery_sharding.monitoring.status import GroupStatus, ShardStatus, Snapshot
from celery_sharding.topology import Names

NAMES = Names("orders")
LIMBO, NEXT_LIMBO = NAMES.limbo(1), NAMES.limbo(2)
Q0, Q1 = NAMES.shard(1, 0), NAMES.shard(1, 1)
NOW = 1_000_000.0

LIMBO_DRAINED = Segment("limbo", 1, ended=True, drained=frozenset({LIMBO}))
LIVE = Segment("ring", 1, 2)
LAYOUT = Layout(offset=9, segments=(LIMBO_DRAINED, LIVE), generation=1, shards=2, limbo=2)
EMPTY = {Q0: 0, Q1: 0, NEXT_LIMBO: 0, NAMES.dead: 0}


def owning(*, since: float = NOW - 60, held: int = 0, running: int = 0, lag: float | None = None) -> dict[str, Any]:
    return {"index": 0, "since": since, "held": held, "running": running, "lag_seconds": lag, "counters": {"done": 7}}


def vitals(by: str, *, ago: float = 0.5, owned: dict[str, Any] | None = None, standby: tuple[str, ...] = ()):
    return {
        "event": "vitals",
        "at": NOW - ago,
        "by": by,
        "generation": 1,
        "owned": owned or {},
        "standby": list(standby),
    }


def judge(
    *events: dict[str, Any],
    layout: Layout = LAYOUT,
    ready: dict[str, int | None] | None = None,
    consumers: dict[str, int] | None = None,
) -> GroupStatus:
    counts = {**EMPTY, **(ready or {})}
    ownership = fold_ownership(events, now=NOW)
    return derive_status(NAMES, layout, ready=counts, consumers=consumers or {}, ownership=ownership, now=NOW)


def first(*events: dict[str, Any], ready: int | None = 0, consumers: int = 0) -> ShardStatus:
    return judge(*events, ready={Q0: ready}, consumers={Q0: consumers}).shards[0]


# --- vitals ----------------------------------------------------------------------------------------------------------


def test_the_last_word_of_each_worker_counts():
    # Given a worker that gave a shard up, and another that took it
    events = [
        vitals("a", ago=2, owned={Q0: owning()}),
        vitals("b", ago=1.8, standby=(Q0,)),
        vitals("a", ago=1, standby=(Q0,)),
        vitals("b", ago=0.8, owned={Q0: owning(held=3)}),
    ]
    # When they are folded
    found = fold_ownership(events, now=NOW)
    # Then only what each said last is true
    assert found.owners[Q0].owner == "b"
    assert found.standbys == {Q0: ("a",)}


def test_whoever_is_silent_for_more_than_five_seconds_is_neither_owner_nor_standby():
    found = fold_ownership([vitals("a", ago=5.1, owned={Q0: owning()}, standby=(Q1,))], now=NOW)

    assert (found.owners, found.standbys) == ({}, {})
    assert found.last[Q0].owner == "a"


def test_of_two_who_claim_a_shard_the_later_to_take_it_is_its_owner():
    early, late = vitals("a", owned={Q0: owning(since=NOW - 60)}), vitals("b", owned={Q0: owning(since=NOW - 3)})

    assert fold_ownership([early, late], now=NOW).owners[Q0].owner == "b"
    assert fold_ownership([late, early], now=NOW).owners[Q0].owner == "b"


@pytest.mark.parametrize(
    "event",
    [
        {"event": "vitals"},
        {"event": "vitals", "by": "w", "at": "now", "owned": {}, "standby": []},
        {"event": "vitals", "by": "w", "at": 1e300, "owned": {Q0: owning()}, "standby": []},
        {"event": "vitals", "by": "w", "at": NOW, "owned": {Q0: {"held": float("inf"), "running": 1}}, "standby": []},
        {"event": "vitals", "by": "w", "at": NOW, "owned": [Q0], "standby": []},
        {"event": "vitals", "by": "w", "at": NOW, "owned": {Q0: None}, "standby": []},
        {"event": "vitals", "by": "w", "at": NOW, "owned": {Q0: {"held": 1}}, "standby": []},
        {"event": "vitals", "by": "w", "at": NOW, "owned": {}, "standby": 7},
        {"event": "handover", "by": "w", "at": NOW, "owned": {Q0: owning()}, "standby": []},
    ],
)
def test_damaged_vitals_and_other_events_are_passed_over(event):
    found = fold_ownership([vitals("a", owned={Q0: owning()}), event], now=NOW)

    assert {queue: vital.owner for queue, vital in found.last.items()} == {Q0: "a"}


# --- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "ready", "state"),
    [
        ([vitals("a", owned={Q0: owning()}), vitals("b", standby=(Q0,))], 0, "idle"),
        ([vitals("a", owned={Q0: owning(held=1)}), vitals("b", standby=(Q0,))], 0, "ok"),
        ([vitals("a", owned={Q0: owning()}), vitals("b", standby=(Q0,))], 4, "ok"),
        ([vitals("a", owned={Q0: owning()})], 0, "no standby"),
        ([vitals("a", ago=9, owned={Q0: owning()}), vitals("b", standby=(Q0,))], 0, "unowned"),
        ([], 0, "unowned"),
        ([vitals("a", owned={Q0: owning()}), vitals("b", standby=(Q0,))], None, "missing"),
    ],
)
def test_the_state_of_a_shard(events, ready, state):
    assert first(*events, ready=ready).state == state


def test_a_paused_shard_is_paused_whoever_owns_it():
    one, whole = (dataclasses.replace(LAYOUT, paused=frozenset({shard})) for shard in (1, None))

    assert [row.state for row in judge(layout=one, ready={Q1: 4}).shards] == ["unowned", "paused"]
    assert [row.state for row in judge(vitals("a", owned={Q0: owning()}), layout=whole).shards] == ["paused"] * 2
    assert (judge(layout=one).paused, judge(layout=whole).paused) == (False, True)


def test_the_queues_of_an_earlier_generation_are_paused_with_the_shard_they_follow():
    # Given a generation of three shards that is not drained, and after it one of two, of which shard 0 is paused
    old, live = Segment("ring", 1, 3, ended=True), Segment("ring", 2, 2)
    layout = Layout(offset=9, segments=(old, live), generation=2, shards=2, limbo=1, paused=frozenset({0}))

    rows = judge(layout=layout, ready={queue: 1 for s in (old, live) for queue in s.queues(NAMES)}).earlier

    assert [row.state for row in rows] == ["paused", "unowned", "paused"]


def test_the_skew_is_the_busiest_shard_over_an_even_share():
    assert judge(ready={Q0: 30, Q1: 10}).skew == 1.5
    assert judge(ready={Q0: 1}).skew is None  # one message is no skew


@pytest.mark.parametrize(("consumers", "state"), [(2, "stuck"), (1, "unowned")])
def test_an_owner_that_is_silent_and_still_connected_is_stuck(consumers, state):
    # Given an owner that says nothing any more, and a standby; the broker sees both of them, or only the standby
    silent, standby = vitals("a", ago=9, owned={Q0: owning()}), vitals("b", standby=(Q0,))

    assert first(silent, standby, consumers=consumers).state == state


def test_a_row_says_who_owns_it_since_when_and_what_it_holds():
    row = first(vitals("a", owned={Q0: owning(held=3, running=2, lag=1.5)}), vitals("c", standby=(Q0,)), ready=7)

    assert (row.kind, row.index, row.queue, row.ready, row.held, row.running) == ("live", 0, Q0, 7, 3, 2)
    assert (row.owner, row.standbys, row.since) == ("a", ("c",), NOW - 60)


def test_shards_wait_without_alarm_while_an_earlier_segment_is_consumed():
    # Given a limbo that its owner has not drained
    limbo = Segment("limbo", 1, ended=True)
    layout = Layout(offset=9, segments=(limbo, LIVE), generation=1, shards=2, limbo=2)
    # When it is judged
    group = judge(vitals("a", owned={LIMBO: owning(held=2, lag=8.0)}), layout=layout, ready={LIMBO: 5, Q0: 1})
    # Then its line comes before those of the shards, which nobody owns on purpose
    assert [(row.kind, row.queue, row.state) for row in group.rows] == [
        ("limbo", LIMBO, "draining"),
        ("live", Q0, "waiting"),
        ("live", Q1, "waiting"),
    ]
    assert group.ready == 6
    assert group.worst_lag == group.earlier[0]


def test_of_an_old_generation_only_the_queues_that_are_not_drained_are_shown():
    old = Segment("ring", 1, 2, ended=True, drained=frozenset({Q1}))
    new = Segment("ring", 2, 1)
    layout = Layout(offset=9, segments=(LIMBO_DRAINED, old, new), generation=2, shards=1, limbo=2)

    group = judge(layout=layout, ready={Q0: 3, NAMES.shard(2, 0): 0})

    assert [(row.kind, row.queue, row.state) for row in group.earlier] == [("old", Q0, "unowned")]
    assert [(row.index, row.queue, row.state) for row in group.shards] == [(0, NAMES.shard(2, 0), "waiting")]


def test_messages_that_came_without_a_ring_count_as_waiting():
    group = judge(ready={NEXT_LIMBO: 12, NAMES.dead: 2})

    assert (group.limbo_ready, group.ready, group.dead_letters) == (12, 12, 2)


def test_a_group_that_the_broker_does_not_know_is_not_declared():
    assert judge(layout=Layout()) == GroupStatus("orders", declared=False)


# --- lag -------------------------------------------------------------------------------------------------------------


def test_the_owner_knows_the_lag():
    row = first(vitals("a", owned={Q0: owning(held=3, lag=1.5)}), ready=7)

    assert (row.lag_seconds, row.lag_estimated) == (1.5, False)


def test_without_an_owner_the_lag_is_the_last_known_and_the_time_since():
    row = first(vitals("a", ago=30, owned={Q0: owning(held=3, lag=1.5)}), ready=7)

    assert (row.lag_seconds, row.lag_estimated) == (31.5, True)
    assert row.since == NOW - 30


@pytest.mark.parametrize(("held", "ago", "lag"), [(3, 30, 31.5), (3, 300, 0.0), (0, 30, 0.0)])
def test_what_a_lost_owner_held_counts_until_the_broker_has_it_back(held, ago, lag):
    # Given an owner that went away, and a queue that looks empty
    row = first(vitals("a", ago=ago, owned={Q0: owning(held=held, lag=1.5)}), ready=0)
    # Then what it held may still be out there, for a while
    assert row.lag_seconds == lag


@pytest.mark.parametrize(
    ("events", "ready", "lag"),
    [
        ([], 7, (None, False)),
        ([], 0, (0.0, False)),
        ([vitals("a", owned={Q0: owning()})], 0, (0.0, False)),
        ([vitals("a", owned={Q0: owning()})], 7, (0.0, True)),
        ([vitals("a", owned={Q0: owning(held=1, running=1)})], 7, (None, False)),
        ([vitals("a", owned={Q0: owning(lag=3.0)})], None, (None, False)),
    ],
)
def test_a_lag_that_nobody_knows_is_not_made_up(events, ready, lag):
    row = first(*events, ready=ready)

    assert (row.lag_seconds, row.lag_estimated) == lag


# --- what programs are promised --------------------------------------------------------------------------------------


def test_the_json_keeps_its_schema():
    group = judge(vitals("a", owned={Q0: owning(held=3, running=2, lag=1.5)}), vitals("b", standby=(Q0, Q1)))

    found = json.loads(json.dumps(to_json(Snapshot(NOW, (group,)))))

    assert (found["schema"], found["at"]) == (1, "1970-01-12T13:46:40.000Z")
    shown = found["groups"][0]
    assert [(segment["name"], segment["ended"], segment["drained"]) for segment in shown.pop("segments")] == [
        ("limbo001", True, True),
        ("g001", False, False),
    ]
    assert shown.pop("shards")[0] == {
        "kind": "live",
        "index": 0,
        "queue": Q0,
        "state": "ok",
        "ready": 0,
        "held": 3,
        "running": 2,
        "owner": "a",
        "standbys": ["b"],
        "lag_seconds": 1.5,
        "lag_estimated": False,
        "since": "1970-01-12T13:45:40.000Z",
        "store_waiting": 0,
        "store_away_since": None,
        "claim_waiting": 0,
        "in_rate": None,
        "out_rate": None,
        "clear_seconds": None,
        "counters": {"done": 7},
        "unacknowledged": 3,
        "broker": None,
    }
    assert shown == {
        "name": "orders",
        "declared": True,
        "generation": 1,
        "ready": 0,
        "limbo_ready": 0,
        "dead_letters": 0,
        "paused": False,
        "protocol": 1,
        "skew": 2.0,
        "switch": None,
        "earlier": [],
    }


def test_the_json_of_a_group_that_is_not_declared_has_the_same_keys():
    shown, other = (to_json(Snapshot(NOW, (each,)))["groups"][0] for each in (judge(layout=Layout()), judge()))

    assert shown["declared"] is False
    assert shown["shards"] == []
    assert set(shown) == set(other)


def test_a_switch_under_way_is_shown():
    switch = OpenSwitch("recover", 1, 2, limbo=1, next_limbo=2, step=4, at=NOW)
    layout = Layout(offset=9, segments=(LIMBO_DRAINED, LIVE), generation=1, shards=2, limbo=2, switch=switch)

    shown = to_json(Snapshot(NOW, (judge(layout=layout),)))["groups"][0]

    at = "1970-01-12T13:46:40.000Z"
    assert shown["switch"] == {"kind": "recover", "generation": 1, "shards": 2, "step": 4, "at": at}


def test_what_was_said_of_queues_that_have_gone_is_forgotten():
    log = OwnershipLog()
    log.note(vitals("a", owned={Q0: owning(), Q1: owning()}))

    log.keep([Q1])

    assert set(log.at(NOW).last) == {Q1}
