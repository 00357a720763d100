"""The events of a manifest: their shapes and their parser. `manifest` says what they mean, `fold` what follows.

layout events   created, switch, step, switched, ended, removed, pause, resume: `manifest.write` adds on what each
                builds, who writes it and when
facts           drained, reached, finished
notes           operated; and `requires`, which later versions write
snapshot        has its shape in `retention`
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from celery_sharding.rabbitmq.events import StreamEvent

RECOVER, RESHARD = "recover", "reshard"


@dataclass(frozen=True, slots=True)
class LayoutEvent(StreamEvent):
    """An event that changes the layout; written under the group's lock only."""


@dataclass(frozen=True, slots=True)
class Created(LayoutEvent, name="created"):
    """The exchanges are about to be declared, with this limbo behind them."""

    limbo: int


@dataclass(frozen=True, slots=True)
class SwitchBegun(LayoutEvent, name="switch"):
    """The stream is to go on in a new generation.

    Attributes:
        kind: `RECOVER` or `RESHARD`; a newer version may have others.
        limbo: The one that ends with it, `next_limbo` the one that takes its place; None: there is none.
        step: The steps up to this one count as done.
        adopted: It was found on the broker.
        at: When it was written, if it is read.
    """

    kind: str
    generation: int
    shards: int
    limbo: int | None = None
    next_limbo: int | None = None
    queue_type: str = "quorum"
    step: int = 0
    adopted: bool = False
    at: float | None = None

    def as_dict(self) -> dict[str, Any]:
        optional = ("limbo", "next_limbo", "step", "adopted", "at")
        event = StreamEvent.as_dict(self)
        return {key: value for key, value in event.items() if value or key not in optional}


@dataclass(frozen=True, slots=True)
class StepBegun(LayoutEvent, name="step"):
    """A step of the open switch is about to be done. `at` is when it was written, if it is read."""

    generation: int
    step: int
    at: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"event": self.name, "generation": self.generation, "step": self.step}


@dataclass(frozen=True, slots=True)
class SwitchEnded(LayoutEvent, name="switched"):
    generation: int


@dataclass(frozen=True, slots=True)
class SegmentEnded(LayoutEvent, name="ended"):
    """Each queue of the segment has its end marker."""

    segment: str


@dataclass(frozen=True, slots=True)
class SegmentRemoved(LayoutEvent, name="removed"):
    """The queues of the segment are deleted."""

    segment: str


@dataclass(frozen=True, slots=True)
class Paused(LayoutEvent, name="pause"):
    """A shard is paused; None: the whole group."""

    shard: int | None


@dataclass(frozen=True, slots=True)
class Resumed(LayoutEvent, name="resume"):
    """A shard is resumed; None: the whole group."""

    shard: int | None


@dataclass(frozen=True, slots=True)
class Drained(StreamEvent, name="drained"):
    """Nothing of the segment is left to run in `queue`."""

    segment: str
    queue: str
    by: str = ""
    at: float = field(default_factory=time.time)
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Reached(StreamEvent, name="reached"):
    """Nothing of the segment is left to run in `queue` but `keys`, given by their digests."""

    segment: str
    queue: str
    keys: tuple[str, ...]
    by: str = ""
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class Finished(StreamEvent, name="finished"):
    """Nothing of `key`, given by its digest, is left to run in `queue`, which has reached its end."""

    segment: str
    queue: str
    key: str
    by: str = ""
    at: float = field(default_factory=time.time)


Fact = Drained | Reached | Finished
FACTS = (Drained.name, Reached.name, Finished.name)


@dataclass(frozen=True, slots=True)
class Operated(StreamEvent, name="operated"):
    """An operator did something that changes no layout, as `replay`.

    Attributes:
        result: How it ended, in words.
        operation: The same in the events that tell of its beginning and its end; None: there is one event only.
        facts: Of the operation, as `count`.
    """

    verb: str
    by: str = ""
    result: str = ""
    operation: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    at: float = field(default_factory=time.time)

    def as_dict(self) -> dict[str, Any]:
        event = {"event": self.name, "verb": self.verb, "by": self.by, "at": self.at, "result": self.result}
        return event | ({} if self.operation is None else {"operation": self.operation}) | dict(self.facts)


@dataclass(frozen=True, slots=True)
class Required(StreamEvent, name="requires"):
    """From now on only versions that know `protocol` may act on the group."""

    protocol: int


_KINDS: Mapping[str, type[StreamEvent]] = {
    each.name: each
    for each in (
        *(Created, SwitchBegun, StepBegun, SwitchEnded, SegmentEnded, SegmentRemoved, Paused, Resumed),
        *(Drained, Reached, Finished, Operated, Required),
    )
}


def parse_event(event: Mapping[str, Any]) -> StreamEvent | None:
    """Return what an event of a manifest says; None: this version does not know it.

    Raises:
        KeyError, TypeError, ValueError: It is damaged (`rabbitmq.events.DAMAGED`).
    """
    kind = _KINDS.get(str(event.get("event")))
    return None if kind is None else kind.read(event)
