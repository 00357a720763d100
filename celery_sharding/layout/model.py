"""The layout of a group: which shards are live, which limbo takes unrouted messages, what is consumed next.

Values, and what follows from them; no broker. `fold` makes them from the events of the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from celery_sharding.topology import Names


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the group's order: one limbo queue, or the shard queues of one generation.

    Attributes:
        queue_type: What its queues were declared with.
        ended: Each of its queues holds an end marker.
        drained: The queues of which nothing is left, the last of them since `drained_at` (epoch seconds, by the clock
            of its owner).
        reached: The queues that have come to their marker, of which only unfinished keys are left.
        unfinished: (queue, digest of a key): what is left there.
    """

    kind: Literal["limbo", "ring"]
    number: int
    shards: int = 1
    queue_type: str = "quorum"
    ended: bool = False
    drained: frozenset[str] = frozenset()
    drained_at: float = 0.0
    reached: frozenset[str] = frozenset()
    unfinished: frozenset[tuple[str, str]] = frozenset()

    @property
    def name(self) -> str:
        """`limbo001` or `g001`."""
        return f"{'limbo' if self.kind == 'limbo' else 'g'}{self.number:03d}"

    def queues(self, names: Names) -> tuple[str, ...]:
        """Return its queues; a ring's in the order of their shards."""
        if self.kind == "limbo":
            return (names.limbo(self.number),)
        return tuple(names.shard(self.number, index) for index in range(self.shards))

    @property
    def is_drained(self) -> bool:
        """Whether nothing of it is left to run: it was ended, and each of its queues reported."""
        return self.ended and len(self.drained) == self.shards

    @property
    def is_passed(self) -> bool:
        """Whether nothing is left to run but its unfinished keys."""
        return self.ended and len(self.drained | self.reached) == self.shards

    def owns(self, queue: str) -> bool:
        """Tell whether `queue` is one of its queues, whatever the group is called."""
        if self.kind == "limbo":
            return queue.endswith(f".{self.name}")
        ring, _, index = queue.rpartition(".")
        return ring.endswith(f".{self.name}") and index.isdecimal() and int(index) < self.shards


@dataclass(frozen=True, slots=True)
class OpenSwitch:
    """A switch that was begun and is not over. `step` is the last one recorded, 0 for none.

    `limbo` is the one that ends with it, `next_limbo` the one that takes its place; None if there is none. `at` is when
    that step was recorded, in seconds since the epoch by its writer's clock; None: not known.
    """

    kind: str
    generation: int
    shards: int
    limbo: int | None
    next_limbo: int | None
    step: int = 0
    at: float | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """What the manifest says up to `offset`.

    Attributes:
        offset: Of the last layout event that counted; -1 for none. The base of the next.
        segments: The chain, in the order of consumption, without those that were removed.
        generation: Of the live ring, or the one being switched to; 0 before the first.
        shards: Of that generation; 0 before the first.
        limbo: Number of the limbo that takes unrouted messages; 0 before the fixed part was ever declared.
        switch: The one that is under way.
        cut_off: The exchanges were declared anew, so the live ring, if it exists, no longer gets messages.
        paused: Shards that are paused; None in it stands for the whole group.
        protocol: What a version must know to act on the group (`protocol`).
        through: Offset of the last record of the manifest, of whatever kind, that was read for it; -1: none was.
    """

    offset: int = -1
    segments: tuple[Segment, ...] = ()
    generation: int = 0
    shards: int = 0
    limbo: int = 0
    switch: OpenSwitch | None = None
    cut_off: bool = False
    paused: frozenset[int | None] = field(default_factory=frozenset)
    protocol: int = 1
    through: int = field(default=-1, compare=False)

    @property
    def open_segments(self) -> tuple[Segment, ...]:
        """The segments to consume, in order: what is left of those that are passed, and the one after them."""
        found: list[Segment] = []
        for segment in self.segments:
            is_last = segment is self.segments[-1]
            if is_last or not segment.is_drained:
                found.append(segment)
            if not is_last and not segment.is_passed:
                break
        return tuple(found)

    @property
    def unended(self) -> tuple[Segment, ...]:
        """Segments that need their end markers; none while a switch is under way, or the stream may still flip."""
        return tuple(s for s in self.segments[:-1] if not s.ended) if self.switch is None else ()

    def segment(self, name: str) -> Segment | None:
        """Return the segment called `name` (`limbo001`, `g001`) if it is in the chain."""
        return next((segment for segment in self.segments if segment.name == name), None)

    def is_paused(self, shard: int) -> bool:
        return None in self.paused or shard in self.paused

    def pauses(self, segment: Segment, index: int) -> bool:
        """Tell whether the queue `index` of `segment` is paused.

        An earlier generation may have more shards than the live one. Their index modulo the live number says which
        shard they follow, as in a worker's selection. A limbo is paused with the whole group only.
        """
        if segment.kind == "limbo":
            return None in self.paused
        return self.is_paused(index % max(1, self.shards))
