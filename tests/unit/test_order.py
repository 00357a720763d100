"""The order checker, by traces written by hand."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from celery_sharding.testing import Trace, check_order


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    return Trace(tmp_path / "trace")


def write(trace: Trace, *marks: tuple[str, str, int, str]) -> None:
    for kind, key, number, run in marks:
        trace.mark(kind, key, number, run)


def test_runs_one_after_the_other_in_their_order_are_clean(trace: Trace) -> None:
    for number in (1, 2, 3):
        with trace.run("a", number):
            pass
    verdict = check_order(trace, [("a", number) for number in (1, 2, 3)])
    assert verdict.is_clean
    assert (verdict.published, verdict.ended) == (3, 3)


def test_what_never_ended_is_lost(trace: Trace) -> None:
    write(trace, ("start", "a", 1, "r1"))
    verdict = check_order(trace, [("a", 1), ("b", 1)])
    assert verdict.lost == 2
    assert verdict.examples["lost"] == "'a' number 1 never ended"


def test_a_run_that_died_and_ran_again_is_neither_repeated_nor_overlapping(trace: Trace) -> None:
    write(trace, ("start", "a", 1, "r1"), ("start", "a", 1, "r2"), ("end", "a", 1, "r2"))
    assert check_order(trace, [("a", 1)]).is_clean


def test_a_message_that_ended_twice_is_repeated_and_not_out_of_order(trace: Trace) -> None:
    write(trace, *[(kind, "a", number, f"r{number}") for number in (1, 2) for kind in ("start", "end")])
    write(trace, ("start", "a", 1, "r3"), ("end", "a", 1, "r3"))
    verdict = check_order(trace, [("a", 1), ("a", 2)])
    assert (verdict.repeated, verdict.out_of_order, verdict.overlapping) == (1, 0, 0)


def test_runs_side_by_side_overlap_and_those_of_other_keys_do_not(trace: Trace) -> None:
    write(trace, ("start", "a", 1, "r1"), ("start", "b", 1, "r2"), ("start", "a", 2, "r3"))
    write(trace, ("end", "a", 1, "r1"), ("end", "b", 1, "r2"), ("end", "a", 2, "r3"))
    verdict = check_order(trace, [("a", 1), ("a", 2), ("b", 1)])
    assert (verdict.overlapping, verdict.out_of_order, verdict.repeated) == (1, 0, 0)


def test_a_message_that_starts_behind_a_later_one_is_out_of_order(trace: Trace) -> None:
    write(trace, *[(kind, "a", number, f"r{number}") for number in (2, 1) for kind in ("start", "end")])
    verdict = check_order(trace, [("a", 1), ("a", 2)])
    assert verdict.out_of_order == 1
    assert verdict.examples["out of order"] == "'a' number 1 started after number 2"


def test_counting_goes_on_where_it_ended_and_waits_for_half_a_line(trace: Trace) -> None:
    # Given a trace that was counted
    write(trace, ("start", "a", 1, "r1"), ("end", "a", 1, "r1"))
    assert (trace.count(), trace.count("start")) == (1, 1)
    # When more is written, the last mark in two halves
    line = json.dumps(["end", "a", 2, "r2", 0.0]) + "\n"
    with trace.path.open("a") as file:
        file.write(line[:9])
        file.flush()
        # Then half a mark does not count, and the whole one does, once
        assert (trace.count(), len(trace.read())) == (1, 2)
        file.write(line[9:])
    write(trace, ("end", "a", 2, "r3"))
    assert (trace.count(), len(trace.read())) == (2, 4)


def test_a_trace_of_hundreds_of_thousands_of_messages_is_checked_in_little_memory(trace: Trace) -> None:
    # Given as many messages as show what each one costs
    messages = 10_000
    with trace.path.open("w") as file:
        for number in range(messages):
            for kind in ("start", "end"):
                file.write(json.dumps([kind, f"k{number % 200}", number, f"r{number}", 0.0]) + "\n")
    # When they are counted and checked
    tracemalloc.start()
    try:
        assert trace.count() == messages
        verdict = check_order(trace, ((f"k{number % 200}", number) for number in range(messages)))
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Then what is kept is a few numbers for each message, and no mark
    assert verdict.is_clean
    assert (verdict.published, verdict.ended) == (messages, messages)
    assert most_bytes / messages < 500
