"""Runs of one shard with a channel, a log and a pool that do as the test tells them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from celery import Celery
from celery.exceptions import TimeLimitExceeded, WorkerLostError
from celery.signals import task_failure
from kombu.message import Message

from celery_sharding.celery_hooks.request import ShardRequest
from celery_sharding.config import ShardGroup
from celery_sharding.wire import MESSAGE_ID_HEADER
from celery_sharding.worker.executor import Executor
from celery_sharding.worker.place import Place
from celery_sharding.worker.redelivery.attempts import Attempts
from celery_sharding.worker.run.delivery import DELIVERY, Delivery, Phase
from celery_sharding.worker.run.state_writer import StateWriter
from celery_sharding.worker.services import WorkerServices
from celery_sharding.worker.shard.shard import Shard
from support.stand_ins import Calls, Clock, Log, Mailbox, Pool

GROUP = ShardGroup("orders", shards=1)
DEAD = "shards.orders.dead"


def step(*args: Any) -> None:
    """Do nothing."""


class Channel:
    """Takes acknowledgements."""

    def __init__(self) -> None:
        self.acknowledged: list[int] = []

    def channel(self) -> Channel:
        return self

    def basic_ack(self, tag: int, multiple: bool) -> None:
        self.acknowledged.append(tag)

    def basic_qos(self, *_: Any) -> None: ...

    def basic_consume(self, *_: Any, **__: Any) -> None: ...

    def close(self) -> None: ...

    def decode_body(self, body: Any, encoding: Any) -> Any:
        return body


class Worker:
    """A worker whose lanes may be moved by any thread, as in a pool of threads."""

    def __init__(self, *, is_green: bool = False) -> None:
        self.app = Celery("runs", broker="memory://", backend="cache+memory://", set_as_current=False)
        self.task = self.app.task(name="shop.step", acks_late=True)(step)
        self.app.finalize()
        self.log, self.clock = Log(), Clock()
        self.channel = Channel()
        self.states = StateWriter(self.app, Mailbox())
        self.deliveries: list[Delivery] = []
        self.runs = Executor(Pool(is_green=is_green), self.clock, self.log, self.states, node="w@test")
        services = WorkerServices(
            node="w@test", log=self.log, calls=Calls(), executor=self.runs, receiver=self, hold_seconds=900.0
        )
        self.attempts = Attempts(None, self.log)
        place = Place(GROUP, "g001", 0, "shards.orders.g001.000")
        self.shard = Shard(place, host=self, services=services)  # type: ignore[arg-type]
        self.shard.open(self.channel, 10)

    def receive(self, delivery: Delivery) -> None:
        self.deliveries.append(delivery)

    def deliver(self, task_id: str, *, redelivered: bool = False, payload: Any = None, **headers: Any) -> Delivery:
        tag = len(self.deliveries) + 1
        message = Message(
            body=b"",
            channel=self.channel,
            delivery_tag=tag,
            content_type="application/json",
            content_encoding="utf-8",
            headers={"task": "shop.step", "id": task_id, MESSAGE_ID_HEADER: f"m-{task_id}", **headers},
            properties={"correlation_id": task_id},
            delivery_info={
                "exchange": "shards.orders",
                "routing_key": "key",
                "redelivered": redelivered,
            },
        )
        message._raw = {"body": b""}
        message._decoded_cache = [[], {}, {}] if payload is None else payload
        self.shard.on_message(message)
        return self.deliveries[-1]

    def admit(self, task_id: str, **options: Any) -> ShardRequest:
        delivery = self.deliver(task_id, **options)
        message = delivery.message
        message.delivery_info[DELIVERY] = delivery, self.runs
        request = ShardRequest(
            message,
            app=self.app,
            hostname="w@test",
            task=self.task,
            body=([], {}, {}),
            headers=message.headers,
            decoded=True,
        )
        self.runs.admit(request)
        return request


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.states.stop(10)


def wait_until(is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    pause = threading.Event()
    while not is_so() and time.monotonic() < deadline:
        pause.wait(0.01)
    return is_so()


def failed() -> ExceptionInfo:
    try:
        raise ValueError("outside the body")
    except ValueError:
        return ExceptionInfo()


def test_a_failure_stored_by_the_state_thread_ends_the_run_in_that_thread(worker: Worker) -> None:
    # Given a run that leaves its pool, of threads, by an error
    request = worker.admit("t1")
    # When its failure is stored
    request.on_failure(failed())
    # Then it is acknowledged, and no dead letter says that this could not be done
    assert wait_until(lambda: worker.channel.acknowledged == [1])
    assert worker.app.backend.get_status("t1") == "FAILURE"
    worker.clock.fire()
    assert worker.log.to(DEAD) == []
    assert not worker.runs.lanes.has(("orders", "g001", "key"))


def test_a_hard_time_limit_is_told_once(worker: Worker) -> None:
    # Given a run in a process, and a receiver
    told: list[str] = []

    def note(task_id: str, **_: Any) -> None:
        told.append(task_id)

    task_failure.connect(note)
    request = worker.admit("t1")
    request.on_accepted(4321, time.time())
    # When the pool reports that it has used up its time, as billiard does
    try:
        raise TimeLimitExceeded(3)
    except TimeLimitExceeded:
        request.on_failure(ExceptionInfo())
    request.on_timeout(False, 3)
    # Then it failed once
    worker.states.stop(10)
    assert told == ["t1"]
    assert worker.app.backend.get_status("t1") == "FAILURE"
    assert worker.channel.acknowledged == [1]


def test_an_error_of_who_is_told_ends_no_other(worker: Worker) -> None:
    # Given somebody who fails when told
    told: list[bool] = []
    worker.states.tell("first", lambda: None, lambda is_told: 1 / 0)
    # When another is told after that
    worker.states.tell("second", lambda: None, told.append)
    # Then it is
    assert wait_until(lambda: told == [True])


def test_a_run_that_was_cut_off_is_left_to_its_next_owner(worker: Worker) -> None:
    # Given a run at its last attempt, whose process was killed since the main thread was blocked
    request = worker.admit("t1")
    worker.deliveries[0].ensure_record().attempts = GROUP.max_attempts
    request.on_accepted(4321, time.time())
    request.is_cut_off = True
    # When the main thread hears of its end before it hears of the lost connection
    try:
        raise WorkerLostError("SIGKILL")
    except WorkerLostError:
        request.on_failure(ExceptionInfo())
    # Then it is no dead letter, and nothing is counted
    assert worker.log.to(DEAD) == []
    assert worker.log.to("shards.orders.attempts") == []
    worker.shard.drop()
    assert not worker.runs.lanes.has(("orders", "g001", "key"))


def test_a_message_given_up_while_it_waits_for_its_state_is_no_dead_letter(worker: Worker) -> None:
    # Given a run that ended untold, and a result backend that does not answer
    answers = threading.Event()
    worker.states.tell("blocks", answers.wait)
    request = worker.admit("t1")
    request.on_failure(failed())
    # When its shard is given up, and the time is over
    worker.shard.close()
    worker.clock.fire()
    # Then the message is left to its next owner
    assert worker.log.to(DEAD) == []
    assert worker.channel.acknowledged == []
    answers.set()


def test_an_attempt_is_taken_back_under_the_id_of_its_message(worker: Worker) -> None:
    # Given a redelivered message whose run was recorded
    worker.admit("t1", redelivered=True)
    delivery = worker.deliveries[0]
    assert delivery.record is not None
    assert delivery.record.phase is Phase.BEGUN
    # When it waits in its lane instead
    worker.runs.redeliveries.announcer.take_back(delivery)
    # Then what is taken back is what was recorded
    events = worker.log.to("shards.orders.attempts")
    assert [(event["event"], event["message_id"]) for event in events] == [("attempt", "m-t1"), ("withdrawn", "m-t1")]


def test_a_run_that_has_ended_is_not_killed_for_what_is_still_written_of_it(worker: Worker) -> None:
    # Given a run whose process goes on to another, while its dead letter is not confirmed yet
    request = worker.admit("t1")
    request.on_accepted(4321, time.time())
    worker.log.is_up = False
    request.acknowledged = True
    request.leave_by(worker.runs.failures.bury, "rejected")
    # When the connection is lost
    worker.shard.drop()
    killed: list[int] = []
    worker.runs.kill_orphans(SimpleNamespace(kill=killed.append), is_flushed=True)
    # Then its process is spared, and its lane goes on when the letter is stored
    assert killed == []
    worker.log.confirm()
    assert worker.runs.lanes.in_pool() == []


@pytest.mark.parametrize("is_late", [False, True])
def test_what_cannot_be_started_apart_is_a_dead_letter(is_late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a pool that starts runs in greenlets of their own, and a message that cannot be judged
    worker = Worker(is_green=True)
    attempts, waiting = worker.shard.attempts, []
    monkeypatch.setattr(attempts, "get", lambda message_id: 1 / 0)
    if is_late:
        attempts.is_complete = False
        monkeypatch.setattr(attempts, "catch_up", lambda: None)
        monkeypatch.setattr(attempts, "when_complete", waiting.append)
    # When it starts
    worker.admit("t1", redelivered=True)
    for call in waiting:
        call()
    # Then its key and its slot are free
    assert len(worker.log.to(DEAD)) == 1
    assert worker.channel.acknowledged == [1]
    assert worker.runs.lanes.in_pool() == []
    worker.states.stop(10)
