"""The layout that events fold into."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest

from celery_sharding.layout.events import Drained, Finished, Reached
from celery_sharding.layout.fold import fold
from celery_sharding.layout.model import Layout, Segment
from celery_sharding.topology import Names

NAMES = Names("orders")


def written(layout: Layout, *events: dict[str, Any], by_offset: int = 1) -> Layout:
    """Fold layout events as a holder of the lock writes them: each builds on the last, with nonces in between."""
    for event in events:
        layout = fold(layout, layout.offset + 1 + by_offset, {**event, "base": layout.offset})
    return layout


def switch(generation: int, limbo: int, shards: int = 2) -> dict[str, Any]:
    return {
        "event": "switch",
        "kind": "recover",
        "generation": generation,
        "shards": shards,
        "limbo": limbo,
        "next_limbo": limbo + 1,
    }


def switched(generation: int) -> dict[str, Any]:
    return {"event": "switched", "generation": generation}


def step(generation: int, number: int) -> dict[str, Any]:
    return {"event": "step", "generation": generation, "step": number}


def ended(segment: str) -> dict[str, Any]:
    return {"event": "ended", "segment": segment}


CREATED = {"event": "created", "limbo": 1}


def started(shards: int = 2) -> Layout:
    return written(Layout(), CREATED, switch(1, 1, shards), *(step(1, n) for n in range(1, 7)), switched(1))


def names_of(layout: Layout) -> list[str]:
    return [segment.name for segment in layout.segments]


def names_of_open(layout: Layout) -> list[str]:
    return [segment.name for segment in layout.open_segments]


def drain(layout: Layout, segment: str) -> Layout:
    found = layout.segment(segment)
    assert found is not None
    for queue in found.queues(NAMES):
        layout = fold(layout, 10_000, Drained(segment, queue, by="w1").as_dict())
    return layout


def test_an_empty_manifest_has_nothing_to_consume():
    assert Layout().open_segments == ()
    assert Layout().limbo == 0


def test_the_first_start_puts_the_first_limbo_before_the_first_generation():
    layout = started()

    assert names_of(layout) == ["limbo001", "g001"]
    assert (layout.generation, layout.shards, layout.limbo, layout.switch) == (1, 2, 2, None)


def test_a_second_loss_of_the_ring_appends_its_limbo_and_generation():
    layout = written(started(), switch(2, 2), switched(2))

    assert names_of(layout) == ["limbo001", "g001", "limbo002", "g002"]


def test_a_reshard_appends_a_generation_without_a_limbo_and_leaves_the_limbo_alone():
    reshard = {"event": "switch", "kind": "reshard", "generation": 2, "shards": 5, "limbo": None, "next_limbo": None}
    layout = written(started(), reshard, step(2, 3), switched(2))

    assert names_of(layout) == ["limbo001", "g001", "g002"]
    assert (layout.shards, layout.limbo) == (5, 2)


def test_the_limbo_that_takes_messages_changes_with_the_third_step_and_never_back():
    # Given a switch whose third step was recorded
    layout = written(started(), switch(2, 2), step(2, 1), step(2, 2))
    assert layout.limbo == 2
    layout = written(layout, step(2, 3))
    assert layout.limbo == 3
    # When its steps are repeated from the first
    layout = written(layout, step(2, 1))
    # Then the next limbo stays bound
    assert layout.limbo == 3


def test_the_open_switch_tells_its_last_recorded_step():
    layout = written(started(), switch(2, 2), step(2, 4))

    assert layout.switch is not None
    assert layout.switch.step == 4
    assert layout.unended == ()


def test_segments_before_the_last_lack_end_markers_once_the_switch_is_over():
    layout = written(started(), switch(2, 2), switched(2), ended("limbo001"))

    assert [segment.name for segment in layout.unended] == ["g001", "limbo002"]


def test_an_event_on_an_old_base_is_void():
    # Given two writers that build on the same event
    layout = started()
    first = {"event": "pause", "shard": None, "base": layout.offset}
    second = {"event": "pause", "shard": 1, "base": layout.offset}
    # When both are folded in the order of the log
    layout = fold(fold(layout, layout.offset + 1, first), layout.offset + 2, second)
    # Then only the first counts
    assert layout.paused == {None}


def test_an_event_that_is_read_twice_counts_once():
    layout = Layout()
    created = {**CREATED, "base": -1}
    once = fold(layout, 3, created)

    assert fold(once, 3, created) == once


def test_a_segment_is_consumed_until_it_is_ended_and_each_of_its_queues_is_drained():
    # Given a limbo whose marker was reached before "ended" was written
    layout = drain(started(), "limbo001")
    assert layout.open_segments == layout.segments[:1]
    # When it is ended
    layout = written(layout, ended("limbo001"))
    # Then the generation follows, and is never drained, being the last
    assert layout.open_segments == layout.segments[1:2]
    assert [segment.name for segment in drain(layout, "g001").open_segments] == ["g001"]


def test_a_generation_is_left_only_when_all_of_its_shards_are_drained():
    # Given a lost generation of two shards
    layout = written(started(), ended("limbo001"), switch(2, 2), switched(2), ended("g001"), ended("limbo002"))
    layout = drain(layout, "limbo001")
    # When one shard is drained
    half = fold(layout, 500, Drained("g001", NAMES.shard(1, 0), by="w1").as_dict())
    # Then it is still the one to consume; with the other, the next limbo is
    assert [segment.name for segment in half.open_segments] == ["g001"]
    both = fold(half, 501, Drained("g001", NAMES.shard(1, 1), by="w2").as_dict())
    assert [segment.name for segment in both.open_segments] == ["limbo002"]


def test_a_segment_with_unfinished_keys_only_is_passed_and_stays_open_until_it_is_drained():
    # Given a lost generation of two shards
    layout = written(started(), ended("limbo001"), switch(2, 2), switched(2), ended("g001"), ended("limbo002"))
    layout = drain(layout, "limbo001")
    queues = [NAMES.shard(1, 0), NAMES.shard(1, 1)]
    # When one shard is drained, and of the other two keys are left
    layout = fold(layout, 500, Drained("g001", queues[0], by="w1").as_dict())
    reached = Reached("g001", queues[1], keys=("a", "b"), by="w2").as_dict()
    layout = fold(layout, 501, reached)
    # Then the next segment is consumed, too
    assert names_of_open(layout) == ["g001", "limbo002"]
    assert layout.segment("g001").unfinished == {(queues[1], "a"), (queues[1], "b")}
    # When one key is finished, and the first fact comes again, then only the other is left
    layout = fold(layout, 502, Finished("g001", queues[1], key="a", by="w2").as_dict())
    layout = fold(layout, 503, reached)
    assert layout.segment("g001").unfinished == {(queues[1], "b")}
    # And when the shard is drained, nothing is
    layout = fold(layout, 504, Drained("g001", queues[1], by="w3").as_dict())
    layout = fold(layout, 505, reached)
    assert names_of_open(layout) == ["limbo002"]
    assert layout.segment("g001").unfinished == frozenset()


def test_a_segment_that_is_not_ended_yet_is_not_passed():
    layout = fold(started(), 500, Reached("limbo001", NAMES.limbo(1), keys=("a",), by="w1").as_dict())

    assert names_of_open(layout) == ["limbo001"]
    assert names_of_open(written(layout, ended("limbo001"))) == ["limbo001", "g001"]


def test_drained_facts_commute_and_may_be_repeated():
    layout = written(started(3), switch(2, 2), switched(2), ended("g001"))
    facts = [Drained("g001", NAMES.shard(1, index), by="w1").as_dict() for index in range(3)]

    def folded(order: list[int]) -> Layout:
        result = layout
        for index in order:
            result = fold(result, 900, facts[index])
        return result

    assert folded([0, 1, 2]) == folded([2, 0, 0, 1, 2])


def test_a_drained_fact_does_not_move_the_base():
    layout = started()

    assert (
        fold(layout, layout.offset + 50, Drained("limbo001", NAMES.limbo(1), by="w1").as_dict()).offset == layout.offset
    )


@pytest.mark.parametrize("queue", ["shards.orders.g001.007", "shards.orders.g002.000", "shards.orders.limbo001", "x"])
def test_a_drained_fact_about_a_queue_of_another_segment_counts_for_nothing(queue):
    layout = started()

    assert fold(layout, 900, Drained("g001", queue, by="w1").as_dict()) == layout


def test_a_removed_segment_leaves_the_chain():
    layout = written(started(), ended("limbo001"), {"event": "removed", "segment": "limbo001"})

    assert names_of(layout) == ["g001"]


def test_exchanges_declared_anew_cut_the_live_ring_off_until_the_next_switch():
    layout = written(started(), {"event": "created", "limbo": 2})
    assert layout.cut_off

    assert not written(layout, switch(2, 2)).cut_off


def test_pausing_a_shard_or_the_group_is_undone_by_resuming_it():
    one = written(started(), {"event": "pause", "shard": 1})
    assert (one.is_paused(0), one.is_paused(1)) == (False, True)
    both = written(one, {"event": "pause", "shard": None})
    assert both.is_paused(0)

    assert written(one, {"event": "resume", "shard": 1}).paused == frozenset()
    assert written(both, {"event": "resume", "shard": None}).paused == frozenset()


def test_a_layout_event_of_a_newer_version_counts_as_the_base_of_the_next():
    # Given an event that this version does not know
    layout = written(started(), {"event": "blessed", "by": "someone"})
    # When a known event builds on it
    layout = written(layout, {"event": "pause", "shard": None})
    # Then that one counts
    assert layout.is_paused(0)


def test_a_layout_event_that_cannot_be_read_changes_nothing_but_the_base(caplog):
    before = started()
    with caplog.at_level(logging.WARNING):
        layout = written(before, {"event": "switch", "kind": "recover", "generation": "many"})

    assert layout.segments == before.segments
    assert layout.offset > before.offset
    assert "cannot be read" in caplog.text


def test_unknown_fields_are_ignored_and_foreign_events_change_nothing():
    layout = written(Layout(), {**CREATED, "mood": "good", "v": 7})
    assert layout.limbo == 1

    assert fold(layout, 99, {"event": "nonce", "nonce": "x"}) == layout


def test_a_segment_names_its_queues():
    assert Segment("limbo", 3).queues(NAMES) == ("shards.orders.limbo003",)
    assert Segment("ring", 2, 2).queues(NAMES) == ("shards.orders.g002.000", "shards.orders.g002.001")


# --- versions side by side -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        {"event": "requires"},
        {"event": "operated", "verb": "replay"},
        Drained("limbo001", NAMES.limbo(1), by="newer").as_dict(),
        {"event": "unheard"},
        {"event": "pause", "shard": None, "base": started().offset},
    ],
    ids=lambda event: event["event"],
)
def test_an_event_of_a_newer_protocol_says_what_is_needed_and_changes_nothing_else(event: dict[str, Any]) -> None:
    layout = started()
    found = fold(layout, layout.offset + 1, {**event, "protocol": 2})
    offset = layout.offset + 1 if "base" in event else layout.offset
    assert found == dataclasses.replace(layout, protocol=2, offset=offset)
    # and what comes later does not take it back
    assert fold(found, found.offset + 1, {"event": "requires", "protocol": 1}).protocol == 2
    assert written(found, {"event": "pause", "shard": 1}).protocol == 2


@pytest.mark.parametrize("protocol", [None, 1, "2", True, [2]])
def test_an_event_that_asks_for_nothing_new_counts_as_ever(protocol: object) -> None:
    layout = written(started(), {"event": "pause", "shard": 1, "protocol": protocol})
    assert (layout.protocol, layout.paused) == (1, {1})


def test_a_void_event_asks_for_nothing() -> None:
    layout = started()
    void = {"event": "pause", "shard": 1, "base": layout.offset - 1, "protocol": 2}
    assert fold(layout, layout.offset + 1, void) == layout
