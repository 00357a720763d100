"""What a stream holds: events, which are values here and JSON objects there."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """A fact under a name. Its fields stand in the JSON in their order, which is that of the bytes."""

    name: ClassVar[str]

    def as_dict(self) -> dict[str, Any]:
        """Return what `streams.encode` takes."""
        return {"event": self.name} | {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True, slots=True)
class TimedEvent(StreamEvent):
    """An event that begins with its moment, in seconds since the epoch by its writer's clock."""

    at: float = field(default_factory=time.time, kw_only=True)
