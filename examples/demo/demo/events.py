"""What is replayed: the events of a file in their order, and how often each is sent."""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COPIES_MAX = 3
# How many other events lie between an event and its repetition: what a producer sends again comes late.
_REPEAT_DISTANCE = 20


class BadEvents(ValueError):
    """The file cannot be replayed; the message says why and where."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its key, its id, and its place in the order of first publishes."""

    account: str
    name: str
    position: int


def read_events(path: Path, *, key: str, name: str, limit: int) -> list[Event]:
    """Read the first `limit` events of a CSV or JSON Lines file (by its ending, `.csv` or else).

    Args:
        path: The file.
        key: The column that picks the shard.
        name: The column with the event's id; a row whose id was there before is passed over.
        limit: 0 for all.

    Raises:
        BadEvents: A column is missing or empty, a line cannot be read, or there are no events.
    """
    events: list[Event] = []
    seen: set[str] = set()
    for line, row in _read_rows(path):
        values = []
        for column in (key, name):
            if column not in row:
                raise BadEvents(f"{path}, line {line}: there is no column {column!r}; there are {', '.join(row)}")
            value = row[column]
            if value is None or isinstance(value, bool | float | list | dict) or str(value) == "":
                raise BadEvents(f"{path}, line {line}: {column!r} is {value!r}; it must be a text or a whole number")
            values.append(str(value))
        if values[1] in seen:
            continue
        seen.add(values[1])
        events.append(Event(values[0], values[1], len(events)))
        if len(events) == limit:
            break
    if not events:
        raise BadEvents(f"{path} has no events")
    return events


def plan_sends(events: list[Event]) -> list[tuple[Event, int]]:
    """Return what is sent, in order: each event one to three times, as its id has it; (event, copy from 0)."""
    sends = [
        (event.position + copy * _REPEAT_DISTANCE, event, copy)
        for event in events
        for copy in range(1 + zlib.crc32(event.name.encode()) % COPIES_MAX)
    ]
    return [(event, copy) for _, event, copy in sorted(sends, key=lambda send: (send[0], send[2]))]


def _read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            if path.suffix.lower() == ".csv":
                rows = csv.DictReader(file)
                yield from ((rows.line_num, row) for row in rows)
                return
            for line, text in enumerate(file, 1):
                if not text.strip():
                    continue
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise BadEvents(f"{path}, line {line}: not a JSON object")
                yield line, row
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise BadEvents(f"{path} cannot be read: {error}") from error
