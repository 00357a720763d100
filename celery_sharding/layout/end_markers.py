"""Ending a segment: a marker behind its last message in each queue.

    live -> ended      the stream has left it, and each of its queues holds an end marker
    ended -> drained   the owner of each queue has reached the marker with nothing running, and said so

Markers are put under the group's lock. Anybody may say that a queue is drained, again, and in any order.
"""

from __future__ import annotations

import amqp

from celery_sharding.errors import LogError
from celery_sharding.layout.events import Drained, SegmentEnded
from celery_sharding.layout.manifest import write
from celery_sharding.layout.model import Layout, Segment
from celery_sharding.rabbitmq.channels import Opener, brief_channel
from celery_sharding.rabbitmq.streams import append, publish_confirmed
from celery_sharding.topology import Names
from celery_sharding.wire import END, control_headers

_CONFIRM_SECONDS = 30.0


def end_segment(connection: Opener, names: Names, layout: Layout, segment: Segment, *, by: str) -> Layout:
    """Put an end marker into each queue of `segment`, which the stream has left, and record that. Under the lock."""
    with brief_channel(connection) as channel:
        for queue in segment.queues(names):
            try:
                publish_confirmed(channel, end_marker(segment), queue, timeout_seconds=_CONFIRM_SECONDS)
            except LogError as exc:
                if not exc.facts.get("missing"):
                    raise
                # Nobody can reach a marker in a queue that someone deleted.
                append(channel, names.manifest, Drained(segment.name, queue, by, reason="queue deleted").as_dict())
    return write(connection, names, layout, SegmentEnded(segment.name), by=by)


def end_marker(segment: Segment) -> amqp.Message:
    """Return the message that stands behind everything of `segment`."""
    return amqp.Message(b"", delivery_mode=2, application_headers=control_headers(END, segment=segment.name))
