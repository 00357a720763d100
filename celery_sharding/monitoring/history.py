"""The history of a group: its manifest as an audit log, one entry for what was done, in words.

    created, switch, ended, removed, pause, resume, operated     an entry each, where the event stands
    step, switched          the outcome of their switch's entry
    operated once more      the outcome of the operation's entry; without it, nobody knows how that ended
    drained                 one entry for a segment, when the last of its queues has reported
    reached, finished       none: they are between the end of a segment and `drained`
    void events             an entry with the result "void": somebody tried, and was too late to build on what had
                            happened meanwhile; nothing was changed
    unknown events          an entry under their own name: a newer version wrote them

`describe_history` is pure; `read_history` reads the manifest, and changes nothing but for the nonce that marks its end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from celery_sharding.errors import LogError
from celery_sharding.layout.fold import fold
from celery_sharding.layout.manifest import read
from celery_sharding.layout.model import Layout
from celery_sharding.layout.switch import RESHARD, STEPS
from celery_sharding.monitoring.lines import printable
from celery_sharding.rabbitmq.channels import Opener
from celery_sharding.rabbitmq.streams import Event
from celery_sharding.timestamps import format_moment, read_moment
from celery_sharding.topology import Names

DONE, VOID = "done", "void: the group had changed meanwhile"
_PARTS_OF_OTHERS = ("step", "switched", "drained", "reached", "finished")


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that was done to a group.

    Attributes:
        offset: Of its event in the manifest; rises from entry to entry.
        at: Seconds since the epoch, by the clock of who did it; None if the event does not say.
        by: Who did it.
        event: What kind of event it is, as "switch".
        what: What was done, in words.
        result: How it ended, in words.
    """

    offset: int
    at: float | None
    by: str
    event: str
    what: str
    result: str = DONE


def read_history(connection: Opener, group: str, limit: int | None = None) -> list[Entry]:
    """Return what was done to a group, the oldest first, as far back as the manifest reaches; empty: never declared.

    Args:
        connection: Connected, and not read by an event loop.
        limit: At most so many, the latest; None for all.

    Raises:
        LogError: The manifest could not be read.
    """
    try:
        reading, events = read(connection, Names(group))
    except LogError as exc:
        if not exc.facts.get("missing"):
            raise
        return []
    found = describe_history(group, events, since=reading.start)
    return found if limit is None else found[max(0, len(found) - limit) :]


def describe_history(group: str, events: Iterable[tuple[int, Event]], *, since: Layout | None = None) -> list[Entry]:
    """Return the entries that the events of a manifest make, from its first one on, or from those behind `since`."""
    layout = since or Layout()
    found: list[Entry] = []
    open_switch: int | None = None  # its place in `found`
    operations: dict[str, int] = {}  # theirs
    for offset, event in events:
        before, layout = layout, fold(layout, offset, event)
        name = str(event.get("event"))
        counts = layout.offset == offset
        if counts and name in ("step", "switched") and open_switch is not None:
            result = _describe_outcome(event, before, found[open_switch])
            found[open_switch] = dataclasses.replace(found[open_switch], result=result)
        elif name == "operated" and str(event.get("operation")) in operations:
            place = operations[str(event["operation"])]
            found[place] = dataclasses.replace(found[place], result=_line(event.get("result", "")))
        elif name not in _PARTS_OF_OTHERS or ("base" in event and not counts):
            entry = _describe(group, offset, event, before)
            if "base" in event and not counts:
                entry = dataclasses.replace(entry, result=VOID)
            elif name == "switch":
                if open_switch is not None and before.switch is not None:
                    found[open_switch] = dataclasses.replace(found[open_switch], result="went on as a recovery")
                open_switch = len(found)
            elif name == "operated" and "operation" in event:
                operations[str(event["operation"])] = len(found)
            found.append(entry)
        for segment in layout.segments:
            was = before.segment(segment.name)
            if segment.is_drained and was is not None and not was.is_drained:
                what = f"{segment.name} drained: nothing of it is left to run"
                found.append(_entry(offset, event, "drained", what))
    return found


def to_json(group: str, entries: Iterable[Entry]) -> dict[str, Any]:
    """Return a group's history in the shape that programs are promised; moments are ISO 8601 in UTC."""
    shown = [dataclasses.asdict(entry) for entry in entries]
    for entry in shown:
        entry["at"] = None if entry["at"] is None else format_moment(entry["at"])
    return {"name": group, "entries": shown}


def _describe(group: str, offset: int, event: Event, before: Layout) -> Entry:
    name = str(event.get("event"))
    describe = _WORDS.get(name)
    what = f"{name} (this version does not know it)" if describe is None else describe(group, event, before)
    result = DONE
    if name == "operated":
        result = str(event.get("result", ""))
    elif name == "switch":
        result = _under_way(event)
    return _entry(offset, event, name, what, result)


def _entry(offset: int, event: Event, name: str, what: str, result: str = DONE) -> Entry:
    return Entry(offset, read_moment(event.get("at")), _line(event.get("by", "?")), name, _line(what), _line(result))


def _describe_created(group: str, event: Event, before: Layout) -> str:
    again = " again" if before.limbo else ""
    return f"exchanges and logs declared{again}; what cannot be routed goes to limbo{_number(event.get('limbo'))}"


def _describe_switch(group: str, event: Event, before: Layout) -> str:
    shards, generation = event.get("shards"), event.get("generation")
    if event.get("kind") == RESHARD:
        return f"from {before.shards} to {shards} shards, generation {generation}"
    if event.get("adopted"):
        return f"generation {generation} of {shards} shards found on the broker and taken over"
    if not before.generation:
        return f"first generation, {shards} shards"
    return f"ring lost; generation {generation} of {shards} shards in its place"


def _describe_pause(group: str, event: Event, before: Layout) -> str:
    return f"{_place(group, event)} paused"


def _describe_resume(group: str, event: Event, before: Layout) -> str:
    return f"{_place(group, event)} resumed"


def _describe_ended(group: str, event: Event, before: Layout) -> str:
    return f"{event.get('segment')} ended: its queues got their end markers"


def _describe_removed(group: str, event: Event, before: Layout) -> str:
    return f"{event.get('segment')} removed: its queues are deleted"


def _describe_operated(group: str, event: Event, before: Layout) -> str:
    return str(event.get("verb"))


def _describe_requires(group: str, event: Event, before: Layout) -> str:
    return f"only who knows protocol {event.get('protocol')} acts on it from now on"


_WORDS = {
    "created": _describe_created,
    "switch": _describe_switch,
    "step": lambda group, event, before: f"step {event.get('step')} to generation {event.get('generation')}",
    "switched": lambda group, event, before: f"the switch to generation {event.get('generation')} ended",
    "ended": _describe_ended,
    "removed": _describe_removed,
    "pause": _describe_pause,
    "resume": _describe_resume,
    "operated": _describe_operated,
    "requires": _describe_requires,
}


def _describe_outcome(event: Event, before: Layout, entry: Entry) -> str:
    """Return how far the switch of `entry` is after a `step` or `switched` event."""
    by = str(event.get("by", "?"))
    who = "" if by == entry.by else f", carried on by {by}"
    if event.get("event") == "switched":
        return f"{DONE}{who}"
    kind = before.switch.kind if before.switch is not None else ""
    return f"{_under_way({'kind': kind, 'step': event.get('step')})}{who}"


def _under_way(event: Mapping[str, Any]) -> str:
    steps = STEPS.get(str(event.get("kind")), ())
    of = f" of {len(steps)}" if steps else ""
    return f"under way, at step {event.get('step') or 0}{of}"


def _place(group: str, event: Event) -> str:
    shard = event.get("shard")
    return group if shard is None else f"{group}/{shard}"


def _number(value: Any) -> str:
    return f"{value:03d}" if isinstance(value, int) else str(value)


def _line(text: object) -> str:
    return " ".join(printable(text).split())
