"""Rates from what owners say of themselves and what brokers count; no broker."""

from __future__ import annotations

from typing import Any

import pytest

from celery_sharding.monitoring.ownership import OwnershipLog
from celery_sharding.monitoring.rates import Flow, measure_flow

QUEUE = "shards.orders.g001.000"
NOW = 1_000_000.0
IDLE = {"index": 0, "since": NOW - 60, "held": 0, "running": 0, "lag_seconds": None, "prefetch": 200, "counters": {}}


def say(
    log: OwnershipLog,
    ago: float,
    delivered: int,
    held: int,
    *,
    by: str = "a",
    since: float = NOW - 60,
    behind: float = 0,
) -> None:
    facts: dict[str, Any] = {"index": 0, "since": since, "held": held, "running": 0, "lag_seconds": None}
    facts |= {"prefetch": 200, "behind_seconds": behind, "counters": {"delivered": delivered}}
    log.note({"event": "vitals", "at": NOW - ago, "by": by, "generation": 1, "owned": {QUEUE: facts}, "standby": []})


def flow(log: OwnershipLog, *, ready: int = 0, counted: tuple[tuple[float, int], ...] = ()) -> Flow:
    ownership = log.at(NOW)
    return measure_flow(ownership.owners[QUEUE], ownership.before.get(QUEUE), ready=ready, counted=counted)


@pytest.fixture
def log() -> OwnershipLog:
    return OwnershipLog()


def test_what_was_delivered_and_is_held_no_more_went_out(log):
    say(log, 8, 100, 10)
    say(log, 3, 150, 20)
    say(log, 0, 180, 30)

    assert flow(log) == Flow(in_rate=10.0, out_rate=7.5)


def test_under_a_backlog_the_change_of_what_waits_came_too(log):
    # Given an owner that settles 20 a second, and 500 messages more in the queue than 10 s ago
    say(log, 10, 1_000, 200)
    say(log, 0, 1_200, 200)

    assert flow(log, ready=1_500, counted=((10.0, 1_000), (1.0, 1_450))) == Flow(in_rate=70.0, out_rate=20.0)


def test_one_look_at_a_backlog_tells_the_mean_since_its_head_was_published(log):
    # Given 1,500 waiting, and an owner that was delivered 200 in 10 s, the first of them 40 s after it was published
    say(log, 10, 1_000, 200, behind=40.0)
    say(log, 0, 1_200, 200, behind=41.0)

    assert flow(log, ready=1_500) == Flow(in_rate=34.0, out_rate=20.0)


def test_a_burst_after_a_long_rest_came_in_the_last_seconds(log):
    say(log, 10, 1_000, 0, behind=5_000.0)
    say(log, 0, 1_300, 200)

    assert flow(log, ready=700) == Flow(in_rate=100.0, out_rate=10.0)


@pytest.mark.parametrize(
    "after",
    [
        {"by": "b", "since": NOW - 1.5},  # a handover
        {"since": NOW - 1.5},  # the same worker, started again under its name
    ],
    ids=["handover", "restart"],
)
def test_counts_of_different_times_of_ownership_are_not_compared(log, after):
    say(log, 9, 1_000_000, 200)
    say(log, 3, 1_000_500, 200)
    say(log, 1.2, 200, 200, **after)
    say(log, 0, 210, 200, **after)

    assert flow(log, ready=5_000, counted=((9.0, 0),)) == Flow()


def test_an_owner_that_was_never_delivered_anything_has_rates_too(log):
    for ago in (9, 0):
        log.note(
            {"event": "vitals", "at": NOW - ago, "by": "a", "generation": 1, "owned": {QUEUE: IDLE}, "standby": []}
        )

    assert flow(log) == Flow(0.0, 0.0)


def test_a_clock_that_was_put_back_makes_rates_unknown(log):
    say(log, -500, 1_000, 0)
    say(log, 1, 1_100, 0)
    say(log, 0, 1_110, 0)

    assert flow(log) == Flow()


def test_what_an_owner_is_delivered_while_it_takes_over_did_not_come_then(log):
    since = NOW - 6
    say(log, 5.9, 10, 10, since=since)
    say(log, 4, 200, 200, since=since)
    say(log, 0, 240, 200, since=since)

    assert flow(log, counted=((6.0, 190),)).out_rate == 10.0
    assert flow(log, counted=((6.0, 190),)).in_rate == 10.0


def test_counts_that_brokers_make_late_never_give_a_negative_rate(log):
    say(log, 10, 1_000, 0)
    say(log, 0, 1_000, 5)

    assert flow(log, ready=0, counted=((9.0, 100),)) == Flow(0.0, 0.0)


@pytest.mark.parametrize(
    ("rates", "waiting", "seconds"),
    [
        ((1.0, 6.0), 100, 20.0),
        ((6.0, 6.0), 100, None),
        ((6.0, 1.0), 100, None),
        ((None, 6.0), 100, None),
        ((1.0, None), 100, None),
        ((0.0, 0.0), 0, 0.0),
    ],
)
def test_the_time_to_clear_is_known_while_what_waits_gets_less(rates, waiting, seconds):
    assert Flow(*rates).clear_seconds(waiting) == seconds


def test_workers_that_went_away_long_ago_are_forgotten(log):
    for number in range(50):
        say(log, 100, 1, 0, by=f"pod-{number}")
    say(log, 0, 1, 0)

    log.at(NOW)

    assert list(log._latest) == ["a"]
