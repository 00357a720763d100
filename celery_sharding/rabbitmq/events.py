"""What a stream holds: events, which are values here and JSON objects there. Anybody may write to a stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from celery_sharding.timestamps import read_moment

# What reading an event raises that another version, or a stranger, wrote. JSON's 1e999 is infinite.
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """A fact under a name. Its fields stand in the JSON in their order, which is that of the bytes."""

    name: ClassVar[str]

    def __init_subclass__(cls, name: str = "") -> None:
        if name:  # `dataclass` makes each class with slots a second time
            cls.name = name

    def as_dict(self) -> dict[str, Any]:
        """Return what `streams.encode` takes."""
        return {"event": self.name} | {name: getattr(self, name) for name in _shape(type(self)).names}

    @classmethod
    def parse(cls, event: Mapping[str, Any]) -> Self | None:
        """Return what an event says; None: it has another name, or is damaged."""
        try:
            return cls.read(event) if event.get("event") == cls.name else None
        except DAMAGED:
            return None

    @classmethod
    def read(cls, event: Mapping[str, Any]) -> Self:
        """Return what an event of this name says. A moment that is missing is 0, never now.

        Raises:
            KeyError, TypeError, ValueError: It is damaged (`DAMAGED`).
        """
        found = read_fields(cls, event)
        if "at" not in found and _shape(cls).has_moment:
            found["at"] = 0.0
        return cls(**found)


@dataclass(frozen=True, slots=True)
class TimedEvent(StreamEvent):
    """An event that begins with its moment, in seconds since the epoch by its writer's clock."""

    at: float = field(default_factory=time.time, kw_only=True)


def read_fields(cls: type, facts: Mapping[str, Any], *, complete: bool = False) -> dict[str, Any]:
    """Return the fields of a dataclass as `facts` have them; those of another type than `_READERS` know are left out.

    Args:
        complete: Each must be there.

    Raises:
        KeyError, TypeError, ValueError: One is missing, or not of its type.
    """
    return {name: reader(facts[name]) for name, reader in _shape(cls).readers if complete or name in facts}


class _Shape:
    """What is read of a dataclass over and over: its fields, and how each is read."""

    def __init__(self, cls: type) -> None:
        self.names = tuple(each.name for each in fields(cls))
        self.readers = [(each.name, _READERS[str(each.type)]) for each in fields(cls) if str(each.type) in _READERS]
        self.has_moment = any(each.default_factory is time.time for each in fields(cls))


_SHAPES: dict[type, _Shape] = {}


def _shape(cls: type) -> _Shape:
    found = _SHAPES.get(cls)
    if found is None:
        found = _SHAPES[cls] = _Shape(cls)
    return found


def read_whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value


def _read_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


# By the types of fields, as they are written.
_READERS: Mapping[str, Callable[[Any], Any]] = {
    "bool": bool,
    "int": read_whole,
    "int | None": lambda value: None if value is None else read_whole(value),
    "float": float,
    "float | None": read_moment,
    "str": _read_text,
    "str | None": lambda value: None if value is None else _read_text(value),
    "tuple[str, ...]": lambda value: tuple(map(_read_text, value)),
    "frozenset[str]": lambda value: frozenset(map(_read_text, value)),
    "frozenset[int | None]": lambda value: frozenset(None if each is None else read_whole(each) for each in value),
    "frozenset[tuple[str, str]]": lambda value: frozenset((_read_text(a), _read_text(b)) for a, b in value),
}
