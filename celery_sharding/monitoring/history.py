"""The history of a group: its manifest as an audit log, in words.

    created, switch, ended, removed, pause, resume, operated     an entry each, where the event stands
    step, switched          the outcome of their switch's entry
    operated once more      the outcome of the operation's entry; without it, nobody knows how that ended
    drained                 one entry for a segment, when the last of its queues is drained
    reached, finished       none: they are between the end of a segment and `drained`
    void events             an entry with the result "void": the group had changed before it was written, so it had no
                            effect
    unknown events          an entry under their own name: a newer version wrote them

`describe_history` is pure; `read_history` reads the manifest, which appends nothing but the nonce that marks its end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from celery_sharding.errors import LogError
from celery_sharding.layout import events
from celery_sharding.layout.fold import fold
from celery_sharding.layout.manifest import read
from celery_sharding.layout.model import Layout
from celery_sharding.layout.switch import STEPS
from celery_sharding.rabbitmq.channels import Opener
from celery_sharding.rabbitmq.events import DAMAGED, StreamEvent
from celery_sharding.rabbitmq.streams import Event
from celery_sharding.texts import printable
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
    """Return what was done to a group, oldest first, as far back as the manifest reaches; empty: never declared.

    Args:
        connection: Connected, and not read by an event loop.
        limit: Only the latest so many; None: all.

    Raises:
        LogError: The manifest could not be read.
    """
    try:
        reading, records = read(connection, Names(group))
    except LogError as exc:
        if not exc.facts.get("missing"):
            raise
        return []
    found = describe_history(group, records, since=reading.start)
    return found if limit is None else found[max(0, len(found) - limit) :]


def describe_history(group: str, records: Iterable[tuple[int, Event]], *, since: Layout | None = None) -> list[Entry]:
    """Return the entries for the events of a manifest, from its first one on, or for those after `since`."""
    layout = since or Layout()
    found: list[Entry] = []
    open_switch: int | None = None  # its place in `found`
    operations: dict[str, int] = {}  # theirs
    for offset, event in records:
        before, layout = layout, fold(layout, offset, event)
        said = _parse(event)
        counts = layout.offset == offset
        is_void = "base" in event and not counts
        if counts and isinstance(said, events.StepBegun | events.SwitchEnded) and open_switch is not None:
            result = _describe_outcome(said, str(event.get("by", "?")), before, found[open_switch])
            found[open_switch] = dataclasses.replace(found[open_switch], result=result)
        elif isinstance(said, events.Operated) and said.operation in operations:
            place = operations[str(said.operation)]
            found[place] = dataclasses.replace(found[place], result=_line(said.result))
        elif is_void or event.get("event") not in _PARTS_OF_OTHERS:
            if isinstance(said, events.SwitchBegun) and not is_void:
                if open_switch is not None and before.switch is not None:
                    found[open_switch] = dataclasses.replace(found[open_switch], result="went on as a recovery")
                open_switch = len(found)
            elif isinstance(said, events.Operated) and said.operation is not None:
                operations[said.operation] = len(found)
            what = _describe(group, event, said, before)
            found.append(_entry(offset, event, what, VOID if is_void else _describe_result(said)))
        for segment in layout.segments:
            was = before.segment(segment.name)
            if segment.is_drained and was is not None and not was.is_drained:
                what = f"{segment.name} drained: nothing of it is left to run"
                found.append(_entry(offset, event, what))
    return found


def to_json(group: str, entries: Iterable[Entry]) -> dict[str, Any]:
    """Return a group's history as JSON for programs; moments are ISO 8601 in UTC."""
    shown = [dataclasses.asdict(entry) for entry in entries]
    for entry in shown:
        entry["at"] = None if entry["at"] is None else format_moment(entry["at"])
    return {"name": group, "entries": shown}


def _parse(event: Event) -> StreamEvent | None:
    try:
        return events.parse_event(event)
    except DAMAGED:
        return None


def _entry(offset: int, event: Event, what: str, result: str = DONE) -> Entry:
    by, name = _line(event.get("by", "?")), str(event.get("event"))
    return Entry(offset, read_moment(event.get("at")), by, name, _line(what), _line(result))


def _describe(group: str, event: Event, said: StreamEvent | None, before: Layout) -> str:
    match said:
        case events.Created(limbo):
            again = " again" if before.limbo else ""
            return f"exchanges and logs declared{again}; what cannot be routed goes to limbo{limbo:03d}"
        case events.SwitchBegun():
            return _describe_switch(said, before)
        case events.StepBegun(generation, step):
            return f"step {step} to generation {generation}"
        case events.SwitchEnded(generation):
            return f"the switch to generation {generation} ended"
        case events.SegmentEnded(segment):
            return f"{segment} ended: its queues got their end markers"
        case events.SegmentRemoved(segment):
            return f"{segment} removed: its queues are deleted"
        case events.Paused(shard):
            return f"{group if shard is None else f'{group}/{shard}'} paused"
        case events.Resumed(shard):
            return f"{group if shard is None else f'{group}/{shard}'} resumed"
        case events.Operated(verb):
            return verb
        case events.Required(protocol):
            return f"from now on only a version that knows protocol {protocol} acts on it"
    return f"{event.get('event')} (this version does not know it)"


def _describe_switch(switch: events.SwitchBegun, before: Layout) -> str:
    shards, generation = switch.shards, switch.generation
    if switch.kind == events.RESHARD:
        return f"from {before.shards} to {shards} shards, generation {generation}"
    if switch.adopted:
        return f"generation {generation} of {shards} shards found on the broker and taken over"
    if not before.generation:
        return f"first generation, {shards} shards"
    return f"ring lost; generation {generation} of {shards} shards in its place"


def _describe_result(said: StreamEvent | None) -> str:
    match said:
        case events.Operated():
            return said.result
        case events.SwitchBegun():
            return _under_way(said.kind, said.step)
    return DONE


def _describe_outcome(event: events.StepBegun | events.SwitchEnded, by: str, before: Layout, entry: Entry) -> str:
    """Return how far the switch of `entry` is after an event of it that `by` wrote."""
    who = "" if by == entry.by else f", carried on by {by}"
    if isinstance(event, events.SwitchEnded):
        return f"{DONE}{who}"
    return f"{_under_way('' if before.switch is None else before.switch.kind, event.step)}{who}"


def _under_way(kind: str, step: int) -> str:
    steps = STEPS.get(kind, ())
    return f"under way, at step {step}{f' of {len(steps)}' if steps else ''}"


def _line(text: object) -> str:
    return " ".join(printable(text).split())
