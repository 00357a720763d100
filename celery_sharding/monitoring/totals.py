"""What was counted in groups since the watcher started: totals that only grow, whoever owns a shard. No broker.

Owners write what they have counted since they took a shard: counters once a second, times now and then, and all of it
once more when they give it up. `TotalsLog` adds up the differences to that owner's last event. So repeated events and
changes of owners do no harm. What an owner had counted before the log began is not in it: like any counter, it starts
at 0 with its process.

Not counted is what a worker did in its last second (times: its last seconds) before it was killed or lost the broker.

A shard goes by its index, whatever its generation; a limbo queue is called `limbo001`.
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

# Of so many owners of a queue the last event is kept: containers get new names for ever.
_OWNERS_MAX = 8
# Generations come and go, too. Nothing older than this is repeated: the journal does not keep it.
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
        since: When it begins, in seconds since the epoch. Owners that took their shard before that, by their clocks,
            count from their first event.
    """

    def __init__(self, since: float) -> None:
        self._since = since
        # By group and queue, then by owner: who was heard last comes last.
        self._words: dict[tuple[str, str], dict[str, _Word]] = {}
        self._heard: dict[tuple[str, str], float] = {}  # when
        self._swept_at = 0.0
        self._totals: dict[tuple[str, str], Totals] = {}

    def note(self, group: str, event: Mapping[str, Any]) -> None:
        """Note one event of the journal of `group`; what counts nothing, or is damaged, is ignored."""
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
        return dict(self._totals)

    def _sweep(self, now: float) -> None:
        """Forget queues that were not heard of for long, and what was counted in those that are limbos."""
        self._swept_at = now
        for place in [place for place, at in self._heard.items() if now - at > _KEEP_SECONDS]:
            del self._heard[place], self._words[place]
            group, label = place[0], shard_label(*place)
            if not label.isdecimal():  # a shard's count goes on in the next generation
                self._totals.pop((group, label), None)

    def _add(self, group: str, owner: str, queue: str, at: float, said: Counted) -> None:
        place = (group, queue)
        if place not in self._words and at < self._swept_at - _KEEP_SECONDS:
            return  # repeated, and long forgotten
        shard = (group, shard_label(group, queue))
        total = self._totals.setdefault(shard, Totals())
        words = self._words.setdefault(place, {})
        self._heard[place] = max(at, self._heard.get(place, 0.0))
        word = words.get(owner)
        if word is not None and said.since < word.since:
            return  # repeated
        handovers = total.handovers
        if word is None or said.since > word.since:
            word = _Word(said.since)
            if said.since >= self._since:
                word.waits = word.runs = _NO_TIMES
                handovers += 1
            else:
                word.counters = dict(said.counters)
        words.pop(owner, None)
        words[owner] = word
        if len(words) > _OWNERS_MAX:
            del words[next(iter(words))]
        counters = dict(total.counters)
        for name, count in said.counters.items():
            if (more := count - word.counters.get(name, 0)) > 0:
                word.counters[name] = count
                counters[name] = counters.get(name, 0) + more
        waits, word.waits = _add_times(total.waits, word.waits, said.waits)
        runs, word.runs = _add_times(total.runs, word.runs, said.runs)
        self._totals[shard] = Totals(counters, waits, runs, handovers)


def shard_label(group: str, queue: str) -> str:
    """Return how the totals call the shard of a queue."""
    suffix = queue.removeprefix(f"{Names(group).publish}.")
    ring = _RING_QUEUE.fullmatch(suffix)
    return suffix if ring is None else str(int(ring[1]))


@dataclass(slots=True)
class _Word:
    """What an owner said last; times are None until it has sent some."""

    since: float
    counters: dict[str, int] = field(default_factory=dict)
    waits: Sequence[float] | None = None
    runs: Sequence[float] | None = None


def _add_times(
    total: Sequence[float], before: Sequence[float] | None, said: Sequence[float]
) -> tuple[Sequence[float], Sequence[float] | None]:
    """Return `total` and what `said` has more than `before`, and what the owner said last."""
    if not 0 < len(said) <= _TIMES_LENGTH:
        return total, before
    now = (*said, *_NO_TIMES[len(said) :])
    if before is None:
        return total, now
    if sum(now[1:]) <= sum(before[1:]):
        return total, before  # nothing new, or repeated
    return tuple(sum_ + max(0.0, new - old) for sum_, new, old in zip(total, now, before, strict=True)), now
