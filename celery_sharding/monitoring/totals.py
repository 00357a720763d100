"""What was counted in groups since somebody looks: totals that only grow, whoever owns a shard.

Owners write what they have counted since they took a shard: counters once a second, times now and then, and all of it
once more when they give it up. `TotalsLog` adds up what came on top of that owner's last word, so events that come
again, and owners who change, do no harm. What an owner had counted before the log began is not in it: like any
counter, it starts at 0 with its process.

Not counted is what a worker did in its last second (times: its last seconds) before it was killed or lost the broker.

A shard is called by its index, whatever its generation; a limbo queue `limbo001`. Knows no broker.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from celery_sharding.journal.events import Counted, Handover, Vitals
from celery_sharding.journal.histogram import BOUNDS_SECONDS
from celery_sharding.topology import Names

# Of so many owners of a queue the last word is kept; containers come under new names for ever.
_OWNERS_MAX = 8
# Generations come and go, too. Nothing that is older comes again: the journal does not keep it.
_KEEP_SECONDS, _SWEEP_SECONDS = 86_400.0, 600.0
_TIMES_LENGTH = len(BOUNDS_SECONDS) + 2
_NO_TIMES = (0.0,) * _TIMES_LENGTH
_RING_QUEUE = re.compile(r"g\d+\.(\d+)")


@dataclass(frozen=True, slots=True)
class Totals:
    """What was counted in one shard.

    Attributes:
        counters: By name, as `Shard.count` counts them.
        waits: From publishing to the start of the first run: the sum in seconds, and the counts by bucket, not
            cumulative, of `histogram.BOUNDS_SECONDS` and above.
        runs: From the start of a run to its end, in the same way.
        handovers: How often a worker became its owner.
    """

    counters: Mapping[str, int] = field(default_factory=dict)
    waits: Sequence[float] = _NO_TIMES
    runs: Sequence[float] = _NO_TIMES
    handovers: int = 0


class TotalsLog:
    """Adds up the journal's events, noted in its order. Not safe for threads.

    Args:
        since: When it begins, in seconds since the epoch. Owners that have taken their shard before, by their clocks,
            count from their first word.
    """

    def __init__(self, since: float) -> None:
        self._since = since
        # By group and queue, then by owner: who was heard last comes last.
        self._words: dict[tuple[str, str], dict[str, _Word]] = {}
        self._heard: dict[tuple[str, str], float] = {}  # when
        self._swept_at = 0.0
        self._sums: dict[tuple[str, str], _Sum] = {}
        self._shown: dict[tuple[str, str], Totals] = {}

    def note(self, group: str, event: Mapping[str, Any]) -> None:
        """Note one event of the journal of `group`; what counts nothing, or cannot be read, is passed over."""
        said = Vitals.parse(event) or Handover.parse(event)
        if said is None:
            return
        if said.at - self._swept_at > _SWEEP_SECONDS:
            self._sweep(min(said.at, time.time()))  # a clock may be wrong
        if isinstance(said, Vitals):
            for queue, shard in said.owned.items():
                self._add(group, said.by, queue, said.at, shard.counted)
        elif said.change == "released" and said.counted is not None:
            self._add(group, said.owner, said.queue, said.at, said.counted)

    @property
    def totals(self) -> dict[tuple[str, str], Totals]:
        """By group and shard; the caller's own."""
        for shard, counted in self._sums.items():
            if counted.is_new:
                counted.is_new = False
                self._shown[shard] = Totals(
                    dict(counted.counters), tuple(counted.waits), tuple(counted.runs), counted.handovers
                )
        return dict(self._shown)

    def _sweep(self, now: float) -> None:
        """Forget the words on queues of which nothing was said for long, and what was counted in limbo queues."""
        self._swept_at = now
        for place in [place for place, at in self._heard.items() if now - at > _KEEP_SECONDS]:
            del self._heard[place], self._words[place]
            group, label = place[0], shard_label(*place)
            if not label.isdecimal():  # a shard's count goes on in the next generation
                self._sums.pop((group, label), None)
                self._shown.pop((group, label), None)

    def _add(self, group: str, owner: str, queue: str, at: float, said: Counted) -> None:
        place = (group, queue)
        if place not in self._words and at < self._swept_at - _KEEP_SECONDS:
            return  # it comes again, and is forgotten
        counted = self._sums.setdefault((group, shard_label(group, queue)), _Sum())
        words = self._words.setdefault(place, {})
        self._heard[place] = max(at, self._heard.get(place, 0.0))
        word = words.get(owner)
        if word is not None and said.since < word.since:
            return  # it comes again
        if word is None or said.since > word.since:
            word = _Word(said.since)
            if said.since >= self._since:
                word.waits = word.runs = _NO_TIMES
                counted.handovers += 1
            else:
                word.counters = dict(said.counters)
            counted.is_new = True
        words.pop(owner, None)
        words[owner] = word
        if len(words) > _OWNERS_MAX:
            del words[next(iter(words))]
        for name, count in said.counters.items():
            if (more := count - word.counters.get(name, 0)) > 0:
                word.counters[name] = count
                counted.counters[name] = counted.counters.get(name, 0) + more
                counted.is_new = True
        word.waits = counted.add_times(counted.waits, word.waits, said.waits)
        word.runs = counted.add_times(counted.runs, word.runs, said.runs)


def shard_label(group: str, queue: str) -> str:
    """Return how the totals call the shard of a queue."""
    suffix = queue.removeprefix(f"{Names(group).publish}.")
    ring = _RING_QUEUE.fullmatch(suffix)
    return suffix if ring is None else str(int(ring[1]))


@dataclass(slots=True)
class _Word:
    """What an owner said last; times are None until it has said some."""

    since: float
    counters: dict[str, int] = field(default_factory=dict)
    waits: Sequence[float] | None = None
    runs: Sequence[float] | None = None


@dataclass(slots=True)
class _Sum:
    counters: dict[str, int] = field(default_factory=dict)
    waits: list[float] = field(default_factory=lambda: [*_NO_TIMES])
    runs: list[float] = field(default_factory=lambda: [*_NO_TIMES])
    handovers: int = 0
    is_new: bool = True

    def add_times(
        self, total: list[float], before: Sequence[float] | None, said: Sequence[float]
    ) -> Sequence[float] | None:
        """Add what `said` has more than `before` to `total`, and return the owner's last word."""
        if not 0 < len(said) <= _TIMES_LENGTH:
            return before
        now = [*said, *_NO_TIMES[len(said) :]]
        if before is not None:
            if sum(now[1:]) <= sum(before[1:]):
                return before  # nothing new, or it comes again
            self.is_new = True
            for index, (new, old) in enumerate(zip(now, before, strict=True)):
                total[index] += max(0.0, new - old)
        return now
