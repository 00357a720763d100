"""The steps of a switch: how the stream of a group is moved from one segment of the chain to the next.

While a ring is missing, messages run into limbo *k*, in order. Recovery makes a new generation *g*, and moves the
stream into it by one unbind:

    1  declare the ring and queues of g; let go of the old ring, if it is still there
    2  bind  shards.<group> -> limbo k          the same queue, reached directly
    3  bind  unrouted -> limbo k+1, unbind unrouted -> limbo k
    4  bind  next -> g
    5  unbind shards.<group> -> limbo k         the flip: what shards.<group> cannot route goes to next
    6  bind  shards.<group> -> g
    7  unbind next -> g

so the chain goes on with limbo k, then g.

Resharding moves the stream from the live generation to a new one *g* of another number of shards, in the same way:

    1  declare the ring and queues of g
    2  bind  next -> g
    3  unbind shards.<group> -> the live ring   the flip
    4  bind  shards.<group> -> g
    5  unbind next -> g

so g follows the live generation. If the live ring is lost before step 2, messages are in limbo k, and g must take none
before them: the ring of g is deleted, too, and the switch counts as flipped. Then g stays empty, and a recovery puts
limbo k behind it. If the loss is only seen after step 2, g already takes messages, which came after those in limbo k:
the reshard goes on as a recovery that has flipped, whose chain is limbo k, then g.

The broker tries shards.<group>, next and unrouted one after the other. So a message that was unroutable at the first
before step 2 or 6 may reach the last only now. If the bindings there had changed meanwhile, it would overtake others,
or be doubled; hence the pauses before `unrouted` moves and before `next` lets go of g.

Each step is recorded in the manifest before it is done, and may be repeated. So anybody can carry on: from step 1 while
the flip is not recorded and g is empty (what was lost in between is declared anew), else from the flip (messages may be
in g, so its ring must never be declared again; if it is gone, they are in the limbo, and a recovery follows).

Everything here is done under the group's lock, on the lock's connection.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from amqp import exceptions as amqp_errors

from celery_sharding import topology
from celery_sharding.config import ShardGroup
from celery_sharding.errors import TopologyError
from celery_sharding.layout.cleanup import delete_ring
from celery_sharding.layout.events import RECOVER, RESHARD, StepBegun, SwitchBegun, SwitchEnded
from celery_sharding.layout.lock import in_switch
from celery_sharding.layout.manifest import write
from celery_sharding.layout.model import Layout, OpenSwitch, Segment
from celery_sharding.rabbitmq.channels import Opener, brief_channel
from celery_sharding.rabbitmq.queues import count_ready
from celery_sharding.rabbitmq.refusals import explained
from celery_sharding.topology import Names

# A message that the broker is routing while a binding changes has reached its queue within this time.
GRACE_SECONDS = 0.2


def begin_recovery(connection: Opener, group: ShardGroup, layout: Layout, *, by: str) -> Layout:
    """Record the intent to make a new generation after the current limbo; `carry_on` does it. Under the lock."""
    shards = layout.shards or group.shards
    event = SwitchBegun(RECOVER, layout.generation + 1, shards, layout.limbo, layout.limbo + 1, group.queue_type)
    return write(connection, Names(group.name), layout, event, by=by)


def begin_reshard(connection: Opener, group: ShardGroup, layout: Layout, *, shards: int, by: str) -> Layout:
    """Record the intent to go on with `shards` shards; `carry_on` does it. Under the lock, on a group that is whole.

    Raises:
        ConfigurationError: There can't be so many shards.
        TopologyError: The group has that many, a switch is under way, or single shards are paused.
    """
    group = dataclasses.replace(group, shards=shards)
    if layout.switch is not None or layout.generation == 0 or layout.cut_off:
        raise in_switch(group.name)
    if shards == layout.shards:
        raise TopologyError(f"group {group.name!r} has {shards} shards already", group=group.name)
    if paused := sorted(index for index in layout.paused if index is not None):
        # What is paused does not drain, so every key of the group would wait for it.
        raise TopologyError(
            f"the shards {', '.join(map(str, paused))} of group {group.name!r} are paused; resume them first",
            group=group.name,
        )
    event = SwitchBegun(RESHARD, layout.generation + 1, shards, queue_type=group.queue_type)
    return write(connection, Names(group.name), layout, event, by=by)


def carry_on(connection: Opener, group: ShardGroup, layout: Layout, *, by: str, last_step: int | None = None) -> Layout:
    """Do the open switch of `layout` from where it stands to its end, or up to and with `last_step`. Under the lock."""
    names = Names(group.name)
    switch = layout.switch
    if switch is None:
        return layout
    if switch.kind not in STEPS:
        raise TopologyError(
            f"group {group.name!r} is in a switch of the kind {switch.kind!r}, which this version does not know; "
            "start a worker of the version that began it",
            group=group.name,
        )
    first = _choose_first(connection, names, layout, switch)
    for number, step in enumerate(STEPS[switch.kind], start=1):
        if number < first:
            continue
        layout = write(connection, names, layout, StepBegun(switch.generation, number), by=by)
        if step in _AFTER_PAUSE:
            time.sleep(GRACE_SECONDS)
        with brief_channel(connection) as channel:
            step(Steps(channel, group, layout, switch))
        if switch.kind == RESHARD and number == _LEAD_STEP and not _is_fed(connection, names, layout, switch):
            time.sleep(GRACE_SECONDS)
            if count_ready(connection, names.limbo(layout.limbo)):
                layout = _put_limbo_first(connection, group, layout, switch, by=by)
                return carry_on(connection, group, layout, by=by, last_step=last_step)
        if number == last_step:
            return layout
    return write(connection, names, layout, SwitchEnded(switch.generation), by=by)


def _choose_first(connection: Opener, names: Names, layout: Layout, switch: OpenSwitch) -> int:
    """Return the step from which to carry on; a ring that must not take anything is deleted."""
    flip = FLIPS[switch.kind]
    if switch.step >= flip:
        return flip
    if switch.kind == RESHARD and not _is_fed(connection, names, layout, switch):
        is_led = switch.step >= _LEAD_STEP and not layout.cut_off
        if is_led and topology.ring_exists(connection, names, switch.generation):
            return _LEAD_STEP
        # What is published waits in limbo; it must not be overtaken by what the new ring would take.
        delete_ring(connection, names, switch.generation)
        return flip
    return flip if _holds_messages(connection, names, switch) else 1


def _is_fed(connection: Opener, names: Names, layout: Layout, switch: OpenSwitch) -> bool:
    """Tell whether the ring that a reshard leaves still takes messages; older ones, which may be there, do not."""
    rings = [segment.number for segment in layout.segments if segment.kind == "ring"]
    left = max((ring for ring in rings if ring != switch.generation), default=0)
    return not layout.cut_off and topology.ring_exists(connection, names, left)


def _put_limbo_first(connection: Opener, group: ShardGroup, layout: Layout, switch: OpenSwitch, *, by: str) -> Layout:
    """Let a reshard go on as a recovery from its flip on: what is in limbo came before all that the new ring takes.

    The new ring is bound to `next`, so nothing more is unroutable, and `unrouted` may move.
    """
    event = SwitchBegun(
        RECOVER,
        switch.generation,
        switch.shards,
        layout.limbo,
        layout.limbo + 1,
        group.queue_type,
        step=FLIPS[RECOVER],
    )
    recovery = dataclasses.replace(switch, kind=RECOVER, limbo=layout.limbo, next_limbo=layout.limbo + 1)
    # Before it is recorded: whoever comes next does this again, since only then it counts as flipped.
    with brief_channel(connection) as channel:
        Steps(channel, group, layout, recovery).move_unrouted()
    return write(connection, Names(group.name), layout, event, by=by)


def _holds_messages(connection: Opener, names: Names, switch: OpenSwitch) -> bool:
    """Tell whether anything is in the queues that are empty until the flip.

    Then the switch had come farther than the manifest says: a broker that lost power may have forgotten its last
    events, or someone deleted the exchanges, and what was published since they came back is there.
    """
    queues = [names.shard(switch.generation, index) for index in range(switch.shards)]
    if switch.next_limbo is not None:
        queues.append(names.limbo(switch.next_limbo))
    return any(count_ready(connection, queue) for queue in queues)


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of `switch`, each done on `channel`. What is done already may be done again."""

    channel: Any
    group: ShardGroup
    layout: Layout
    switch: OpenSwitch

    @property
    def names(self) -> Names:
        return Names(self.group.name)

    @property
    def ring(self) -> str:
        """The new one."""
        return self.names.ring(self.switch.generation)

    @property
    def limbos(self) -> tuple[int, int]:
        """The limbo that ends with the switch, and the next."""
        if self.switch.limbo is None or self.switch.next_limbo is None:
            number = self.switch.generation
            raise TopologyError(f"the open switch to g{number:03d} names no limbo; its manifest is damaged")
        return self.switch.limbo, self.switch.next_limbo

    def declare_ring(self) -> None:
        topology.declare_ring(self.channel, self.group, self.switch.generation, self.switch.shards)

    def declare_ring_alone(self) -> None:
        self.declare_ring()
        # A ring that lost a queue is still there, and sends keys elsewhere: no more messages to it.
        with explained(self.group.name, self.names.publish):
            self._unbind_rings(self.layout.segments)

    def hold_in_limbo(self) -> None:
        limbo, _ = self.limbos
        topology.declare_limbo(self.channel, self.group, limbo)
        with explained(self.group.name, self.names.publish):
            self.channel.queue_bind(self.names.limbo(limbo), self.names.publish, "")

    def move_unrouted(self) -> None:
        limbo, next_limbo = self.limbos
        topology.declare_limbo(self.channel, self.group, next_limbo)
        with explained(self.group.name, self.names.unrouted):
            self.channel.queue_bind(self.names.limbo(next_limbo), self.names.unrouted, "")
            self.channel.queue_unbind(self.names.limbo(limbo), self.names.unrouted, "")

    def lead_next(self) -> None:
        with explained(self.group.name, self.names.next):
            self.channel.exchange_bind(self.ring, self.names.next, "")

    def flip_limbo(self) -> None:
        limbo, _ = self.limbos
        with explained(self.group.name, self.names.publish):
            self.channel.queue_unbind(self.names.limbo(limbo), self.names.publish, "")

    def flip_rings(self) -> None:
        self._unbind_rings([each for each in self.layout.segments if each.number != self.switch.generation])

    def attach(self) -> None:
        if self.layout.cut_off:
            return
        # Either the ring has been there since `next` led to it, or it is gone for ever and messages wait in the next
        # limbo: then it must get nothing more, since what it gets would overtake them.
        with contextlib.suppress(amqp_errors.NotFound):
            self.channel.exchange_bind(self.ring, self.names.publish, "")

    def release_next(self) -> None:
        with explained(self.group.name, self.names.next):
            self.channel.exchange_unbind(self.ring, self.names.next, "")

    def _unbind_rings(self, segments: Iterable[Segment]) -> None:
        for segment in segments:
            if segment.kind == "ring":
                self.channel.exchange_unbind(self.names.ring(segment.number), self.names.publish, "")


# By kind of switch: its steps, from 1.
STEPS = {
    RECOVER: (
        *(Steps.declare_ring_alone, Steps.hold_in_limbo, Steps.move_unrouted, Steps.lead_next),
        *(Steps.flip_limbo, Steps.attach, Steps.release_next),
    ),
    RESHARD: (Steps.declare_ring, Steps.lead_next, Steps.flip_rings, Steps.attach, Steps.release_next),
}
_AFTER_PAUSE = (Steps.move_unrouted, Steps.release_next)
# Of a reshard: from its intent on, the new ring may take what the one before it does not.
_LEAD_STEP = 2
# By kind of switch: the step that moves the stream; from its intent on there is no way back.
FLIPS = {RECOVER: 5, RESHARD: 3}
