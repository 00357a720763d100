"""Which failures a call that makes a group whole gets over by itself."""

from __future__ import annotations

import pytest

from celery_sharding.errors import LockHeld, LockLost, OutOfReach, TopologyMismatch
from celery_sharding.layout.ensure import Turns


@pytest.mark.parametrize("error", [OutOfReach("a node starts"), LockLost("with its connection")])
def test_what_passes_by_itself_is_tried_again_on_the_next_node(error):
    turns = Turns(wait_seconds=60)

    turns.pass_on(error)

    assert turns.node == 1


def test_a_lock_that_is_held_is_asked_for_again_where_it_is():
    turns = Turns(wait_seconds=60)

    turns.pass_on(LockHeld("by another process"))

    assert turns.node == 0


def test_what_does_not_pass_is_raised_at_once():
    with pytest.raises(TopologyMismatch):
        Turns(wait_seconds=60).pass_on(TopologyMismatch("other arguments"))


@pytest.mark.parametrize("error", [OutOfReach("a node starts"), LockHeld("by another process")])
def test_when_the_time_is_over_the_last_failure_is_raised(error):
    turns = Turns(wait_seconds=0)

    assert turns.lock_seconds == 0
    with pytest.raises(type(error)):
        turns.pass_on(error)
