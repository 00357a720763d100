"""Which redelivered messages run side by side, so that none dies for what another did."""

from __future__ import annotations

import pytest

from celery_sharding.worker.redelivery.suspects import Suspects
from celery_sharding.worker.run.lanes import Entry, State


@pytest.fixture
def suspects() -> Suspects:
    return Suspects()


def start(name: str) -> Entry:
    """Return an entry as the pool has it."""
    entry = Entry(name, "shard", name)
    entry.state = State.RUNNING
    return entry


def hold(suspects: Suspects, entry: Entry, *, is_last_chance: bool) -> None:
    entry.state = State.HELD
    suspects.wait(entry, is_last_chance=is_last_chance)


def test_suspects_run_side_by_side_while_none_is_on_its_last_chance(suspects: Suspects) -> None:
    # Given two suspects, when they begin, then both may
    assert suspects.begin(start("a"), is_last_chance=False)
    assert suspects.begin(start("b"), is_last_chance=False)


def test_a_last_chance_waits_for_other_suspects_and_keeps_new_ones_waiting(suspects: Suspects) -> None:
    # Given a suspect that runs, and one on its last chance
    running, last, late = start("a"), start("b"), start("c")
    assert suspects.begin(running, is_last_chance=False)
    assert not suspects.begin(last, is_last_chance=True)
    hold(suspects, last, is_last_chance=True)
    # When another suspect comes, then it waits behind it
    assert not suspects.begin(late, is_last_chance=False)
    hold(suspects, late, is_last_chance=False)
    assert suspects.take_ready() == []
    # When the first has ended, then the last chance begins alone, and after it the other
    running.state = State.SETTLED
    assert suspects.take_ready() == [last]
    last.state = State.RUNNING
    assert suspects.begin(last, is_last_chance=True)
    assert suspects.take_ready() == []
    last.state = State.SETTLED
    assert suspects.take_ready() == [late]
    late.state = State.RUNNING
    assert suspects.begin(late, is_last_chance=False)


def test_a_waiting_suspect_whose_shard_was_given_up_holds_nobody(suspects: Suspects) -> None:
    # Given a last chance that waits for a suspect, and is dropped with its shard
    running, last = start("a"), start("b")
    assert suspects.begin(running, is_last_chance=False)
    hold(suspects, last, is_last_chance=True)
    last.state = State.DROPPED
    # When another suspect comes, then it may begin
    assert suspects.begin(start("c"), is_last_chance=False)


def test_last_chances_take_turns(suspects: Suspects) -> None:
    # Given three on their last chance, behind a suspect that runs
    running, *lasts = (start(name) for name in "abcd")
    assert suspects.begin(running, is_last_chance=False)
    for entry in lasts:
        assert not suspects.begin(entry, is_last_chance=True)
        hold(suspects, entry, is_last_chance=True)
    # When it has ended, and each of them in its turn, then they begin one by one, in the order in which they came
    ended = running
    for entry in lasts:
        ended.state = State.SETTLED
        assert suspects.take_ready() == [entry]
        assert suspects.take_ready() == []
        entry.state = State.RUNNING
        assert suspects.begin(entry, is_last_chance=True)
        assert suspects.take_ready() == []
        ended = entry
