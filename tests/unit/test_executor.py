"""From the head of a lane to the acknowledgement."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from celery_sharding.celery_hooks.retry import InPlaceRetry
from celery_sharding.dedup.waiting import CLAIM, WaitInLane
from celery_sharding.worker.run.delivery import Phase, State
from support.stand_ins import Worker

ATTEMPTS, DEAD = "shards.orders.attempts", "shards.orders.dead"


@pytest.fixture
def worker() -> Worker:
    return Worker()


def events(worker: Worker) -> list[str]:
    return [event["event"] for event in worker.log.to(ATTEMPTS)]


def test_a_first_delivery_is_acknowledged_and_nothing_is_recorded_of_it(worker: Worker) -> None:
    # Given two messages of a key
    first, second = worker.admit("t1"), worker.admit("t2")
    assert worker.begun == ["t1"]
    # When the first is done
    worker.executor.finish(first)
    # Then it is acknowledged, the second starts, and the log has nothing to say
    assert (worker.shard.acknowledged, worker.begun) == (["t1"], ["t1", "t2"])
    assert worker.log.written == []
    assert (first.delivery.record, second.delivery.record) == (None, None)


def test_a_retry_is_held_until_it_is_recorded_and_due(worker: Worker) -> None:
    # Given a run that is to be retried, and a log that confirms nothing yet
    request = worker.admit("t1")
    worker.log.is_up = False
    worker.executor.retry(request, InPlaceRetry(when=5.0))
    assert worker.clock.timers == []
    # When its record is confirmed, then it waits for its countdown
    worker.log.confirm()
    assert request.delivery.state is State.HELD
    (seconds,) = worker.clock.fire()
    assert 4 < seconds <= 5
    # And runs again, as a retry and no attempt
    assert [run.request_dict["retries"] for run in worker.pool.begun] == [0, 1]
    worker.executor.finish(worker.pool.begun[-1])
    assert events(worker) == ["retry", "settled"]


def test_a_lost_run_is_recorded_before_it_begins_again(worker: Worker) -> None:
    # Given a run whose process died
    request = worker.admit("t1")
    worker.log.is_up = False
    worker.executor.lose(request, "SIGKILL")
    # Then it begins again when that is recorded
    assert worker.begun == ["t1"]
    worker.log.confirm()
    assert worker.begun == ["t1", "t1"]
    assert request.delivery.attempts == 2


def test_a_run_that_is_lost_too_often_is_a_dead_letter() -> None:
    worker = Worker(max_attempts=2)
    worker.executor.lose(worker.admit("t1"), "SIGKILL")
    last = worker.pool.begun[-1]
    worker.executor.lose(last, "SIGKILL")
    assert len(worker.log.to(DEAD)) == 1
    assert worker.shard.acknowledged == ["t1"]
    assert last.failures == ["lost 2 times: SIGKILL"]


def test_a_run_that_waits_in_its_lane_takes_its_attempt_back(worker: Worker) -> None:
    # Given a redelivered message that begins, and waits for a claim
    request = worker.admit("t1", redelivered=True)
    worker.executor.wait(request, WaitInLane(CLAIM, "another has it"))
    # Then what was recorded is taken back
    assert events(worker) == ["attempt", "withdrawn"]
    assert request.delivery.record.phase is Phase.TAKEN_BACK
    # When it tries again, then that is recorded anew
    worker.clock.fire()
    assert events(worker) == ["attempt", "withdrawn", "attempt"]
    assert worker.begun == ["t1", "t1"]


def test_nothing_starts_while_the_broker_is_silent(worker: Worker) -> None:
    worker.pool.is_cut_off = True
    request = worker.admit("t1")
    assert (worker.begun, request.delivery.state) == ([], State.HELD)
    worker.pool.is_cut_off = False
    assert worker.clock.fire() == [0.5]
    assert worker.begun == ["t1"]


def test_what_the_pool_does_not_take_five_times_is_a_dead_letter(worker: Worker) -> None:
    worker.pool.error = RuntimeError("no")
    request = worker.admit("t1")
    for _ in range(4):
        assert worker.log.to(DEAD) == []
        worker.clock.fire()
    assert len(worker.log.to(DEAD)) == 1
    assert request.failures == ["could not be started: RuntimeError('no')"]


def test_a_dead_letter_is_confirmed_before_its_message_is_acknowledged(worker: Worker) -> None:
    request = worker.admit("t1")
    worker.log.is_up = False
    worker.executor.failures.bury(request, "rejected")
    assert worker.shard.acknowledged == []
    worker.log.confirm()
    assert worker.shard.acknowledged == ["t1"]


def test_a_key_stays_locked_until_the_run_of_a_lost_shard_has_ended(worker: Worker) -> None:
    # Given a run whose shard is lost, and the same message again
    orphan = worker.admit("t1")
    worker.executor.forget(worker.shard)
    worker.admit("t1", redelivered=True)
    assert worker.begun == ["t1"]
    # When the old run has ended
    assert worker.executor.settling.leave_orphan(orphan.delivery)
    # Then the new one begins
    assert worker.begun == ["t1", "t1"]


def test_a_shard_is_idle_when_its_last_run_has_ended_while_the_worker_stops(worker: Worker) -> None:
    # Given two runs of a shard, and a worker that stops
    first, second = worker.admit("t1", key="a"), worker.admit("t2", key="b")
    idle: list[object] = []
    worker.executor.stop(SimpleNamespace(give_up=idle.append))
    # When they end one after the other, then whoever gives the shard up is told of the last
    worker.executor.finish(first)
    assert idle == []
    worker.executor.finish(second)
    assert idle == [worker.shard]
