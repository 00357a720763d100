"""What waits in the lanes of a worker for the claim store, or for another run's claim."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from celery.app.task import Context

from celery_sharding.dedup.waiting import CLAIM, STORE, WaitInLane, may_wait_in_lane
from celery_sharding.wire import ASKS_STORE, SHARD_ATTRIBUTE
from celery_sharding.worker.run.delivery import Entry, State
from celery_sharding.worker.run.waits import Waits
from support.stand_ins import Clock, admit, make_lanes


class Worker:
    """Lanes whose runs wait as they are told, and timers that go off when they are told."""

    def __init__(self, slots: int) -> None:
        self.started: list[str] = []
        self.clock = Clock()
        self.lanes = make_lanes(self._start, lambda: slots)
        self.waits = Waits(self.lanes, self.clock)

    def admit(self, *names: str, on_store_error: str = "wait") -> list[Entry]:
        return [admit(self.lanes, name, "shard", _request(on_store_error)) for name in names]

    def let_try(self) -> None:
        """Let the time of the next try come."""
        assert self.waits.outage is not None
        self.waits.outage.next_try = 0.0

    def wait(self, entry: Entry, what: str, **options: Any) -> None:
        wait = WaitInLane(what, "away", **options)
        self.waits.learn(wait)
        assert self.lanes.hold(entry, is_resting=True)
        self.waits.wait(entry, wait)

    def _start(self, entry: Entry) -> None:
        if self.waits.pass_or_hold(entry):
            self.started.append(str(entry.lane))


def _request(on_store_error: str) -> Any:
    options = SimpleNamespace(on_store_error=on_store_error)
    return SimpleNamespace(task=SimpleNamespace(run=SimpleNamespace(__deduplicate__=options)), request_dict={})


@pytest.fixture
def worker() -> Worker:
    return Worker(slots=1)


def test_an_outage_holds_all_lanes_and_no_slot(worker: Worker) -> None:
    # Given three keys and one slot
    first, *_ = worker.admit("a", "b", "c")
    # When the first finds no store
    worker.wait(first, STORE)
    # Then no other tries, none has the slot, and the shard counts as idle
    assert worker.started == ["a"]
    assert worker.lanes.running("shard") == 0
    assert worker.lanes.is_idle("shard")
    assert worker.lanes.only_waits("shard")
    found = worker.waits.of("shard")
    assert (found.for_store, found.for_claims) == (3, 0)
    assert found.store_away_since is not None
    # And a task that would rather fail is not held
    worker.admit("d", on_store_error="fail")
    assert worker.started == ["a", "d"]


def test_all_go_on_when_the_one_that_asks_gets_an_answer() -> None:
    # Given an outage that four lanes wait for
    worker = Worker(slots=10)
    entries = worker.admit("a", "b", "c", "d")
    for entry in entries:
        worker.wait(entry, STORE)
    worker.let_try()
    # When it is time to try, then one asks
    worker.clock.fire()
    asking = [entry for entry in entries if entry.state is State.RUNNING]
    assert len(asking) == 1
    assert asking[0].request.request_dict[ASKS_STORE]
    # And when it gets an answer, all start, in the order in which they came
    worker.waits.answers()
    assert all(entry.state is State.RUNNING for entry in entries)
    assert worker.waits.of("shard").store_away_since is None


def test_when_the_one_that_asks_is_dropped_another_asks(worker: Worker) -> None:
    entries = worker.admit("a", "b")
    worker.wait(entries[0], STORE)
    worker.let_try()
    worker.clock.fire()
    asking = next(entry for entry in entries if entry.state is State.RUNNING)
    # When the message that asks is revoked
    worker.lanes.settle(asking)
    worker.waits.forget(asking)
    # Then the other one asks
    worker.clock.fire()
    assert [entry.state for entry in entries if entry is not asking] == [State.RUNNING]


def test_the_one_that_asks_begins_though_it_was_held_on_its_way(worker: Worker) -> None:
    # Given an outage, and a run that is to ask
    entries = worker.admit("a", "b")
    worker.wait(entries[0], STORE)
    worker.let_try()
    worker.clock.fire()
    asking = next(entry for entry in entries if entry.state is State.RUNNING)
    # When its rate limit holds it for a moment
    worker.lanes.hold(asking)
    worker.started.clear()
    worker.lanes.due(asking)
    # Then it asks after that, and not when it has been given up
    assert worker.started == [asking.lane]


def test_a_sharded_run_has_a_lane_to_wait_in() -> None:
    assert may_wait_in_lane(Context({SHARD_ATTRIBUTE: "orders/3", "is_eager": False}))
    assert not may_wait_in_lane(Context({SHARD_ATTRIBUTE: "orders/3", "is_eager": True}))
    assert not may_wait_in_lane(Context({"is_eager": False}))


def test_duplicates_look_again_ever_later_and_no_later_than_the_lease_ends(worker: Worker) -> None:
    (entry,) = worker.admit("a")
    seconds = []
    for _ in range(7):
        worker.wait(entry, CLAIM)
        seconds += worker.clock.fire()
    assert seconds == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    worker.wait(entry, CLAIM, at_most_seconds=0.3)
    assert worker.clock.fire() == [0.3]


def test_a_thousand_duplicates_look_a_hundred_times_a_second() -> None:
    worker = Worker(slots=1_000)
    entries = worker.admit(*map(str, range(1_000)))
    for _ in range(12):
        for entry in entries:
            worker.wait(entry, CLAIM)
        seconds = worker.clock.fire()
    assert sum(1 / each for each in seconds) == pytest.approx(100)


def test_a_wait_survives_the_way_from_a_child_to_its_parent() -> None:
    wait = WaitInLane(STORE, "away", at_most_seconds=2.0, run_id="run", commit=(b"1 result", True))
    assert vars(pickle.loads(pickle.dumps(wait))) == vars(wait)
