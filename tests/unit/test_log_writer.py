"""A worker's log: what is written is flushed, beside the caller or within it."""

from __future__ import annotations

import pytest

from celery_sharding.worker.log_writer import InlineLogWriter, LogWriter
from support.confirming import Node, Told


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def told() -> Told:
    return Told()


def test_a_flush_waits_until_all_is_stored(node, told):
    # Given a log with ten writes
    log = LogWriter(node, told)
    for number in range(10):
        log.write([told.write(f"queue-{number}")])
    # When it is flushed
    assert log.flush(30)
    # Then all are stored, in order
    assert told.stored == [f"queue-{number}" for number in range(10)]
    log.stop()


def test_a_stop_writes_what_waits(node, told):
    # Given a log with a write
    log = LogWriter(node, told)
    log.append("stream", {"event": "test"}, lambda: told.stored.append("test"))
    # When it stops
    log.stop()
    # Then that is stored
    assert told.stored == ["test"]


def test_records_are_confirmed_in_their_order(node, told):
    # Given a log
    log = LogWriter(node, told)
    # When records are appended together
    log.append_all([("stream", {"event": name}, lambda name=name: told.stored.append(name)) for name in "abc"])
    # Then they are stored in that order
    assert log.flush(30)
    assert told.stored == ["a", "b", "c"]
    log.stop()


def test_inline_a_needed_write_is_stored_when_the_call_returns_within_what_surrounds_it(node, told):
    # Given a log that writes in its caller
    entered: list[bool] = []

    class Within:
        def __enter__(self) -> None:
            entered.append(True)

        def __exit__(self, *_: object) -> None: ...

    log = InlineLogWriter(node, told, Within())
    # When something is written that somebody waits for
    log.write([told.write("needed")])
    # Then it is stored already
    assert told.stored == ["needed"]
    assert entered == [True]
    # When something optional follows at once, then it waits for the next that is needed
    log.put("optional", b"", optional=True)
    assert len(node.received) == 1
    log.write([told.write("again")])
    assert [queue for queue, _ in node.received] == ["needed", "optional", "again"]
    log.stop()
