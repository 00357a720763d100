"""The bytes of each event that travels: other versions read them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from celery_sharding.journal.events import (
    Counted,
    DeadLettered,
    Handover,
    RetryAsked,
    RunAnnounced,
    RunWithdrawn,
    Settled,
    ShardVitals,
    TaskFailed,
    Vitals,
    parse_attempt_event,
)
from celery_sharding.layout.events import (
    Created,
    Drained,
    Finished,
    Operated,
    Paused,
    Reached,
    Resumed,
    SegmentEnded,
    SegmentRemoved,
    StepBegun,
    SwitchBegun,
    SwitchEnded,
    parse_event,
)
from celery_sharding.layout.model import Layout, OpenSwitch, Segment
from celery_sharding.layout.retention import snapshot_event
from celery_sharding.rabbitmq.streams import decode, encode

QUEUE = "shards.orders.g001.003"
COUNTED = Counted(2.5, {"delivered": 7, "done": 6}, waits=[1.25, 0, 7], runs=[0.5, 6])
SHARD = ShardVitals(
    owner="w@h", at=9.0, counted=Counted(2.5, {"done": 6}), held=2, running=1, index=3, prefetch=200, lag_seconds=0.5
)
WAITING = ShardVitals(
    owner="w@h",
    at=9.0,
    counted=COUNTED,
    index=3,
    held=2,
    running=0,
    behind_seconds=1.0,
    store_waiting=4,
    store_away_since=8.5,
    claim_waiting=1,
)

EVENTS = {
    "vitals": (
        Vitals("w@h", 1, {QUEUE: SHARD}, ["q"], at=9.0),
        (
            '{"v":1,"event":"vitals","at":9.0,"by":"w@h","generation":1,"owned":{"shards.orders.g001.003":{"index":3,'
            '"held":2,"running":1,"lag_seconds":0.5,"prefetch":200,"behind_seconds":null,"since":2.5,'
            '"counters":{"done":6}}},"standby":["q"]}'
        ),
    ),
    "vitals with all there may be": (
        Vitals("w@h", 1, {QUEUE: WAITING}, [], at=9.0),
        (
            '{"v":1,"event":"vitals","at":9.0,"by":"w@h","generation":1,"owned":{"shards.orders.g001.003":{"index":3,'
            '"held":2,"running":0,"lag_seconds":null,"prefetch":null,"behind_seconds":1.0,"store_waiting":4,'
            '"store_away_since":8.5,"claim_waiting":1,"since":2.5,"counters":{"delivered":7,"done":6},'
            '"waits":[1.25,0,7],"runs":[0.5,6]}},"standby":[]}'
        ),
    ),
    "taken": (
        Handover(QUEUE, "w@h", "taken", at=9.0),
        '{"v":1,"event":"handover","at":9.0,"queue":"shards.orders.g001.003","owner":"w@h","change":"taken","to":""}',
    ),
    "released": (
        Handover(QUEUE, "w@h", "released", counted=COUNTED, at=9.0),
        (
            '{"v":1,"event":"handover","at":9.0,"queue":"shards.orders.g001.003","owner":"w@h","change":"released",'
            '"to":"","since":2.5,"counters":{"delivered":7,"done":6},"waits":[1.25,0,7],"runs":[0.5,6]}'
        ),
    ),
    "failure": (
        TaskFailed(QUEUE, "w@h", "t-1", "shop.pay", "KeyError", at=9.0),
        (
            '{"v":1,"event":"failure","at":9.0,"queue":"shards.orders.g001.003","owner":"w@h","task_id":"t-1",'
            '"task":"shop.pay","error":"KeyError"}'
        ),
    ),
    "dead": (
        DeadLettered(QUEUE, "w@h", None, "shop.pay", "lost 5 times", 5, at=9.0),
        (
            '{"v":1,"event":"dead","at":9.0,"queue":"shards.orders.g001.003","owner":"w@h","task_id":null,'
            '"task":"shop.pay","reason":"lost 5 times","attempts":5}'
        ),
    ),
    "attempt": (RunAnnounced("m", 2, at=9.0), '{"v":1,"event":"attempt","at":9.0,"message_id":"m","attempts":2}'),
    "withdrawn": (RunWithdrawn("m", 1, at=9.0), '{"v":1,"event":"withdrawn","at":9.0,"message_id":"m","attempts":1}'),
    "retry": (
        RetryAsked("m", 3, 0, wait_seconds=1.5, at=9.0),
        '{"v":1,"event":"retry","at":9.0,"message_id":"m","retries":3,"attempts":0,"wait_seconds":1.5}',
    ),
    "retry with new arguments": (
        RetryAsked("m", 3, 0, 1.5, (30.0, None), b"\xff", "application/x", "binary", at=9.0),
        (
            '{"v":1,"event":"retry","at":9.0,"message_id":"m","retries":3,"attempts":0,"wait_seconds":1.5,'
            '"time_limits":[30.0,null],"body":"/w==","content_type":"application/x","content_encoding":"binary"}'
        ),
    ),
    "settled": (Settled("m", at=9.0), '{"v":1,"event":"settled","at":9.0,"message_id":"m"}'),
}
# Of a layout event, without what `manifest.write` puts behind it.
MANIFEST_EVENTS = {
    "created": (Created(1), '{"v":1,"event":"created","limbo":1}'),
    "recovery": (
        SwitchBegun("recover", 1, 4, limbo=1, next_limbo=2),
        (
            '{"v":1,"event":"switch","kind":"recover","generation":1,"shards":4,"limbo":1,"next_limbo":2,'
            '"queue_type":"quorum"}'
        ),
    ),
    "adoption": (
        SwitchBegun("recover", 2, 4, 2, 3, "classic", step=5, adopted=True),
        (
            '{"v":1,"event":"switch","kind":"recover","generation":2,"shards":4,"limbo":2,"next_limbo":3,'
            '"queue_type":"classic","step":5,"adopted":true}'
        ),
    ),
    "reshard": (
        SwitchBegun("reshard", 2, 7),
        '{"v":1,"event":"switch","kind":"reshard","generation":2,"shards":7,"queue_type":"quorum"}',
    ),
    "step": (StepBegun(2, 3), '{"v":1,"event":"step","generation":2,"step":3}'),
    "switched": (SwitchEnded(2), '{"v":1,"event":"switched","generation":2}'),
    "ended": (SegmentEnded("g001"), '{"v":1,"event":"ended","segment":"g001"}'),
    "removed": (SegmentRemoved("g001"), '{"v":1,"event":"removed","segment":"g001"}'),
    "pause": (Paused(None), '{"v":1,"event":"pause","shard":null}'),
    "resume": (Resumed(3), '{"v":1,"event":"resume","shard":3}'),
    "drained": (
        Drained("g001", QUEUE, "w@h", 9.0, "idle"),
        (
            '{"v":1,"event":"drained","segment":"g001","queue":"shards.orders.g001.003","by":"w@h","at":9.0,'
            '"reason":"idle"}'
        ),
    ),
    "reached": (
        Reached("g001", QUEUE, ("a", "b"), "w@h", 9.0),
        (
            '{"v":1,"event":"reached","segment":"g001","queue":"shards.orders.g001.003","keys":["a","b"],"by":"w@h",'
            '"at":9.0}'
        ),
    ),
    "finished": (
        Finished("g001", QUEUE, "a", "w@h", 9.0),
        '{"v":1,"event":"finished","segment":"g001","queue":"shards.orders.g001.003","key":"a","by":"w@h","at":9.0}',
    ),
    "operated": (
        Operated("replay", "op@h", "begun", "x", {"count": 1, "ids": ["l"]}, at=9.0),
        (
            '{"v":1,"event":"operated","verb":"replay","by":"op@h","at":9.0,"result":"begun","operation":"x","count":1,'
            '"ids":["l"]}'
        ),
    ),
}


def parse(event: dict[str, Any]) -> object:
    return Vitals.parse(event) or Handover.parse(event) or parse_attempt_event(event)


@pytest.mark.parametrize(
    ("event", "text"), [*EVENTS.values(), *MANIFEST_EVENTS.values()], ids=[*EVENTS, *MANIFEST_EVENTS]
)
def test_an_event_is_written_as_it_always_was(event, text):
    assert encode(event.as_dict()).decode() == text


@pytest.mark.parametrize("event", [event for event, _ in EVENTS.values()], ids=EVENTS)
def test_an_event_that_is_read_says_what_was_written(event):
    found = parse(decode(encode(event.as_dict()), stream="s", offset=0) or {})

    if isinstance(event, TaskFailed | DeadLettered):
        assert found is None  # they are shown as they are
    else:
        assert found is not None
        assert json.loads(encode(found.as_dict())) == json.loads(encode(event.as_dict()))


def test_a_snapshot_of_a_layout_is_written_as_it_always_was():
    segments = (
        Segment("ring", 1, 2, ended=True, drained=frozenset({"b", "a"}), drained_at=8.0),
        Segment("limbo", 2, reached=frozenset({"l"}), unfinished=frozenset({("l", "k")})),
    )
    switch = OpenSwitch("recover", 2, 4, 2, 3, step=1, at=7.5)
    layout = Layout(9, segments, 2, 4, 2, switch, cut_off=True, paused=frozenset({3, None}), through=11)
    text = encode(snapshot_event(layout, by="w@h") | {"at": 9.0}).decode()

    assert text == (
        '{"v":1,"event":"snapshot","through":11,"state":{"offset":9,"segments":[{"kind":"ring","number":1,"shards":2,'
        '"queue_type":"quorum","ended":true,"drained":["a","b"],"drained_at":8.0,"reached":[],"unfinished":[]},'
        '{"kind":"limbo","number":2,"shards":1,"queue_type":"quorum","ended":false,"drained":[],"drained_at":0.0,'
        '"reached":["l"],"unfinished":[["l","k"]]}],"generation":2,"shards":4,"limbo":2,"switch":{"kind":"recover",'
        '"generation":2,"shards":4,"limbo":2,"next_limbo":3,"step":1,"at":7.5},"cut_off":true,"paused":[null,3]},'
        '"by":"w@h","at":9.0}'
    )


@pytest.mark.parametrize("event", [event for event, _ in MANIFEST_EVENTS.values()], ids=MANIFEST_EVENTS)
def test_an_event_of_a_manifest_that_is_read_says_what_was_written(event):
    found = parse_event(decode(encode(event.as_dict()), stream="s", offset=0) or {})

    if isinstance(event, Operated):
        assert isinstance(found, Operated)  # its facts are for people who read the stream
        assert (found.verb, found.by, found.result, found.operation) == ("replay", "op@h", "begun", "x")
    else:
        assert found == event
