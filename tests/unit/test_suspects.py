"""Which redelivered messages run side by side, so that none dies for what another did."""

from __future__ import annotations

import pytest

from celery_sharding.worker.redelivery.policy import Begin, Decision, History, Wait
from celery_sharding.worker.redelivery.suspects import Suspects
from celery_sharding.worker.run.delivery import Entry

ONCE, LAST_CHANCE = History(begun=1, max_attempts=4), History(begun=3, max_attempts=4)


@pytest.fixture
def suspects() -> Suspects:
    return Suspects()


def start(name: str) -> Entry:
    """Return an entry as the pool has it."""
    entry = Entry(name, "shard", name)
    entry.start()
    return entry


def decide(suspects: Suspects, entry: Entry, history: History) -> Decision:
    """Decide on an entry, and hold it if it is to wait."""
    decision = suspects.decide(entry, history)
    if decision == Wait():
        entry.hold()
        suspects.wait(entry, history)
    return decision


def test_suspects_run_side_by_side_while_none_is_on_its_last_chance(suspects: Suspects) -> None:
    # Given two suspects, when they begin, then both may
    assert decide(suspects, start("a"), ONCE) == Begin(1)
    assert decide(suspects, start("b"), ONCE) == Begin(1)


def test_a_last_chance_waits_for_other_suspects_and_keeps_new_ones_waiting(suspects: Suspects) -> None:
    # Given a suspect that runs, and one on its last chance
    running, last, late = start("a"), start("b"), start("c")
    assert decide(suspects, running, ONCE) == Begin(1)
    assert decide(suspects, last, LAST_CHANCE) == Wait()
    # When another suspect comes, then it waits behind it
    assert decide(suspects, late, ONCE) == Wait()
    assert suspects.take_ready() == []
    # When the first has ended, then the last chance begins alone, and after it the other
    running.settle()
    assert suspects.take_ready() == [last]
    last.start()
    assert decide(suspects, last, LAST_CHANCE) == Begin(3)
    assert suspects.take_ready() == []
    last.settle()
    assert suspects.take_ready() == [late]
    late.start()
    assert decide(suspects, late, ONCE) == Begin(1)


def test_a_waiting_suspect_whose_shard_was_given_up_holds_nobody(suspects: Suspects) -> None:
    # Given a last chance that waits for a suspect, and is dropped with its shard
    running, last = start("a"), start("b")
    assert decide(suspects, running, ONCE) == Begin(1)
    assert decide(suspects, last, LAST_CHANCE) == Wait()
    last.drop()
    # When another suspect comes, then it may begin
    assert decide(suspects, start("c"), ONCE) == Begin(1)


def test_last_chances_take_turns(suspects: Suspects) -> None:
    # Given three on their last chance, behind a suspect that runs
    running, *lasts = (start(name) for name in "abcd")
    assert decide(suspects, running, ONCE) == Begin(1)
    for entry in lasts:
        assert decide(suspects, entry, LAST_CHANCE) == Wait()
    # When it has ended, and each of them in its turn, then they begin one by one, in the order in which they came
    ended = running
    for entry in lasts:
        ended.settle()
        assert suspects.take_ready() == [entry]
        assert suspects.take_ready() == []
        entry.start()
        assert decide(suspects, entry, LAST_CHANCE) == Begin(3)
        assert suspects.take_ready() == []
        ended = entry
