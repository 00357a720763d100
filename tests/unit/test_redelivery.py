"""What becomes of a redelivered message: the decision, and what is done about it."""

from __future__ import annotations

import time

import pytest

from celery_sharding.journal.attempts import Attempt
from celery_sharding.worker.redelivery.policy import (
    ALONE,
    Begin,
    Company,
    DeadLetter,
    History,
    Wait,
    decide,
    history_of,
    may_be_announced_ahead,
)
from celery_sharding.worker.run.delivery import Phase, State
from support.stand_ins import Worker

ATTEMPTS, DEAD = "shards.orders.attempts", "shards.orders.dead"
SUSPECT, LAST_CHANCE = Company(is_any=True), Company(is_any=True, is_last_chance=True)


@pytest.mark.parametrize(
    ("history", "company", "decision"),
    [
        (History(begun=0, max_attempts=3), ALONE, Begin(0)),
        (History(begun=1, max_attempts=3), SUSPECT, Begin(1)),
        (History(begun=1, max_attempts=3), LAST_CHANCE, Wait()),
        (History(begun=2, max_attempts=3), ALONE, Begin(2)),
        (History(begun=2, max_attempts=3), SUSPECT, Wait()),
        # Of two runs the second is every redelivered message's last, and they would run one by one.
        (History(begun=1, max_attempts=2), SUSPECT, Begin(1)),
        (History(begun=3, max_attempts=3), ALONE, DeadLetter(3)),
        (History(begun=3, max_attempts=3), LAST_CHANCE, DeadLetter(3)),
        (History(begun=4, max_attempts=3), ALONE, DeadLetter(4)),
        (History(begun=0, max_attempts=3, retry_in_seconds=2.0), ALONE, Wait(2.0)),
        (History(begun=3, max_attempts=3, retry_in_seconds=2.0), ALONE, Wait(2.0)),
    ],
)
def test_what_a_history_and_its_company_decide(history: History, company: Company, decision: object) -> None:
    assert decide(history, company) == decision


def test_the_last_run_of_a_message_is_never_announced_before_it_has_a_slot() -> None:
    assert may_be_announced_ahead(History(begun=1, max_attempts=3))
    assert not may_be_announced_ahead(History(begun=2, max_attempts=3))
    assert not may_be_announced_ahead(History(begun=3, max_attempts=3))
    assert not may_be_announced_ahead(History(begun=0, max_attempts=3, retry_in_seconds=1.0))


@pytest.mark.parametrize(("max_attempts", "begun"), [(1, 0), (2, 1), (5, 1)])
def test_what_nobody_recorded_may_have_begun_once_and_is_no_dead_letter_for_that(max_attempts: int, begun: int) -> None:
    delivery = Worker(max_attempts=max_attempts).shard.deliver("t1", redelivered=True)
    assert history_of(delivery, None, now=0.0) == History(begun, max_attempts)


def test_a_redelivered_message_begins_when_its_attempt_is_confirmed() -> None:
    # Given a log that confirms nothing yet
    worker = Worker()
    worker.log.is_up = False
    request = worker.admit("t1", redelivered=True)
    # Then its attempt is written, and it keeps its slot
    assert [event["event"] for event in worker.log.to(ATTEMPTS)] == ["attempt"]
    assert (worker.begun, request.delivery.state) == ([], State.RUNNING)
    # When it is confirmed, then it begins, and that counts
    worker.log.confirm()
    assert worker.begun == ["t1"]
    assert request.delivery.record.phase is Phase.BEGUN


def test_a_redelivered_message_waits_until_everything_is_read_of_earlier_attempts() -> None:
    # Given a message that was begun too often, which is not read yet
    worker = Worker(max_attempts=3)
    worker.shard.attempts.is_complete = False
    request = worker.admit("t1", redelivered=True)
    worker.shard.attempts.known["m-t1"] = Attempt(attempts=3)
    assert worker.log.written == []
    # When it is, then it is a dead letter
    worker.shard.attempts.complete()
    assert len(worker.log.to(DEAD)) == 1
    assert worker.shard.acknowledged == ["t1"]
    assert request.failures == ["begun 3 times and never finished"]
    assert worker.begun == []


def test_a_retry_that_waited_when_its_shard_changed_hands_goes_on_waiting() -> None:
    # Given a retry that an earlier owner was asked for
    worker = Worker()
    worker.shard.attempts.known["m-t1"] = Attempt(retries=2, retried_at=time.time(), wait_seconds=60.0)
    request = worker.admit("t1", redelivered=True)
    # Then it is held for what is left of it
    assert (worker.begun, request.delivery.state) == ([], State.HELD)
    # When it is due, then it runs as that retry
    worker.shard.attempts.known["m-t1"] = Attempt(retries=2)
    (seconds,) = worker.clock.fire()
    assert 55 < seconds <= 60
    assert [run.request_dict["retries"] for run in worker.pool.begun] == [2]


def test_a_message_on_its_last_chance_runs_alone() -> None:
    # Given two suspects, one of which has one run left
    worker = Worker(max_attempts=3)
    worker.shard.attempts.known["m-last"] = Attempt(attempts=2)
    suspect = worker.admit("suspect", key="a", redelivered=True)
    worker.admit("last", key="b", redelivered=True)
    # Then that one waits, and a first delivery does not
    worker.admit("first", key="c")
    assert worker.begun == ["suspect", "first"]
    # When the other has ended, then it begins
    worker.executor.finish(suspect)
    assert worker.begun == ["suspect", "first", "last"]


def test_an_announcement_is_withdrawn_when_its_shard_is_given_up_before_the_run_began() -> None:
    # Given a message whose attempt is announced, and not confirmed
    worker = Worker()
    worker.log.is_up = False
    delivery = worker.admit("t1", redelivered=True).delivery
    # When its shard is given up
    worker.executor.redeliveries.announcer.withdraw(delivery)
    worker.executor.forget(worker.shard)
    worker.log.confirm()
    # Then it says nothing against the message, and nothing begins
    assert [event["event"] for event in worker.log.to(ATTEMPTS)] == ["attempt", "withdrawn"]
    assert (worker.begun, delivery.attempts) == ([], 1)
