"""Shards as people name them: `orders`, `orders/3`, `orders.003`; and selections of a group's shards."""

from __future__ import annotations

import difflib
import re

from celery_sharding.config import Settings, ShardGroup
from celery_sharding.errors import UnknownShard

_SHARD = re.compile(r"(?P<group>.+)[./](?P<index>[0-9]+)")
# What may follow a group's name in a misspelt name of a shard.
_NUMBERED = re.compile(r"[./:#_ -]+[0-9]*$")

# Shards chosen of a group; None for all.
Indexes = frozenset[int] | None


def parse_shard(text: str, settings: Settings) -> tuple[ShardGroup, int | None] | None:
    """Read `orders`, `orders.003` or `orders/3`: the group and the shard's index, None for all; None for no group.

    Raises:
        UnknownShard: The group has no such shard.
    """
    if text in settings.groups:
        return settings.groups[text], None
    match = _SHARD.fullmatch(text)
    if match is None or match["group"] not in settings.groups:
        return None
    group, index = settings.groups[match["group"]], int(match["index"])
    return group, index


def check_shard(group: str, index: int, shards: int) -> None:
    """Raise `UnknownShard` unless `index` is a shard of a group of `shards`."""
    if not 0 <= index < shards:
        raise UnknownShard(
            f"group {group!r} has the shards 0 to {shards - 1}; there is no {group}.{index:03d}",
            group=group,
            index=index,
            shards=shards,
        )


def with_shards(selected: Indexes, index: int | None, shards: int) -> Indexes:
    """Return the selection plus a shard, or plus all (`index` None) of the group's `shards`."""
    if index is None or selected is None:
        return None
    more = selected | {index}
    return None if len(more) >= shards else more


def without_shards(selected: Indexes, index: int | None, shards: int) -> Indexes:
    """Return the selection minus a shard, or minus all (`index` None) of the group's `shards`."""
    if index is None:
        return frozenset()
    return (frozenset(range(shards)) if selected is None else selected) - {index}


def describe_near_miss(name: str, settings: Settings) -> str:
    """Return a warning if the name of a queue is nearly that of a group or shard, else ""."""
    stem = _NUMBERED.sub("", name.lower())
    known = {group.lower(): group for group in settings.groups}
    near = next(
        iter(difflib.get_close_matches(stem, known, n=1) or difflib.get_close_matches(name.lower(), known, n=1)), ""
    )
    if not near:
        return ""
    number = name[len(stem) :].strip("./-_:# ")
    right = f"{known[near]}.{int(number):03d}" if number.isdecimal() else known[near]
    return f"{name} names no shard group and is taken for an ordinary queue (did you mean {right!r}?)"
