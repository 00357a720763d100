"""The layout is the same whatever old records of a manifest are gone, as long as a snapshot stands for them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_sharding.layout.events import Drained, Finished, Operated, Reached
from celery_sharding.layout.fold import fold
from celery_sharding.layout.model import Layout, Segment
from celery_sharding.layout.retention import EVERY_MAX, EVERY_MIN, Reading, snapshot_event
from celery_sharding.rabbitmq.streams import decode
from celery_sharding.topology import Names

NAMES = Names("orders")
Record = dict[str, Any] | None

_small = st.integers(1, 3)
_digest = st.sampled_from(["d1", "d2"])
_queue = st.builds(
    lambda ring, n, i: NAMES.shard(n, i) if ring else NAMES.limbo(n), st.booleans(), _small, st.integers(0, 2)
)
_segment = st.builds(lambda ring, n: f"g{n:03d}" if ring else f"limbo{n:03d}", st.booleans(), _small)
_shard = st.none() | st.integers(0, 2)
_facts = st.one_of(
    st.builds(lambda s, q: Drained(s, q, by="w").as_dict(), _segment, _queue),
    st.builds(
        lambda s, q, d: Reached(s, q, keys=tuple(sorted(d)), by="w").as_dict(), _segment, _queue, st.sets(_digest)
    ),
    st.builds(lambda s, q, d: Finished(s, q, key=d, by="w").as_dict(), _segment, _queue, _digest),
)
_layout_events = st.one_of(
    st.builds(lambda n: {"event": "created", "limbo": n}, _small),
    st.builds(
        lambda kind, n, shards, limbo, step: {
            "event": "switch", "kind": kind, "generation": n, "shards": shards, "step": step,
            "limbo": limbo, "next_limbo": None if limbo is None else limbo + 1, "queue_type": "quorum",
        },
        st.sampled_from(["recover", "reshard"]), _small, _small, st.none() | _small, st.integers(0, 5),
    ),
    st.builds(lambda n, step: {"event": "step", "generation": n, "step": step, "at": 1.5}, _small, st.integers(1, 7)),
    st.builds(lambda n: {"event": "switched", "generation": n}, _small),
    st.builds(lambda name, s: {"event": name, "segment": s}, st.sampled_from(["ended", "removed"]), _segment),
    st.builds(lambda verb, shard: {"event": verb, "shard": shard}, st.sampled_from(["pause", "resume"]), _shard),
    st.just({"event": "unheard"}),
    st.just({"event": "switch", "generation": "damaged"}),
)  # fmt: skip
_others = st.one_of(
    st.none(),
    st.just({"event": "nonce", "nonce": "n"}),
    st.just({"event": "requires", "protocol": 1}),
    st.just({"event": "snapshot", "through": "damaged"}),
    st.builds(lambda: Operated("purge", by="op", result="done").as_dict()),
)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("layout"), _layout_events),
        st.tuples(st.just("void"), _layout_events),
        st.tuples(st.just("fact"), _facts),
        st.tuples(st.just("other"), _others),
        # A snapshot of what was read so many records ago: others wrote, too, before it was stored.
        st.tuples(st.just("snapshot"), st.integers(0, 5)),
        # A new segment is begun: the broker keeps its first offset to itself.
        st.tuples(st.just("segment"), st.none()),
    ),
    max_size=40,
)


def write_history(steps: list[tuple[str, Any]]) -> tuple[list[tuple[int, Record]], list[int]]:
    """Return the records of a manifest that is written so, with their offsets, and how many stand before each segment.

    Layout events build on the last, but for void ones.
    """
    records: list[tuple[int, Record]] = []
    layouts = [Layout()]  # before each record
    segments = [0]
    offset = 0
    for kind, what in steps:
        if kind == "segment":
            if segments[-1] < len(records):
                segments.append(len(records))
                offset += 1
            continue
        layout = layouts[-1]
        record = what
        if kind in ("layout", "void"):
            record = {**what, "base": layout.offset if kind == "layout" else layout.offset - 1}
        elif kind == "snapshot":
            seen = max(0, len(records) - what)
            through = records[seen - 1][0] if seen else -1
            record = snapshot_event(dataclasses.replace(layouts[seen], through=through), by="w")
        record = None if record is None else json.loads(json.dumps(record))
        layouts.append(layout if record is None else fold(layout, offset, record))
        records.append((offset, record))
        offset += 1
    return records, [each for each in segments if each < len(records)]


def read(records: list[tuple[int, Record]], *, since: Layout | None = None) -> Reading:
    reading = Reading(since)
    for offset, record in records:
        reading.note(offset, record)
    return reading


def exact(layout: Layout) -> tuple[Layout, int]:
    return layout, layout.through


@given(_steps, st.data())
def test_what_is_kept_folds_into_the_layout_of_all_there_was(steps: list[tuple[str, Any]], data: st.DataObject) -> None:
    # Given any history, of which any number of segments is gone
    records, segments = write_history(steps)
    gone = data.draw(st.sampled_from(segments or [0]))
    whole, kept = read(records), read(records[gone:])
    # Then the layout is known if, and only if, a snapshot that is kept stands for them, and then it is the same
    snapshots = [r for _, r in records[gone:] if r and r["event"] == "snapshot" and r["through"] != "damaged"]
    is_known = gone == 0 or any(snapshot["through"] >= records[gone][0] - 1 for snapshot in snapshots)
    assert (kept.misses is None) is is_known
    if is_known:
        assert exact(kept.layout) == exact(whole.layout)
    # and a reader who knew it before goes on, if nothing is gone that it has not read, whatever it reads twice
    seen = data.draw(st.integers(0, len(records)))
    later = read(records[gone:], since=read(records[:seen]).layout)
    if gone <= seen:
        assert later.misses is None
    if later.misses is None:
        assert exact(later.layout) == exact(whole.layout)


@given(_steps)
def test_a_snapshot_changes_nothing_for_who_has_read_all(steps: list[tuple[str, Any]]) -> None:
    records, _ = write_history(steps)
    without = [(offset, None if record and record["event"] == "snapshot" else record) for offset, record in records]
    assert exact(read(records).layout) == exact(read(without).layout)


def test_snapshots_are_due_by_what_was_written_since_the_last_and_never_of_a_newer_protocol() -> None:
    reading = Reading()
    for offset in range(EVERY_MAX):
        reading.note(offset, {"event": "nonce", "nonce": "n"})
        assert offset < EVERY_MAX - 1 or reading.is_snapshot_due
        assert offset >= EVERY_MIN - 1 or not reading.is_snapshot_due
    # When one is there, or written, then it is not
    reading.note(EVERY_MAX, snapshot_event(Layout(through=EVERY_MAX - 1), by="w"))
    assert not reading.is_snapshot_due
    for offset in range(EVERY_MAX + 1, 3 * EVERY_MAX):
        reading.note(offset, None)
    assert reading.make_snapshot(by="w")["through"] == 3 * EVERY_MAX - 1
    assert not reading.is_snapshot_due
    # and nobody says what the state of a newer protocol is
    for offset in range(3 * EVERY_MAX, 5 * EVERY_MAX):
        reading.note(offset, {"event": "requires", "protocol": 2})
    assert not reading.is_snapshot_due


@pytest.mark.parametrize("state", [{}, {"offset": 3, "segments": "of another kind"}])
def test_of_a_newer_snapshot_it_is_known_at_least_that_it_is_newer(state: dict[str, Any]) -> None:
    reading = Reading()
    reading.note(7, {"event": "snapshot", "through": 6, "state": state, "protocol": 2})
    assert reading.misses is None
    assert (reading.layout.protocol, reading.layout.through) == (2, 7)


@pytest.mark.parametrize(
    "damage",
    [
        {"through": 7}, {"through": -2}, {"through": True}, {"through": float("inf")}, {"state": None},
        {"state": {"generation": float("inf")}}, {"state": {"limbo": "1"}}, {"state": {"paused": [[]]}},
        {"state": {"segments": [{"kind": "ring"}]}}, {"state": {"segments": ["g001"]}},
        {"state": {"switch": {"kind": "recover", "step": "1"}}},
    ],
)  # fmt: skip
def test_a_hostile_snapshot_stands_for_nothing(damage: dict[str, Any]) -> None:
    # Given a snapshot of which one field is not what this library writes
    event = snapshot_event(Layout(offset=3, generation=1, shards=2, limbo=1, through=6), by="w")
    state = damage.get("state", {})
    event |= {**damage, "state": None if state is None else {**event["state"], **state}}
    # When it stands where older records are missing, then the layout is not known, and nothing raises
    reading = Reading()
    reading.note(7, event)
    assert reading.misses == 7


def test_a_snapshot_that_stands_for_little_puts_off_no_other() -> None:
    reading = Reading()
    for offset in range(EVERY_MAX):
        reading.note(offset, None)
    reading.note(EVERY_MAX, snapshot_event(Layout(through=0), by="w"))
    assert reading.is_snapshot_due


@pytest.mark.parametrize(
    "event",
    [
        {"event": "switch", "kind": "recover", "generation": float("inf"), "shards": 1, "base": 5},
        {"event": "drained", "segment": "g001", "queue": f"shards.orders.g001.{'9' * 5_000}"},
    ],
)
def test_a_hostile_event_changes_no_layout(event: dict[str, Any]) -> None:
    layout = Layout(offset=5, segments=(Segment("ring", 1, 2),), generation=1, shards=2)
    assert fold(layout, 6, event).segments == layout.segments


def test_a_body_that_is_nested_deeply_is_no_event() -> None:
    assert decode(b"[" * 100_000, stream="s", offset=1) is None
