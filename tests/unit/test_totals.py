"""Totals grow and never shrink, whatever becomes of owners, workers, and who watches them."""

from __future__ import annotations

import time
from typing import Any

import pytest

from celery_sharding.journal.events import Counted, Handover
from celery_sharding.journal.histogram import BOUNDS_SECONDS, Histogram
from celery_sharding.monitoring.totals import Totals, TotalsLog, shard_label

QUEUE = "shards.orders.g001.003"
SHARD = ("orders", "3")
BEGIN = 1_000.0


@pytest.fixture
def log() -> TotalsLog:
    return TotalsLog(BEGIN)


def vitals(
    owner: str, since: float, done: int, *, at: float = 2_000.0, queue: str = QUEUE, **more: Any
) -> dict[str, Any]:
    facts = {
        "index": 3,
        "since": since,
        "held": 0,
        "running": 0,
        "lag_seconds": None,
        "counters": {"done": done},
    } | more
    return {"event": "vitals", "at": at, "by": owner, "generation": 1, "owned": {queue: facts}, "standby": []}


def test_the_totals_of_all_owners_add_up(log):
    log.note("orders", vitals("a", 1_001.0, 5))
    log.note("orders", vitals("a", 1_001.0, 7))
    log.note("orders", vitals("b", 1_002.0, 4))  # it has taken the shard over
    log.note("orders", vitals("a", 1_003.0, 1))  # and given it back to a worker that was started again

    assert log.totals == {SHARD: Totals({"done": 12}, handovers=3)}


def test_events_that_come_again_change_nothing(log):
    events = [vitals("a", 1_001.0, 5), vitals("a", 1_001.0, 7), vitals("b", 1_002.0, 4), vitals("a", 1_003.0, 2)]
    for event in events * 2:
        log.note("orders", event)

    assert log.totals == {SHARD: Totals({"done": 13}, handovers=3)}


def test_what_was_counted_before_anybody_looked_is_not_counted_at_once(log):
    # Given an owner that has done 5,000 tasks when the exporter is started again
    log.note("orders", vitals("a", 10.0, 5_000, runs=[50.0, 5_000]))
    assert log.totals == {SHARD: Totals()}

    log.note("orders", vitals("a", 10.0, 5_002, runs=[50.5, 5_001, 1]))
    (totals,) = log.totals.values()
    assert totals.counters == {"done": 2}
    assert list(totals.runs[:3]) == pytest.approx([0.5, 1, 1])


def test_the_last_word_of_an_owner_counts(log):
    log.note("orders", vitals("a", 1_001.0, 5, at=time.time(), waits=[1.0, 0, 5]))
    last = Counted(1_001.0, {"done": 9}, waits=[3.0, 0, 5, 4])
    log.note("orders", Handover(QUEUE, owner="a", change="released", counted=last).as_dict())

    (totals,) = log.totals.values()
    assert (totals.counters, list(totals.waits[:4])) == ({"done": 9}, [3.0, 0, 5, 4])


def test_a_total_that_somebody_holds_does_not_change(log):
    log.note("orders", vitals("a", 1_001.0, 5))
    held = log.totals
    log.note("orders", vitals("a", 1_001.0, 7))

    assert held[SHARD].counters == {"done": 5}


@pytest.mark.parametrize(
    "event",
    [
        {"event": "vitals", "at": 1.0, "by": "a", "owned": {QUEUE: {"since": 1_001.0}}},
        {"event": "vitals", "at": 1.0, "by": "a", "owned": [QUEUE]},
        {"event": "vitals", "at": None, "by": "a", "owned": {}},
        {
            "event": "handover",
            "at": 1.0,
            "queue": QUEUE,
            "owner": "a",
            "change": "released",
            "to": "",
        },  # of an older worker
        {"event": "failure"},
    ],
)
def test_what_cannot_be_read_counts_nothing(log, event):
    log.note("orders", event)
    assert log.totals == {}


def test_owners_that_never_come_again_are_forgotten(log):
    for number in range(1_000):
        log.note("orders", vitals(f"pod-{number}", 2_000.0 + number, 1))

    assert log.totals[SHARD].counters == {"done": 1_000}
    assert len(log._words["orders", QUEUE]) < 10


def test_generations_that_have_gone_are_forgotten_and_their_counts_stay(log):
    # Given what was said of two limbo queues and two generations, a day apart
    old = [
        vitals("a", 1_001.0, 5, queue="shards.orders.limbo001"),
        vitals("a", 1_001.0, 7, queue="shards.orders.g001.003"),
    ]
    later = vitals("a", 1_002.0, 2, at=2_000.0 + 100_000, queue="shards.orders.g002.003")
    # When the old ones come again
    for event in (*old, later, *old):
        log.note("orders", event)
    # Then the shard's count goes on, the limbo's has gone, and nothing is counted twice
    assert log.totals == {SHARD: Totals({"done": 9}, handovers=2)}
    assert set(log._words) == {("orders", "shards.orders.g002.003")}


def test_a_queue_that_two_journals_name_counts_in_each_of_the_groups(log):
    # Given a queue of which the journals of two groups tell
    log.note("orders", vitals("a", 1_001.0, 5))
    log.note("stock", vitals("a", 1_001.0, 7))
    assert log.totals["stock", QUEUE].counters == {"done": 7}
    # When both are forgotten, a day later, by the next word
    log.note("orders", vitals("b", 1_002.0, 2, at=2_000.0 + 100_000))
    # Then that one counts
    assert log.totals == {SHARD: Totals({"done": 7}, handovers=2)}


def test_a_clock_that_is_far_ahead_stops_no_count(log):
    log.note("orders", vitals("a", 1_001.0, 5, at=time.time() + 1e9))
    log.note("orders", vitals("b", 1_001.0, 1, at=time.time(), queue="shards.orders.g001.004"))

    assert log.totals["orders", "4"].counters == {"done": 1}


def test_a_shard_goes_on_under_its_index_in_the_next_generation():
    assert shard_label("orders", "shards.orders.g012.003") == "3"
    assert shard_label("orders", "shards.orders.limbo001") == "limbo001"


def test_a_time_on_a_bound_belongs_to_the_bucket_below_it():
    times = Histogram()
    assert times.to_list() == []
    for seconds in (-1.0, BOUNDS_SECONDS[0], BOUNDS_SECONDS[0] + 0.001, 1e9):
        times.note(seconds)

    assert times.counts == [2, 1, *[0] * (len(BOUNDS_SECONDS) - 2), 1]
    assert times.to_list()[0] == pytest.approx(1e9 + 0.011)
