"""Which segment of the chain may be removed, as far as its layout says; no broker."""

from __future__ import annotations

import time

import pytest

from celery_sharding.layout.cleanup import why_kept
from celery_sharding.layout.model import Layout, OpenSwitch, Segment
from celery_sharding.topology import Names

QUEUES = frozenset(Names("orders").shard(1, index) for index in range(2))
LIVE = Segment("ring", 2, 2)
SWITCH = OpenSwitch("reshard", 2, 2, None, None)


@pytest.mark.parametrize(
    ("drained", "ago_seconds", "switch", "why"),
    [
        (QUEUES, 100, None, None),
        (QUEUES, 1, None, "drained just now"),
        (frozenset(sorted(QUEUES)[:1]), 100, None, "not drained: 1 of 2 queues are done"),
        (QUEUES, 100, SWITCH, "a switch is under way"),
    ],
)
def test_a_segment_stays_until_it_was_drained_for_a_while_and_no_switch_is_open(drained, ago_seconds, switch, why):
    segment = Segment("ring", 1, 2, ended=True, drained=drained, drained_at=time.time() - ago_seconds)
    layout = Layout(segments=(segment, LIVE), generation=2, shards=2, limbo=1, switch=switch)

    found = why_kept(layout, segment, keep_seconds=60)

    assert (found is None) if why is None else str(found).startswith(why)
