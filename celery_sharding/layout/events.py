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
from typing import Any, ClassVar

from celery_sharding.rabbitmq.events import StreamEvent

RECOVER, RESHARD = "recover", "reshard"


@dataclass(frozen=True, slots=True)
class LayoutEvent(StreamEvent):
    """An event that changes the layout; written under the group's lock only."""


@dataclass(frozen=True, slots=True)
class Created(LayoutEvent):
    """The exchanges are about to be declared, with this limbo behind them."""

    name: ClassVar[str] = "created"
    limbo: int


@dataclass(frozen=True, slots=True)
class SwitchBegun(LayoutEvent):
    """The stream is to go on in a new generation.

    Attributes:
        kind: `RECOVER` or `RESHARD`; a newer version may have others.
        limbo: The one that ends with it, `next_limbo` the one that takes its place; None: there is none.
        step: The steps up to this one count as done.
        adopted: It was found on the broker.
        at: When it was written, if it is read.
    """

    name: ClassVar[str] = "switch"
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
class StepBegun(LayoutEvent):
    """A step of the open switch is about to be done. `at` is when it was written, if it is read."""

    name: ClassVar[str] = "step"
    generation: int
    step: int
    at: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"event": self.name, "generation": self.generation, "step": self.step}


@dataclass(frozen=True, slots=True)
class SwitchEnded(LayoutEvent):
    name: ClassVar[str] = "switched"
    generation: int


@dataclass(frozen=True, slots=True)
class SegmentEnded(LayoutEvent):
    """Each queue of the segment has its end marker."""

    name: ClassVar[str] = "ended"
    segment: str


@dataclass(frozen=True, slots=True)
class SegmentRemoved(LayoutEvent):
    """The queues of the segment are deleted."""

    name: ClassVar[str] = "removed"
    segment: str


@dataclass(frozen=True, slots=True)
class Paused(LayoutEvent):
    """A shard is paused; None: the whole group."""

    name: ClassVar[str] = "pause"
    shard: int | None


@dataclass(frozen=True, slots=True)
class Resumed(LayoutEvent):
    """A shard is resumed; None: the whole group."""

    name: ClassVar[str] = "resume"
    shard: int | None


@dataclass(frozen=True, slots=True)
class Drained(StreamEvent):
    """Nothing of the segment is left to run in `queue`."""

    name: ClassVar[str] = "drained"
    segment: str
    queue: str
    by: str
    at: float = field(default_factory=time.time)
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Reached(StreamEvent):
    """Nothing of the segment is left to run in `queue` but `keys`, given by their digests."""

    name: ClassVar[str] = "reached"
    segment: str
    queue: str
    keys: tuple[str, ...]
    by: str
    at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class Finished(StreamEvent):
    """Nothing of `key`, given by its digest, is left to run in `queue`, which has reached its end."""

    name: ClassVar[str] = "finished"
    segment: str
    queue: str
    key: str
    by: str
    at: float = field(default_factory=time.time)


Fact = Drained | Reached | Finished
FACTS = (Drained.name, Reached.name, Finished.name)


@dataclass(frozen=True, slots=True)
class Operated(StreamEvent):
    """An operator did something that changes no layout, as `replay`.

    Attributes:
        result: How it ended, in words.
        operation: The same in the events that tell of its beginning and its end; None: there is one event only.
        facts: Of the operation, as `count`.
    """

    name: ClassVar[str] = "operated"
    verb: str
    by: str
    result: str
    operation: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    at: float = field(default_factory=time.time)

    def as_dict(self) -> dict[str, Any]:
        event = {"event": self.name, "verb": self.verb, "by": self.by, "at": self.at, "result": self.result}
        return event | ({} if self.operation is None else {"operation": self.operation}) | dict(self.facts)


@dataclass(frozen=True, slots=True)
class Required(StreamEvent):
    """From now on only versions that know `protocol` may act on the group."""

    name: ClassVar[str] = "requires"
    protocol: int


def parse_event(event: Mapping[str, Any]) -> StreamEvent | None:
    """Return what an event of a manifest says; None: this version does not know it.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: It is damaged.
    """
    at = _parse_moment(event.get("at"))
    segment, queue, by = (str(event.get(name)) for name in ("segment", "queue", "by"))
    match event.get("event"):
        case Created.name:
            return Created(int(event["limbo"]))
        case SwitchBegun.name:
            return SwitchBegun(
                kind=str(event["kind"]),
                generation=int(event["generation"]),
                shards=int(event["shards"]),
                limbo=_optional_int(event.get("limbo")),
                next_limbo=_optional_int(event.get("next_limbo")),
                queue_type=str(event.get("queue_type", "quorum")),
                step=int(event.get("step", 0)),
                adopted=bool(event.get("adopted")),
                at=at,
            )
        case StepBegun.name:
            return StepBegun(int(event["generation"]), int(event["step"]), at)
        case SwitchEnded.name:
            return SwitchEnded(int(event["generation"]))
        case SegmentEnded.name:
            return SegmentEnded(segment)
        case SegmentRemoved.name:
            return SegmentRemoved(segment)
        case Paused.name:
            return Paused(_optional_int(event.get("shard")))
        case Resumed.name:
            return Resumed(_optional_int(event.get("shard")))
        case Operated.name:
            operation = event.get("operation")
            result = str(event.get("result", ""))
            return Operated(str(event.get("verb")), by, result, None if operation is None else str(operation))
        case Required.name:
            return Required(int(event["protocol"]))
        case Drained.name:
            return Drained(segment, queue, by, at or 0.0, str(event.get("reason", "")))
        case Reached.name:
            return Reached(segment, queue, tuple(map(str, event["keys"])), by, at or 0.0)
        case Finished.name:
            return Finished(segment, queue, str(event.get("key")), by, at or 0.0)
    return None


def _parse_moment(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)
