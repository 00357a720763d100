"""What py-amqp knows of the heartbeats of a connection, read and put right without connecting anew.

kombu's `Connection.connection` connects when it is asked for a connection that is lost, in the middle of whatever asks;
so what it keeps is read instead. py-amqp counts frames in `bytes_sent` and `bytes_recv`, and compares them at each tick
with what they were at the last one.
"""

from __future__ import annotations

import time
from typing import Any

_SILENT_HEARTBEATS = 1.5


def open_amqp_connection(connection: Any) -> Any:
    """Return the py-amqp connection in a kombu one; None if there is none, it is lost, or it has no heartbeats."""
    inner: Any = getattr(connection, "_connection", None)
    has_heartbeats = getattr(inner, "heartbeat", None) and hasattr(inner, "send_heartbeat")
    return inner if has_heartbeats and inner.connected else None


def is_silent(connection: Any) -> bool:
    """Say whether the broker was not heard on a kombu connection for one and a half heartbeats.

    The broker sends twice a heartbeat, and the main thread looks now and then whether something was read.
    """
    inner: Any = getattr(connection, "_connection", None)
    heartbeat_seconds = getattr(inner, "heartbeat", None)
    if not heartbeat_seconds or not inner.last_heartbeat_received:
        return False
    return bool(time.monotonic() - inner.last_heartbeat_received >= _SILENT_HEARTBEATS * heartbeat_seconds)


def note_heard(inner: Any) -> None:
    """Tell py-amqp that the broker was heard just now, though nothing of it was read."""
    inner.last_heartbeat_received = time.monotonic()


def note_read(inner: Any) -> None:
    """Tell py-amqp of what was read since its last tick; else the next would take that for life at its own time."""
    if inner.prev_recv != inner.bytes_recv:
        inner.prev_recv = inner.bytes_recv
        note_heard(inner)
