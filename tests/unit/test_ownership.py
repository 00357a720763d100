"""Ownership: shards spread evenly, with as few moves as possible, and never while somebody is busy."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_sharding.worker.balance.moves import Moves
from celery_sharding.worker.balance.plan import Member, View, plan_moves


def members(**owned: set[str]) -> dict[str, Member]:
    """Workers that own what is said and stand by for all the rest."""
    queues = set().union(*owned.values())
    return {name: Member(frozenset(own), frozenset(queues - own)) for name, own in owned.items()}


def test_a_worker_that_joins_gets_its_share_and_no_more() -> None:
    # Given one worker with eight shards, and one with none
    group = members(a={f"q{n}" for n in range(8)}, b=set())
    # When moves are planned
    moves = plan_moves(group)
    # Then half of them go over
    assert len(moves) == 4
    assert set(moves.values()) == {"b"}


def test_an_even_group_stays_as_it_is() -> None:
    assert plan_moves(members(a={"q0", "q1"}, b={"q2"})) == {}


def test_nothing_moves_while_a_shard_has_no_owner_or_two() -> None:
    group = members(a={"q0", "q1", "q2"}, b=set())
    unowned = {**group, "b": Member(frozenset(), frozenset({"q0", "q1", "q2", "q3"}))}
    assert plan_moves(unowned) == {}
    assert plan_moves(members(a={"q0", "q1", "q2"}, b={"q0"})) == {}


def test_shards_go_only_to_workers_that_consume_them() -> None:
    # Given a worker that stands by for one shard only
    group = {"a": Member(frozenset({"q0", "q1", "q2"}), frozenset()), "b": Member(frozenset(), frozenset({"q2"}))}
    # When moves are planned, then it gets that one
    assert plan_moves(group) == {"q2": "b"}


@given(st.lists(st.integers(min_value=0, max_value=5), min_size=1, max_size=40), st.integers(min_value=1, max_value=6))
def test_any_spread_becomes_even_with_the_fewest_moves(owners: list[int], workers: int) -> None:
    # Given any owners among some workers that all consume everything
    owned: dict[str, set[str]] = {f"w{number}": set() for number in range(max(workers, max(owners) + 1))}
    for number, owner in enumerate(owners):
        owned[f"w{owner}"].add(f"q{number}")
    # When the moves are made
    moves = plan_moves(members(**owned))
    load = Counter({name: len(own) for name, own in owned.items()})
    fewest = sum(max(0, count - -(-len(owners) // len(owned))) for count in load.values())
    for queue, target in moves.items():
        donor = next(name for name, own in owned.items() if queue in own)
        load[donor] -= 1
        load[target] += 1
    # Then most minus least is at most one, and no move was wasted
    assert max(load.values()) - min(load.values()) <= 1
    assert len(moves) >= fewest
    assert len(moves) <= sum(max(0, count - len(owners) // len(owned)) for count in map(len, owned.values()))


class Worker:
    """A worker in a simulated broker that makes the longest waiting consumer the next active one."""

    def __init__(self, name: str, broker: Broker) -> None:
        self.name = name
        self.broker = broker
        self.busy: set[str] = set()
        self.frozen: list[str] = []
        self.view = View()
        self.moves = Moves(name, self.view, self)

    def offer(self, queue: str, target: str) -> None:
        for name, worker in self.broker.workers.items():
            if name not in (self.name, target):
                self.broker.step_back(queue, worker)

    def freeze(self, queue: str) -> None:
        self.frozen.append(queue)

    def thaw(self, queue: str) -> None:
        self.frozen.remove(queue)

    def is_idle(self, queue: str) -> bool:
        return queue not in self.busy

    def release(self, queue: str) -> None:
        self.frozen.remove(queue)
        self.broker.step_back(queue, self)
        self.broker.moves += 1

    def member(self) -> Member:
        owned = frozenset(queue for queue, line in self.broker.lines.items() if line[0] is self)
        return Member(owned, frozenset(self.broker.lines) - owned)


class Broker:
    def __init__(self, shards: int) -> None:
        self.lines: dict[str, list[Worker]] = {f"q{number}": [] for number in range(shards)}
        self.workers: dict[str, Worker] = {}
        self.moves = 0
        self.now = 100.0

    def join(self, name: str) -> Worker:
        worker = self.workers[name] = Worker(name, self)
        for line in self.lines.values():
            line.append(worker)
        return worker

    def leave(self, name: str) -> None:
        worker = self.workers.pop(name)
        for line in self.lines.values():
            line.remove(worker)

    def step_back(self, queue: str, worker: Worker) -> None:
        self.lines[queue].remove(worker)
        self.lines[queue].append(worker)

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            for teller in self.workers.values():
                for listener in self.workers.values():
                    listener.view.hear(teller.name, teller.member(), self.now)
            for worker in list(self.workers.values()):
                worker.moves.tick(worker.member(), self.now)

    def spread(self) -> int:
        loads = [len(worker.member().owned) for worker in self.workers.values()]
        return max(loads) - min(loads)


@pytest.mark.parametrize(("shards", "workers"), [(8, 2), (8, 3), (64, 8), (5, 7)])
def test_workers_that_start_one_after_the_other_share_evenly_within_15_seconds(shards: int, workers: int) -> None:
    # Given a group whose workers start together, the first owning everything
    broker = Broker(shards)
    for number in range(workers):
        broker.join(f"w{number}")
    # When 15 seconds pass
    broker.run(15)
    # Then the shards are spread evenly, each moved at most once
    assert broker.spread() <= 1
    assert broker.moves <= shards


def test_a_join_moves_only_what_it_must() -> None:
    # Given 64 shards spread over 8 workers
    broker = Broker(64)
    for number in range(8):
        broker.join(f"w{number}")
    broker.run(15)
    broker.moves = 0
    # When a ninth joins
    broker.join("w8")
    broker.run(30)
    # Then it has its share, and nothing else has moved
    assert broker.spread() <= 1
    assert broker.moves == 7


def test_a_worker_that_leaves_gives_its_shards_to_all_others() -> None:
    # Given 12 shards on four workers
    broker = Broker(12)
    for number in range(4):
        broker.join(f"w{number}")
    broker.run(15)
    # When one leaves
    broker.leave("w0")
    broker.run(15)
    # Then the others share them evenly
    assert broker.spread() <= 1


def test_a_busy_shard_is_thawed_after_two_seconds_and_moved_when_it_is_idle() -> None:
    # Given a worker whose shards all run a long task, and one that joins
    broker = Broker(2)
    owner = broker.join("a")
    owner.busy = set(broker.lines)
    broker.join("b")
    # When time passes, then a freeze never lasts longer than its limit
    frozen = 0
    for _ in range(30):
        broker.run(1)
        frozen = frozen + 1 if owner.frozen else 0
        assert frozen <= 2
    assert broker.moves == 0
    # And when one is idle, it moves
    owner.busy = {"q1"}
    broker.run(20)
    assert broker.spread() <= 1
