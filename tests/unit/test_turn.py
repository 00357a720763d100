"""What the end of a turn promises: acknowledgements first, and none twice or late."""

from __future__ import annotations

from collections.abc import Callable

import amqp
import pytest
from amqp.method_framing import frame_writer

from celery_sharding.worker.turn import Turn


class Wire:
    """The end of a connection that the library writes to; stands for the transport too."""

    frame_max = 131_072
    bytes_sent = 0

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.transport = self
        self.frame_writer = frame_writer(self, self)
        self.channels: dict[int, amqp.Channel] = {}

    def write(self, data: bytes | memoryview) -> None:
        self.written.append(bytes(data))

    def channel(self, number: int) -> amqp.Channel:
        channel = amqp.Channel.__new__(amqp.Channel)
        channel.connection, channel.channel_id = self, number
        channel.is_closing = False
        return channel


class Loop:
    """An event loop that comes round when told."""

    def __init__(self, *, pump: Callable[[], None]) -> None:
        self.calls: list[Callable[[], None]] = []
        self.turn = Turn(self.calls.append, pump)

    def come_round(self) -> None:
        calls, self.calls[:] = self.calls.copy(), []
        for call in calls:
            call()


def _refuse(*_: object) -> None:
    raise ConnectionResetError("gone")


def ignore() -> None:
    """Nothing is to be done about a failure."""


@pytest.fixture
def wire() -> Wire:
    return Wire()


def test_acknowledgements_of_a_turn_leave_before_anything_starts(wire):
    # Given two channels of one connection, on which a turn settles three messages
    written_at_pump: list[int] = []
    loop = Loop(pump=lambda: written_at_pump.append(len(wire.written)))
    first, second = wire.channel(3), wire.channel(4)
    loop.turn.acknowledge(first, 7, ignore)
    loop.turn.acknowledge(second, 1, ignore)
    loop.turn.acknowledge(first, 9, ignore)
    assert wire.written == []
    # When the loop comes round
    loop.come_round()
    # Then all were written before the only pump
    assert len(wire.written) == 3
    assert written_at_pump == [3]
    assert loop.calls == []


def test_nothing_is_written_for_a_channel_that_is_gone(wire):
    # Given a message settled on each of two channels
    loop = Loop(pump=lambda: None)
    lost, kept = wire.channel(1), wire.channel(2)
    loop.turn.acknowledge(lost, 5, ignore)
    loop.turn.acknowledge(kept, 6, ignore)
    # When one is lost before the turn ends
    loop.turn.forget(lost)
    loop.come_round()
    # Then only the other's is written
    kept.basic_ack(6)
    assert wire.written[0] == wire.written[1]


def test_a_shard_learns_that_its_acknowledgements_failed_before_anything_starts(wire):
    # Given a connection whose transport is gone
    told: list[str] = []
    loop = Loop(pump=lambda: told.append("pump"))
    loop.turn.acknowledge(wire.channel(1), 5, lambda: told.append("first"))
    loop.turn.acknowledge(wire.channel(2), 6, lambda: told.append("second"))
    wire.frame_writer = _refuse
    # When the turn ends
    loop.come_round()
    # Then both shards can freeze before the lanes go on
    assert told == ["first", "second", "pump"]


def test_a_turn_whose_end_was_swallowed_ends_after_the_next_connect(wire):
    # Given an event loop that lost its calls to another callback's error
    pumps: list[str] = []
    loop = Loop(pump=lambda: pumps.append("pumped"))
    loop.turn.end_soon()
    loop.calls.clear()
    # When the worker has connected again
    loop.turn.restart()
    loop.come_round()
    # Then what may run starts
    assert pumps == ["pumped"]


def test_without_turns_everything_is_done_at_once(wire):
    # Given turns that were stopped with something left to write
    pumps: list[str] = []
    loop = Loop(pump=lambda: pumps.append("pumped"))
    channel = wire.channel(1)
    loop.turn.acknowledge(channel, 1, ignore)
    loop.turn.stop()
    assert len(wire.written) == 1
    # When more is settled
    loop.turn.acknowledge(channel, 2, ignore)
    loop.turn.end_soon()
    # Then nothing waits for a loop
    assert len(wire.written) == 2
    assert pumps == ["pumped"]


def test_what_a_turn_makes_ready_leaves_with_the_batch_of_the_same_turn(wire):
    # Given a turn that has settled something, and a pool that is about to write runs to its processes
    told: list[str] = []
    loop = Loop(pump=lambda: told.append(f"pump after {len(wire.written)} acknowledgements"))
    write = loop.turn.end_before(lambda fds: told.append(f"runs to {fds}"))
    loop.turn.acknowledge(wire.channel(1), 5, ignore)
    # When it writes, and the loop comes round later
    write([8])
    loop.come_round()
    # Then the turn ended first, and once
    assert told == ["pump after 1 acknowledgements", "runs to [8]"]
