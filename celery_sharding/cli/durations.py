"""Durations as people write and read them: `90`, `90s`, `5m`, `1h30m`; `3m12s`."""

from __future__ import annotations

import re

from celery_sharding.cli.exits import WrongUsage

_UNITS = (86_400, 3_600, 60, 1)
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?")


def parse_duration(text: str) -> float:
    """Return the seconds that `text` says, 0 or more.

    Raises:
        WrongUsage: It is no duration.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    if not text.strip() or match is None:
        raise WrongUsage(f"{text!r} is no duration; write seconds, or such as 90s, 5m or 1h30m")
    return sum(float(part) * unit for part, unit in zip(match.groups(), _UNITS, strict=True) if part)


def format_duration(seconds: float) -> str:
    """Return the two largest units of a duration, as `3m12s`; below ten seconds with a decimal."""
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}s" if seconds else "0s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3_600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3_600}h{whole % 3_600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3_600:02d}h"
