"""From the events of a manifest to the layout of its group; no broker.

`fold` says the same in every process that has read the same events.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from celery_sharding.layout import events
from celery_sharding.layout.model import Layout, OpenSwitch, Segment
from celery_sharding.layout.protocol import is_known, protocol_of
from celery_sharding.rabbitmq.events import DAMAGED, StreamEvent

logger = logging.getLogger(__name__)

# From this step's intent on, what cannot be routed goes to the next limbo.
_LIMBO_STEP = 3


def fold(layout: Layout, offset: int, event: Mapping[str, Any]) -> Layout:
    """Return the layout after `event`, which stands at `offset` of the manifest.

    A layout event whose base is not `layout.offset` is void: its writer lost the race. One that this version does not
    know, or cannot read, changes nothing but the offset, so that events which build on it count. Facts may be repeated
    and come in any order; layout events may be repeated. An event that asks for an unknown protocol changes nothing
    else, whatever its name.
    """
    has_base, is_fact = "base" in event, event.get("event") in events.FACTS
    if has_base and (event["base"] != layout.offset or offset <= layout.offset):
        return layout
    protocol = protocol_of(event)
    if protocol > layout.protocol:
        layout = dataclasses.replace(layout, protocol=protocol)
    if is_known(protocol) and (has_base or is_fact):
        try:
            said = events.parse_event(event)
            if isinstance(said, events.Fact):
                return _fold_fact(layout, said)
            layout = _fold_change(layout, said)
        except DAMAGED as exc:
            logger.warning("manifest: the event %r at %d cannot be read (%r)", event.get("event"), offset, exc)
    return dataclasses.replace(layout, offset=offset) if has_base else layout


def _fold_fact(layout: Layout, fact: events.Fact) -> Layout:
    segment, queue = layout.segment(fact.segment), fact.queue
    if segment is None or not segment.owns(queue) or queue in segment.drained:
        return layout
    match fact:
        case events.Drained():
            changed = dataclasses.replace(
                segment,
                drained=segment.drained | {queue},
                drained_at=max(segment.drained_at, fact.at),
                unfinished=frozenset(pair for pair in segment.unfinished if pair[0] != queue),
            )
        case events.Reached():
            if queue in segment.reached:
                return layout  # said again, maybe after some of them were finished
            unfinished = segment.unfinished.union((queue, key) for key in fact.keys)
            changed = dataclasses.replace(segment, reached=segment.reached | {queue}, unfinished=unfinished)
        case events.Finished():
            changed = dataclasses.replace(segment, unfinished=segment.unfinished - {(queue, fact.key)})
    return _replace_segment(layout, segment, changed)


def _fold_change(layout: Layout, event: StreamEvent | None) -> Layout:
    switch = layout.switch
    match event:
        case events.Created(limbo):
            # The first time there is nothing yet. Later: the exchanges had gone, and all bindings to the ring.
            return dataclasses.replace(layout, limbo=limbo, cut_off=layout.generation > 0)
        case events.SwitchBegun():
            return _fold_switch(layout, event)
        case events.StepBegun(generation, step, at) if switch is not None and switch.generation == generation:
            return _move_limbo(dataclasses.replace(layout, switch=dataclasses.replace(switch, step=step, at=at)))
        case events.SwitchEnded(generation) if switch is not None and switch.generation == generation:
            return dataclasses.replace(layout, switch=None)
        case events.SegmentEnded(name) if (segment := layout.segment(name)) is not None:
            return _replace_segment(layout, segment, dataclasses.replace(segment, ended=True))
        case events.SegmentRemoved(name):
            kept = tuple(segment for segment in layout.segments if segment.name != name)
            return dataclasses.replace(layout, segments=kept)
        case events.Paused(shard):
            return dataclasses.replace(layout, paused=layout.paused | {shard})
        case events.Resumed(shard):
            return dataclasses.replace(layout, paused=frozenset() if shard is None else layout.paused - {shard})
    return layout


def _fold_switch(layout: Layout, event: events.SwitchBegun) -> Layout:
    switch = OpenSwitch(
        event.kind, event.generation, event.shards, event.limbo, event.next_limbo, step=event.step, at=event.at
    )
    # A reshard may turn into a recovery of the same generation, with a limbo before it.
    chain = tuple(s for s in layout.segments if (s.kind, s.number) != ("ring", event.generation))
    if event.limbo is not None:
        chain += (Segment("limbo", event.limbo, 1, event.queue_type),)
    chain += (Segment("ring", event.generation, event.shards, event.queue_type),)
    layout = dataclasses.replace(
        layout, segments=chain, generation=event.generation, shards=event.shards, switch=switch, cut_off=False
    )
    return _move_limbo(layout)


def _move_limbo(layout: Layout) -> Layout:
    switch = layout.switch
    if switch is None or switch.next_limbo is None or switch.step < _LIMBO_STEP:
        return layout
    return dataclasses.replace(layout, limbo=switch.next_limbo)


def _replace_segment(layout: Layout, old: Segment, new: Segment) -> Layout:
    return dataclasses.replace(
        layout, segments=tuple(new if segment is old else segment for segment in layout.segments)
    )
