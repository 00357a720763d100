"""Moments in the shape that programs are promised."""

from __future__ import annotations

from datetime import UTC, datetime


def format_moment(at: float) -> str:
    """Return a moment, in seconds since the epoch, as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
