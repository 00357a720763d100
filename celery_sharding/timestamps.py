"""Moments: in seconds since the epoch, and as ISO 8601 in JSON for programs."""

from __future__ import annotations

from datetime import UTC, datetime

_END = datetime(9999, 1, 1, tzinfo=UTC).timestamp()


def format_moment(at: float) -> str:
    """Return a moment, in seconds since the epoch, as ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_moment(value: object) -> float | None:
    """Return a moment that was read from the broker; None if it is no number, or out of range."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _END:
        return None
    return float(value)
