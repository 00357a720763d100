"""When the lanes are pumped: at the end of a turn, or at once."""

from __future__ import annotations

from collections.abc import Callable

from celery_sharding.worker.run.pump import Turn


class Loop:
    """An event loop that comes round when told, and what its turns did."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.done: list[str] = []
        self.arrived: list[Callable[[], None]] = []
        self.reads_first = False
        self.turn = Turn(self, lambda: self.done.append("pump"))

    def write(self) -> None:
        self.done.append("write")

    def call_next(self, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def read(self) -> bool:
        self.done.append("read")
        was_any = bool(self.arrived)
        while self.arrived:
            self.arrived.pop(0)()
        return was_any

    def come_round(self) -> None:
        calls, self.calls[:] = self.calls.copy(), []
        for call in calls:
            call()


def test_what_comes_in_one_turn_is_pumped_together():
    # Given three messages in one turn
    loop = Loop()
    for _ in range(3):
        loop.turn.end_soon()
    assert loop.done == []
    # When the loop comes round, then the lanes are pumped once
    loop.come_round()
    assert loop.done == ["pump"]
    assert loop.calls == []


def test_what_follows_a_run_is_written_to_a_child_at_once():
    # Given a pool that takes runs directly
    loop = Loop()
    loop.turn.begin(loop)
    loop.come_round()
    loop.done.clear()
    # When a run ends, then the next does not wait for the loop
    loop.turn.end()
    assert loop.done == ["pump", "write"]


def test_a_turn_whose_end_was_swallowed_ends_after_the_next_connect():
    # Given an event loop that lost its calls to another callback's error
    loop = Loop()
    loop.turn.end_soon()
    loop.calls.clear()
    # When the worker has connected again
    loop.turn.begin(None)
    loop.come_round()
    # Then what may run starts
    assert loop.done == ["pump"]


def test_without_turns_everything_is_done_at_once():
    # Given turns that were stopped
    loop = Loop()
    loop.turn.begin(loop)
    loop.come_round()
    loop.done.clear()
    loop.turn.stop()
    # When a message comes and a run ends, then nothing waits for a loop, and nothing is written to the pool
    loop.turn.end_soon()
    loop.turn.end()
    assert loop.done == ["pump", "pump"]


def test_a_solo_pool_reads_before_each_run_and_lets_what_it_read_take_effect_first():
    # Given a pool that runs the task in the pump, and two things to read, one of which is a command
    loop = Loop()
    loop.arrived = [lambda: loop.calls.append(lambda: loop.done.append("command obeyed")), lambda: None]
    loop.reads_first = True
    # When a run has ended, and the loop comes round
    loop.turn.end()
    assert loop.done == []
    for _ in range(4):
        loop.calls.reverse()  # Celery's loop keeps no order within a turn
        loop.come_round()
    # Then the next run starts after the command was obeyed, and there is nothing more to read
    assert loop.done == ["read", "command obeyed", "read", "pump"]
