"""Lanes: no two of a key at once, the order of a key kept, nothing forgotten, whatever happens in between."""

from __future__ import annotations

import threading
from collections import defaultdict

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from celery_sharding.worker.run.delivery import Entry, State
from support.stand_ins import GatedEntry, admit, make_lanes


class Pool:
    """Takes what the lanes start, and remembers it."""

    def __init__(self, slots: int = 100) -> None:
        self.slots = slots
        self.started: list[object] = []
        self.lanes = make_lanes(self._start, lambda: self.slots)

    def _start(self, entry: Entry) -> None:
        self.started.append(entry.request)


@pytest.fixture
def pool() -> Pool:
    return Pool()


def test_one_task_of_a_lane_runs_at_a_time(pool: Pool) -> None:
    # Given three tasks of one key
    first, _, _ = [admit(pool.lanes, "a", "q", number) for number in (1, 2, 3)]
    # When the first is settled
    assert pool.started == [1]
    pool.lanes.settle(first)
    # Then the second starts
    assert pool.started == [1, 2]


def test_a_held_task_holds_only_its_own_lane(pool: Pool) -> None:
    # Given two keys with two tasks each
    a = [admit(pool.lanes, "a", "q", f"a{number}") for number in (1, 2)]
    b = [admit(pool.lanes, "b", "q", f"b{number}") for number in (1, 2)]
    # When the first of "a" is held and the first of "b" settled
    pool.lanes.hold(a[0])
    pool.lanes.settle(b[0])
    # Then "b" goes on and "a" waits until it is due
    assert pool.started == ["a1", "b1", "b2"]
    pool.lanes.due(a[0])
    assert pool.started == ["a1", "b1", "b2", "a1"]


def test_a_lost_run_starts_again_before_its_successor(pool: Pool) -> None:
    # Given two tasks of a key, the first running
    first, _ = admit(pool.lanes, "a", "q", 1), admit(pool.lanes, "a", "q", 2)
    # When its run is lost
    pool.lanes.again(first)
    # Then it runs again
    assert pool.started == [1, 1]


def test_a_frozen_source_starts_nothing_until_it_thaws(pool: Pool) -> None:
    # Given a running task and its successor
    first = admit(pool.lanes, "a", "q", 1)
    admit(pool.lanes, "a", "q", 2)
    # When their source is frozen and the first settles
    pool.lanes.freeze("q")
    pool.lanes.settle(first)
    admit(pool.lanes, "b", "q", 3)
    assert pool.started == [1]
    # Then thawing starts what may run
    pool.lanes.thaw("q")
    assert sorted(pool.started) == [1, 2, 3]


def test_a_retry_that_is_due_after_the_freeze_starts_nothing(pool: Pool) -> None:
    # Given a held task
    entry = admit(pool.lanes, "a", "q", 1)
    pool.lanes.hold(entry)
    # When it becomes due in a frozen source
    pool.lanes.freeze("q")
    pool.lanes.due(entry)
    # Then it does not start
    assert pool.started == [1]


def test_an_orphan_keeps_its_lane_locked_until_it_has_ended(pool: Pool) -> None:
    # Given a running task whose source is closed, and its redelivery from a new source
    orphan = admit(pool.lanes, "a", "old", 1)
    pool.lanes.close("old")
    admit(pool.lanes, "a", "new", 1)
    assert pool.started == [1]
    # When the old run has ended
    pool.lanes.settle(orphan)
    # Then the redelivered one starts
    assert pool.started == [1, 1]


@pytest.mark.parametrize("ending", ["hold", "again"])
def test_an_orphan_that_wants_to_run_again_only_unlocks_its_lane(pool: Pool, ending: str) -> None:
    # Given an orphan and its redelivery
    orphan = admit(pool.lanes, "a", "old", 1)
    pool.lanes.close("old")
    admit(pool.lanes, "a", "new", 2)
    # When the orphan's run asks for a retry or is lost
    getattr(pool.lanes, ending)(orphan)
    # Then only the redelivery runs
    assert pool.started == [1, 2]
    assert orphan.state is State.SETTLED


def test_no_more_than_the_slots_run_and_the_longest_ready_goes_first() -> None:
    # Given a pool with two slots and four keys
    pool = Pool(slots=2)
    entries = [admit(pool.lanes, key, "q", key) for key in "abcd"]
    assert pool.started == ["a", "b"]
    # When one ends
    pool.lanes.settle(entries[0])
    # Then the one that has waited longest takes its slot
    assert pool.started == ["a", "b", "c"]


def test_a_task_that_ends_inside_start_does_not_recurse() -> None:
    # Given a pool that runs tasks inside start, as solo does
    depths: list[int] = []
    depth = 0

    def start(entry: Entry) -> None:
        nonlocal depth
        depth += 1
        depths.append(depth)
        lanes.settle(entry)
        depth -= 1

    lanes = make_lanes(start, lambda: 1)
    lanes.freeze("q")
    for number in range(2_000):
        admit(lanes, "a", "q", number)
    # When a long lane may run
    lanes.thaw("q")
    # Then it runs to its end, one level deep
    assert depths == [1] * 2_000


def test_a_long_lane_and_a_source_that_comes_late_do_not_wait_behind_what_came_before() -> None:
    # Given one slot, a lane of three between short ones, and a second source that is heard only after them
    order: list[str] = []
    running: list[Entry] = []

    def start(entry: Entry) -> None:
        order.append(entry.request)
        running.append(entry)

    lanes = make_lanes(start, lambda: 1)
    lanes.freeze("one")
    for item in ("hot1", "a", "hot2", "b", "hot3", "c", "d"):
        admit(lanes, item[:3], "one", item)
    for item in ("x", "y"):
        admit(lanes, item, "two", item)
    lanes.thaw("one")
    # When one entry after the other ends
    while running:
        lanes.settle(running.pop())
    # Then sources took turns, and the long lane kept its place among the others of its source
    assert [item for item in order if item not in "xy"] == ["hot1", "a", "hot2", "b", "hot3", "c", "d"]
    assert order.index("y") < order.index("hot3")


def test_what_may_not_start_yet_keeps_its_place_and_starts_when_it_may() -> None:
    # Given a key that is held back, with two tasks, and another key
    started: list[object] = []
    held_back = {"a"}
    lanes = make_lanes(lambda entry: started.append(entry.request), lambda: 4)

    def gate(entry: Entry) -> bool:
        return entry.lane not in held_back

    first = admit(lanes, "a", "q", "a1", gate=gate)
    admit(lanes, "a", "q", "a2", gate=gate)
    admit(lanes, "b", "p", "b1", gate=gate)
    assert started == ["b1"]
    assert lanes.only_waits("q")
    # When it may start
    held_back.clear()
    lanes.reconsider()
    lanes.settle(first)
    # Then both run, in their order
    assert started == ["b1", "a1", "a2"]


def test_an_error_in_start_does_not_stop_the_lanes() -> None:
    # Given a pool that refuses the first task
    started: list[object] = []

    def start(entry: Entry) -> None:
        if entry.request == "bad":
            raise RuntimeError("no")
        started.append(entry.request)

    lanes = make_lanes(start, lambda: 4)
    # When a task follows
    with pytest.raises(RuntimeError):
        admit(lanes, "a", "q", "bad")
    admit(lanes, "b", "q", "good")
    # Then it starts
    assert started == ["good"]


def test_threads_that_settle_and_admit_at_once_keep_the_order_of_each_lane() -> None:
    # Given a pool of threads that settle what they are given
    order: dict[str, list[int]] = defaultdict(list)
    running: dict[str, int] = defaultdict(int)
    overlaps: list[str] = []
    done = threading.Semaphore(0)

    def run(entry: Entry) -> None:
        key, number = entry.request
        running[key] += 1
        if running[key] > 1:
            overlaps.append(key)
        order[key].append(number)
        running[key] -= 1
        lanes.settle(entry)
        done.release()

    def start(entry: Entry) -> None:
        threading.Thread(target=run, args=(entry,)).start()

    lanes = make_lanes(start, lambda: 8)
    # When many are admitted
    for number in range(300):
        admit(lanes, number % 7, "q", (number % 7, number))
    for _ in range(300):
        assert done.acquire(timeout=10)
    # Then each lane kept its order, one at a time
    assert not overlaps
    assert all(numbers == sorted(numbers) for numbers in order.values())


class LanesMachine(RuleBasedStateMachine):
    """Any sequence of admit, settle, hold, due, again, freeze, thaw, hold back, let go, close."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = 3
        self.running: list[Entry] = []
        self.held: list[Entry] = []
        self.alive: list[Entry] = []
        self.frozen: set[str] = set()
        self.first_starts: dict[str, list[int]] = defaultdict(list)
        self.number = 0
        self.held_back: set[object] = set()
        self.lanes = make_lanes(self.start, lambda: self.slots)

    def start(self, entry: Entry) -> None:
        assert entry.lane not in self.held_back
        assert entry.shard not in self.frozen
        assert entry not in self.running
        assert all(other.lane != entry.lane for other in self.running), "two of a lane at once"
        assert entry not in self.held
        self.running.append(entry)
        if entry.request not in self.first_starts[entry.lane]:
            self.first_starts[entry.lane].append(entry.request)

    @rule(lane=strategies.sampled_from("abc"), source=strategies.sampled_from("xy"))
    def admit(self, lane: str, source: str) -> None:
        self.number += 1
        entry = GatedEntry(lane, source, self.number, gate=lambda entry: entry.lane not in self.held_back)
        self.alive.append(entry)
        self.lanes.admit(entry)

    @precondition(lambda self: self.running)
    @rule(data=strategies.data())
    def settle(self, data: strategies.DataObject) -> None:
        entry = data.draw(strategies.sampled_from(self.running))
        self.running.remove(entry)
        if entry in self.alive:
            self.alive.remove(entry)
        self.lanes.settle(entry)

    @precondition(lambda self: self.alive)
    @rule(data=strategies.data())
    def settle_out_of_turn(self, data: strategies.DataObject) -> None:
        entry = data.draw(strategies.sampled_from(self.alive))
        if entry in self.running:
            return
        self.alive.remove(entry)
        if entry in self.held:
            self.held.remove(entry)
        self.lanes.settle(entry)

    @precondition(lambda self: self.running)
    @rule(data=strategies.data())
    def hold(self, data: strategies.DataObject) -> None:
        entry = data.draw(strategies.sampled_from(self.running))
        self.running.remove(entry)
        if entry.state is State.RUNNING:
            self.held.append(entry)
        assert self.lanes.hold(entry) is (entry in self.held)

    @precondition(lambda self: self.held)
    @rule(data=strategies.data())
    def due(self, data: strategies.DataObject) -> None:
        entry = data.draw(strategies.sampled_from(self.held))
        self.held.remove(entry)
        self.lanes.due(entry)

    @precondition(lambda self: self.running)
    @rule(data=strategies.data())
    def lose(self, data: strategies.DataObject) -> None:
        entry = data.draw(strategies.sampled_from(self.running))
        self.running.remove(entry)
        self.lanes.again(entry)

    @rule(source=strategies.sampled_from("xy"))
    def freeze(self, source: str) -> None:
        self.frozen.add(source)
        self.lanes.freeze(source)

    @rule(source=strategies.sampled_from("xy"))
    def thaw(self, source: str) -> None:
        self.frozen.discard(source)
        self.lanes.thaw(source)

    @rule(source=strategies.sampled_from("xy"))
    def close(self, source: str) -> None:
        self.frozen.discard(source)
        self.held = [entry for entry in self.held if entry.shard != source]
        expected = [entry for entry in self.alive if entry.shard == source and entry not in self.running]
        self.alive = [entry for entry in self.alive if entry.shard != source]
        assert self.lanes.close(source) == expected

    @rule(lane=strategies.sampled_from("abc"))
    def hold_back(self, lane: str) -> None:
        self.held_back.add(lane)

    @rule()
    def let_go(self) -> None:
        self.held_back.clear()
        self.lanes.reconsider()

    @invariant()
    def what_only_waits_is_known(self) -> None:
        for source in "xy":
            mine = [entry for entry in self.alive if entry.shard == source]
            if self.lanes.only_waits(source):
                assert not any(entry in self.running for entry in mine)
            elif mine and all(entry in self.held for entry in mine) and not self.orphans_of(source):
                raise AssertionError(f"{mine} only wait")

    def orphans_of(self, source: str) -> list[Entry]:
        """What runs without a message, from before `source` was closed: who waits for its end waits not for long."""
        return [entry for entry in self.running if entry.shard == source and entry not in self.alive]

    @rule(slots=strategies.integers(min_value=1, max_value=5))
    def resize(self, slots: int) -> None:
        self.slots = slots

    @invariant()
    def the_order_of_each_lane_is_kept(self) -> None:
        for started in self.first_starts.values():
            assert started == sorted(started)

    @invariant()
    def nothing_is_forgotten(self) -> None:
        for source in "xy":
            alive = [entry for entry in self.alive if entry.shard == source]
            orphans = [entry for entry in self.running if entry.shard == source and entry not in self.alive]
            assert self.lanes.count(source) == len(alive) + len(orphans)

    def teardown(self) -> None:
        """Whatever happened: when everything may run, everything alive runs to its end."""
        self.slots = 10
        self.let_go()
        for source in "xy":
            self.frozen.discard(source)
            self.lanes.thaw(source)
        for entry in list(self.held):
            self.held.remove(entry)
            self.lanes.due(entry)
        while self.running:
            entry = self.running.pop()
            if entry in self.alive:
                self.alive.remove(entry)
            self.lanes.settle(entry)
        assert self.alive == []


LanesMachine.TestCase.settings = settings(stateful_step_count=40, deadline=None)
TestLanesMachine = LanesMachine.TestCase


@pytest.mark.parametrize("fails", ["start", "may_start"])
def test_an_entry_that_cannot_be_started_is_handed_back_and_stops_no_other(fails):
    # Given lanes in which one entry raises when it is to start
    started, failed = [], []

    def check(entry):
        if entry.lane == "bad":
            raise ValueError("odd")
        return True

    def start(entry):
        if fails == "start":
            check(entry)
        started.append(entry)

    lanes = make_lanes(
        start,
        lambda: 1,
        fail_start=lambda entry, exc: failed.append((entry, str(exc))),
    )
    # When it comes before others, the next of its lane among them
    gate = check if fails == "may_start" else None
    bad = admit(lanes, "bad", "shard", 1, gate=gate)
    good = admit(lanes, "good", "shard", 2, gate=gate)
    behind = admit(lanes, "bad", "shard", 3, gate=gate)
    # Then it is held in its place, and handed back; the other lane goes on
    assert failed == [(bad, "odd")]
    assert (bad.state, good.state, behind.state) == (State.HELD, State.RUNNING, State.WAITING)
    # and when it is settled, its lane does
    lanes.settle(good)
    lanes.settle(bad)
    assert failed[1:] == [(behind, "odd")]
    assert not lanes.in_pool()
