"""What verbs print: JSON in one line, or lines of text; tables, moments and durations as people read and write them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import click

from celery_sharding.cli.exits import WrongUsage
from celery_sharding.texts import printable

_UNITS = (86_400, 3_600, 60, 1)
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def emit(ctx: click.Context, found: Mapping[str, Any] | Iterable[str]) -> None:
    """Print what was found on stdout: a mapping as JSON in one line, else the lines as they are."""
    for line in [json.dumps(found)] if isinstance(found, Mapping) else found:
        ctx.obj.echo(line)


def align(headings: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: set[int]) -> list[str]:
    """Return the lines of a table; the columns in `numeric` are aligned to the right."""
    lines = [headings, *([printable(text) for text in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return [
        "  ".join(
            text.rjust(width) if column in numeric else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def shorten(text: str, width: int) -> str:
    """Return `text` in at most `width` characters, without its middle: names differ at their ends."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def format_time(at: float | None) -> str:
    """Return a moment, in seconds since the epoch, as local date and time; "-" if it is not known."""
    return "-" if at is None else datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")


def parse_duration(text: str) -> float:
    """Return the seconds in a text such as `90`, `90s`, `5m` or `1h30m`.

    Raises:
        WrongUsage: It is not a duration.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    if not text.strip() or match is None:
        raise WrongUsage(f"{text!r} is not a duration; write seconds, or such as 90s, 5m or 1h30m")
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
