"""Rate limits: heads that wait for one bucket begin one by one, in order, at its rate."""

from __future__ import annotations

import heapq
from types import SimpleNamespace

import pytest

from celery_sharding.worker.run.limits import Limits
from support.stand_ins import admit, make_lanes


class Bucket:
    """A token bucket of capacity one, by a clock that the test moves."""

    def __init__(self, field, fill_rate: float) -> None:
        self.field, self.fill_rate = field, fill_rate
        self.tokens, self.at = 1.0, field.now

    def level(self) -> float:
        self.tokens = min(1.0, self.tokens + self.fill_rate * (self.field.now - self.at))
        self.at = self.field.now
        return self.tokens

    def can_consume(self, tokens: int) -> bool:
        if self.level() + 1e-9 < tokens:
            return False
        self.tokens -= tokens
        return True

    def expected_time(self, tokens: int) -> float:
        return max(0.0, tokens - self.level() - 1e-9) / self.fill_rate


class Field:
    """Lanes, limits, and a clock that goes from alarm to alarm."""

    def __init__(self, *, slots: int = 100) -> None:
        self.now, self.alarms, self.number = 0.0, [], 0
        self.begun: list[tuple[float, str]] = []
        self.bucket: Bucket | None = Bucket(self, 5.0)
        self.lanes = make_lanes(self.start, lambda: slots)
        self.limits = Limits(self.lanes, self, self)

    def bucket_for(self, task: str) -> Bucket | None:
        return self.bucket

    def start(self, entry) -> None:
        if self.limits.pass_or_hold(entry):
            self.begun.append((round(self.now, 3), entry.lane))

    def call_after(self, seconds: float, call) -> None:
        self.number += 1
        heapq.heappush(self.alarms, (self.now + seconds, self.number, call))

    def admit(self, *names: str, source: str = "shard") -> None:
        for name in names:
            admit(self.lanes, name, source, SimpleNamespace(task=SimpleNamespace(name="limited")))

    def run(self, until: float = 1_000.0) -> None:
        while self.alarms and self.alarms[0][0] <= until:
            self.now, _, call = heapq.heappop(self.alarms)
            call()


@pytest.fixture
def field() -> Field:
    return Field()


def test_fifteen_heads_begin_in_order_at_the_rate_of_the_bucket(field):
    # Given fifteen keys with a task of one limit
    names = [f"k{number:02}" for number in range(15)]
    # When they come at once
    field.admit(*names)
    field.run()
    # Then they begin in order, one each fifth of a second
    assert [name for _, name in field.begun] == names
    assert [at for at, _ in field.begun] == pytest.approx([number / 5 for number in range(15)], abs=0.01)


def test_a_head_that_is_given_up_keeps_nobody_waiting(field):
    # Given heads that wait, the next of which is of another shard
    field.admit("a")
    field.admit("b", source="other")
    field.admit("c")
    # When that shard is given up
    field.lanes.close("other")
    field.run()
    # Then the one behind it has its turn
    assert [name for _, name in field.begun] == ["a", "c"]
    assert field.begun[1][0] == pytest.approx(0.2, abs=0.01)


def test_a_frozen_head_whose_turn_it_was_keeps_nobody_waiting(field):
    # Given heads that wait, the next of which is of a shard that is frozen
    field.admit("a")
    field.admit("b", source="other")
    field.admit("c")
    field.lanes.freeze("other")
    # When its turn comes and goes
    field.run(until=1.0)
    # Then the one behind it begins, and it when its shard is thawed
    assert [name for _, name in field.begun] == ["a", "c"]
    field.now = 1.0
    field.lanes.thaw("other")
    assert [name for _, name in field.begun] == ["a", "c", "b"]


def test_a_limit_that_is_lifted_lets_all_go(field):
    # Given heads that would wait for hours
    field.bucket = Bucket(field, 1 / 3_600)
    field.admit("a", "b", "c")
    # When the limit is lifted
    field.bucket = None
    field.run(until=2.0)
    # Then they begin soon
    assert [name for _, name in field.begun] == ["a", "b", "c"]


def test_a_limit_that_is_changed_holds_from_then_on(field):
    # Given heads that would wait for hours
    field.bucket = Bucket(field, 1 / 3_600)
    field.admit("a", "b", "c", "d")
    # When another limit is set
    field.bucket = Bucket(field, 10.0)
    field.run(until=5.0)
    # Then they begin in order, at its rate
    ats = [at for at, _ in field.begun[1:]]
    assert [name for _, name in field.begun] == ["a", "b", "c", "d"]
    assert [later - ats[0] for later in ats] == pytest.approx([0.0, 0.1, 0.2], abs=0.01)
