"""What a busy worker has done is told to the broker together, and always before it could matter."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from celery_sharding.worker.run.ack_batch import WAIT_SECONDS, Acks, fewest_acks
from support.stand_ins import Clock


class Shard:
    """Counts what it was asked to tell."""

    def __init__(self) -> None:
        self.told = 0

    def tell_done(self) -> None:
        self.told += 1


def test_what_is_done_waits_until_the_next_of_its_lane_starts():
    # Given two lanes of two shards with something done
    acks, first, second = Acks(Clock()), Shard(), Shard()
    acks.gather("a", first)
    acks.gather("b", second)
    assert (first.told, second.told) == (0, 0)
    # When the next of one lane is about to start
    acks.tell("a")
    # Then only its shard tells
    assert (first.told, second.told) == (1, 0)


def test_nothing_waits_longer_than_the_limit():
    clock, shard = Clock(), Shard()
    acks = Acks(clock)
    # Given several things done, with one timer for all
    for lane in "abc":
        acks.gather(lane, shard)
    assert [seconds for seconds, _ in clock.timers] == [WAIT_SECONDS]
    # When it fires
    clock.fire()
    # Then all is told, and what is done next gets a timer of its own
    assert shard.told
    acks.gather("a", shard)
    assert len(clock.timers) == 1


def test_a_timer_that_went_with_its_connection_is_not_waited_for():
    # Given a timer that never fires, because the worker has lost its connection
    clock, shard = Clock(), Shard()
    acks = Acks(clock)
    acks.gather("a", shard)
    clock.timers.clear()
    # When the worker has connected again and does something
    acks.forget()
    acks.gather("b", shard)
    # Then there is a timer again
    clock.fire()
    assert shard.told == 1


@given(st.lists(st.sampled_from(["done", "told", "left"]), max_size=30))
def test_the_broker_is_told_exactly_what_is_done(states):
    # Given the deliveries of a channel, some told before, some done, some neither
    tags = range(1, len(states) + 1)
    done = [tag for tag, state in zip(tags, states, strict=True) if state == "done"]
    left = [tag for tag, state in zip(tags, states, strict=True) if state == "left"]
    # When the acknowledgements reach a broker, for which "multiple" means all up to the tag
    unacknowledged = {*done, *left}
    acks = fewest_acks(reversed(done), first_left=min(left, default=None))
    for tag, multiple in acks:
        assert tag in unacknowledged
        unacknowledged -= {known for known in unacknowledged if known <= tag} if multiple else {tag}
    # Then only what is left is unacknowledged, and nothing was told one by one that could be told together
    assert sorted(unacknowledged) == left
    assert sum(tag < min(left, default=len(states) + 1) for tag, _ in acks) <= 1
