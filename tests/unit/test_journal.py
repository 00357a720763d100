"""Attempts, folded by message."""

from __future__ import annotations

import json

import pytest

from celery_sharding.journal.attempts import Attempt, AttemptLog
from celery_sharding.journal.events import RetryAsked, RunAnnounced, RunWithdrawn, Settled, Vitals


@pytest.fixture
def log() -> AttemptLog:
    return AttemptLog()


def test_what_was_never_begun_is_unknown(log):
    assert log.get("t1") is None


def test_attempts_only_grow_whatever_the_order(log):
    for attempts in (1, 3, 2):
        log.note(RunAnnounced("t1", attempts).as_dict())
    assert log.get("t1") == Attempt(attempts=3)


def test_a_retry_says_that_the_runs_before_it_came_to_an_end(log):
    # Given a message that was begun twice and then asked for a retry
    log.note(RunAnnounced("t1", 2).as_dict())
    log.note(RetryAsked("t1", retries=1, attempts=0, at=100.0).as_dict())
    # Then it has no attempt behind it that may have died, and keeps its retry
    assert log.get("t1") == Attempt(attempts=0, retries=1, retried_at=100.0)


@pytest.mark.parametrize(("now", "left_seconds"), [(100.0, 8.0), (105.0, 3.0), (108.0, 0.0), (900.0, 0.0), (7.0, 8.0)])
def test_a_retry_waits_for_what_is_left_and_never_longer_than_was_asked_for(log, now, left_seconds):
    log.note(RetryAsked("t1", 1, 0, wait_seconds=1, at=50.0).as_dict())
    log.note(RetryAsked("t1", 2, 0, wait_seconds=8, at=100.0).as_dict())
    log.note(RetryAsked("t1", 1, 0, wait_seconds=500, at=99.0).as_dict())

    known = log.get("t1")
    assert known is not None
    assert known.left_seconds(now) == left_seconds


def test_the_body_of_the_highest_retry_takes_the_place_of_the_message(log):
    log.note(
        RetryAsked("t1", 2, 0, body=b"\x00second", content_type="application/json", content_encoding="utf-8").as_dict()
    )
    log.note(RetryAsked("t1", 1, 0, body=b"first", content_type="application/json").as_dict())
    log.note(RetryAsked("t1", 3, 0).as_dict())

    found = log.get("t1")
    assert found is not None
    assert (found.retries, found.body, found.content_encoding) == (3, b"\x00second", "utf-8")


def test_a_run_that_was_announced_and_did_not_begin_does_not_count(log):
    for event in (RunAnnounced("t1", 1).as_dict(), RunAnnounced("t1", 2).as_dict(), RunWithdrawn("t1", 1).as_dict()):
        log.note(event)

    assert log.get("t1") == Attempt(attempts=1)


def test_time_limits_of_a_retry_hold_for_the_retries_after_it(log):
    log.note(json.loads(json.dumps(RetryAsked("t1", 1, 0, time_limits=(9, None)).as_dict())))
    log.note(RetryAsked("t1", 2, 0).as_dict())

    known = log.get("t1")
    assert known is not None
    assert known.time_limits == (9, None)


def test_events_survive_their_way_through_the_stream(log):
    event = RetryAsked("t1", 1, 2, wait_seconds=1.5, body=b"\xff", content_type="x", at=7.5).as_dict()
    log.note(json.loads(json.dumps(event)))

    assert log.get("t1") == Attempt(2, 1, retried_at=7.5, wait_seconds=1.5, body=b"\xff", content_type="x")


def test_past_the_limit_the_longest_untouched_is_forgotten():
    log = AttemptLog(attempts_max=2)
    for task_id in ("t1", "t2", "t1", "t3"):
        log.note(RunAnnounced(task_id, 1).as_dict())

    assert [task_id for task_id in ("t1", "t2", "t3") if log.get(task_id)] == ["t1", "t3"]
    assert len(log) == 2


@pytest.mark.parametrize(
    "event",
    [
        {"event": "attempt"},
        {"event": "attempt", "message_id": 7, "attempts": 1},
        {"event": "attempt", "message_id": "t1", "attempts": "one"},
        {"event": "blessed", "message_id": "t1", "attempts": 1},
        Vitals("w", 1, owned={}, standby=["q"], at=0.0).as_dict(),
    ],
)
def test_damaged_and_foreign_events_are_passed_over(log, event):
    log.note(event)

    assert len(log) == 0


def test_a_settled_message_leaves_nothing_behind() -> None:
    # Given a message that was begun four times
    log = AttemptLog()
    log.note(RunAnnounced("t1", 4).as_dict())
    # When it is settled, and another that cannot be told from it is begun
    log.note(Settled("t1").as_dict())
    assert log.get("t1") is None
    log.note(RunAnnounced("t1", 2).as_dict())
    # Then only the other's attempts count
    assert log.get("t1") == Attempt(attempts=2)
