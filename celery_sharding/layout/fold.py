"""From the events of a manifest to the layout of its group (`manifest` says what the events are); no broker.

`fold` says the same in every process that has read the same events.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

from celery_sharding.layout.model import Layout, OpenSwitch, Segment
from celery_sharding.layout.protocol import is_known, protocol_of

logger = logging.getLogger(__name__)

# From this step's intent on, what cannot be routed goes to the next limbo.
_LIMBO_STEP = 3


def fold(layout: Layout, offset: int, event: Mapping[str, Any]) -> Layout:
    """Return the layout after `event`, which stands at `offset` of the manifest.

    A layout event whose base is not `layout.offset` changes nothing: its writer lost the race, the event is void. One
    that this version does not know, or cannot read, counts as the last, so that those which build on it count, too.
    Facts may come again and in any order; layout events may come again. An event that counts and asks for a protocol
    that is not known here changes nothing else, whatever it is called.
    """
    if "base" in event and (event["base"] != layout.offset or offset <= layout.offset):
        return layout
    protocol = protocol_of(event)
    if protocol > layout.protocol:
        layout = dataclasses.replace(layout, protocol=protocol)
    if not is_known(protocol):
        return dataclasses.replace(layout, offset=offset) if "base" in event else layout
    fact = _FACTS.get(str(event.get("event")))
    change = _LAYOUT_EVENTS.get(str(event.get("event"))) if "base" in event else None
    try:
        if fact is not None:
            return _fold_fact(layout, event, fact)
        if change is not None:
            layout = change(layout, event)
    except (KeyError, TypeError, ValueError, OverflowError) as exc:  # JSON's 1e999 is infinite
        logger.warning("manifest: the event %r at %d cannot be read (%r)", event.get("event"), offset, exc)
    return dataclasses.replace(layout, offset=offset) if "base" in event else layout


def _fold_fact(
    layout: Layout, event: Mapping[str, Any], change: Callable[[Segment, str, Mapping[str, Any]], Segment]
) -> Layout:
    segment, queue = layout.segment(str(event.get("segment"))), str(event.get("queue"))
    if segment is None or not segment.owns(queue) or queue in segment.drained:
        return layout
    return _replace_segment(layout, segment, change(segment, queue, event))


def _fold_drained(segment: Segment, queue: str, event: Mapping[str, Any]) -> Segment:
    at = event.get("at")
    return dataclasses.replace(
        segment,
        drained=segment.drained | {queue},
        drained_at=max(segment.drained_at, at if isinstance(at, float | int) else 0.0),
        unfinished=frozenset(pair for pair in segment.unfinished if pair[0] != queue),
    )


def _fold_reached(segment: Segment, queue: str, event: Mapping[str, Any]) -> Segment:
    keys = event.get("keys")
    if queue in segment.reached or not isinstance(keys, list):
        return segment  # said again, maybe after some of them were finished
    unfinished = segment.unfinished.union((queue, str(key)) for key in keys)
    return dataclasses.replace(segment, reached=segment.reached | {queue}, unfinished=unfinished)


def _fold_finished(segment: Segment, queue: str, event: Mapping[str, Any]) -> Segment:
    return dataclasses.replace(segment, unfinished=segment.unfinished - {(queue, str(event.get("key")))})


def _fold_created(layout: Layout, event: Mapping[str, Any]) -> Layout:
    # The first time there is nothing yet. Later: the exchanges had gone, and with them all bindings to the ring.
    limbo = int(event["limbo"])
    return dataclasses.replace(layout, limbo=limbo, cut_off=layout.generation > 0)


def _fold_switch(layout: Layout, event: Mapping[str, Any]) -> Layout:
    queue_type = str(event.get("queue_type", "quorum"))
    switch = OpenSwitch(
        kind=str(event["kind"]),
        generation=int(event["generation"]),
        shards=int(event["shards"]),
        limbo=_optional_int(event.get("limbo")),
        next_limbo=_optional_int(event.get("next_limbo")),
        step=int(event.get("step", 0)),
        at=_optional_moment(event.get("at")),
    )
    # A reshard may turn into a recovery of the same generation, with a limbo before it.
    chain = tuple(s for s in layout.segments if (s.kind, s.number) != ("ring", switch.generation))
    if switch.limbo is not None:
        chain += (Segment("limbo", switch.limbo, 1, queue_type),)
    chain += (Segment("ring", switch.generation, switch.shards, queue_type),)
    layout = dataclasses.replace(
        layout,
        segments=chain,
        generation=switch.generation,
        shards=switch.shards,
        switch=switch,
        cut_off=False,
    )
    return _move_limbo(layout)


def _fold_step(layout: Layout, event: Mapping[str, Any]) -> Layout:
    if layout.switch is None or layout.switch.generation != event.get("generation"):
        return layout
    switch = dataclasses.replace(layout.switch, step=int(event["step"]), at=_optional_moment(event.get("at")))
    return _move_limbo(dataclasses.replace(layout, switch=switch))


def _fold_switched(layout: Layout, event: Mapping[str, Any]) -> Layout:
    if layout.switch is None or layout.switch.generation != event.get("generation"):
        return layout
    return dataclasses.replace(layout, switch=None)


def _fold_ended(layout: Layout, event: Mapping[str, Any]) -> Layout:
    segment = layout.segment(str(event.get("segment")))
    if segment is None:
        return layout
    return _replace_segment(layout, segment, dataclasses.replace(segment, ended=True))


def _fold_removed(layout: Layout, event: Mapping[str, Any]) -> Layout:
    kept = tuple(segment for segment in layout.segments if segment.name != event.get("segment"))
    return dataclasses.replace(layout, segments=kept)


def _fold_pause(layout: Layout, event: Mapping[str, Any]) -> Layout:
    return dataclasses.replace(layout, paused=layout.paused | {_optional_int(event.get("shard"))})


def _fold_resume(layout: Layout, event: Mapping[str, Any]) -> Layout:
    shard = _optional_int(event.get("shard"))
    return dataclasses.replace(layout, paused=frozenset() if shard is None else layout.paused - {shard})


_FACTS = {"drained": _fold_drained, "reached": _fold_reached, "finished": _fold_finished}
_LAYOUT_EVENTS = {
    "created": _fold_created,
    "switch": _fold_switch,
    "step": _fold_step,
    "switched": _fold_switched,
    "ended": _fold_ended,
    "removed": _fold_removed,
    "pause": _fold_pause,
    "resume": _fold_resume,
}


def _move_limbo(layout: Layout) -> Layout:
    switch = layout.switch
    if switch is None or switch.next_limbo is None or switch.step < _LIMBO_STEP:
        return layout
    return dataclasses.replace(layout, limbo=switch.next_limbo)


def _replace_segment(layout: Layout, old: Segment, new: Segment) -> Layout:
    return dataclasses.replace(
        layout, segments=tuple(new if segment is old else segment for segment in layout.segments)
    )


def _optional_moment(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)
