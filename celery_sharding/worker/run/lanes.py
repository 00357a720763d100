"""Order within one worker.

A lane holds the messages of one key (or of one shard) in delivery order; at most one of them runs. Lanes do no I/O and
know no broker and no Celery: the shards feed them, and they hand what may run to `Starter`.

How an entry gets from state to state is drawn in `delivery`. The shard's consumer calls `admit`, `freeze`, `thaw`,
`close`; the run itself `settle`, `again`, `hold`, `due`. Only the head of a lane is ever READY, RUNNING, HELD or
ORPHAN, so a later message of the lane cannot pass. An orphan keeps its lane locked: a redelivered message of the key
starts when the old run has ended in this process.

Frozen sources start nothing: their heads stay READY, and `thaw` or `close` decides. A head that `may_start` holds back
stays READY, too, until `reconsider` asks again. At most `slots()` entries run at once; sources take turns, and within a
source the first admitted is the first. So a long lane, which bounds them all, does not wait behind short ones, and none
starves.

An entry that cannot be started, since `start` or `may_start` raised, is HELD, and handed to `fail_start`: it does not
stop the others.

All methods may be called from any thread; `start` is called outside the lock, by whichever thread made the entry ready,
and never recursively: a pool that runs the task inside `start` may call `settle` there.
"""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Generic, Protocol, TypeVar

from celery_sharding.worker.run.delivery import GONE, IN_POOL, Entry, State

_AT_HEAD = (State.READY, State.RUNNING, State.HELD, State.ORPHAN)
E = TypeVar("E", bound=Entry)
_E = TypeVar("_E", bound=Entry, contravariant=True)


class Slots(Protocol):
    """Where entries run."""

    def slots(self) -> int:
        """Return how many may run at once."""


class Pump(Protocol):
    """Calls `Lanes.pump` when something may start."""

    def end_soon(self) -> None:
        """Call it soon."""

    def end(self) -> None:
        """Call it now: a lane's next entry may follow the one that has just settled."""


class Starter(Protocol[_E]):
    """Starts what the lanes make ready."""

    def start(self, entry: _E) -> None: ...

    def fail_start(self, entry: _E, error: Exception) -> None:
        """Decide what becomes of an entry that could not be started; called outside the lock."""


class _Ranks:
    """Of each source the rank of its newest entry, and the rank of the entry that started last."""

    __slots__ = ("newest", "started")

    def __init__(self) -> None:
        self.newest: dict[Hashable, int] = {}
        self.started = 0


class Lanes(Generic[E]):
    """All lanes of one worker."""

    def __init__(self, pool: Slots, pump: Pump, starter: Starter[E]) -> None:
        self._pool = pool
        self._pump = pump
        self._starter = starter
        self._lock = threading.RLock()
        self._lanes: dict[Hashable, deque[E]] = {}
        self._sources: dict[Hashable, dict[E, None]] = {}
        self._frozen: set[Hashable] = set()
        self._ready: list[E] = []  # a heap; it may hold entries that are not READY any more
        self._held_back: set[E] = set()
        self._ranks = _Ranks()
        self._in_pool = 0
        self._pumping = False

    def admit(self, entry: E) -> None:
        """Put an entry at the end of its lane; it starts when everything ahead of it is settled."""
        with self._lock:
            newest, started = self._ranks.newest, self._ranks.started
            newest[entry.shard] = rank = max(newest.get(entry.shard, 0), started) + 1
            entry.admit(rank)
            queue = self._lanes.setdefault(entry.lane, deque())
            queue.append(entry)
            self._sources.setdefault(entry.shard, {})[entry] = None
            if len(queue) == 1:
                self._make_ready(entry)
        self._pump.end_soon()

    def settle(self, entry: E) -> None:
        """Take `entry` out of its lane, wherever it stands; if it was the head, the next one may start."""
        with self._lock:
            if entry.state in GONE or entry.state is State.NEW:
                return
            self._in_pool -= entry.state in IN_POOL
            entry.settle()
            self._remove(entry)
        self._pump.end()

    def hold(self, entry: E, *, is_resting: bool = False) -> bool:
        """Let a running head wait for `due` without giving up its place; False for an orphan, which only ends.

        Args:
            is_resting: Nothing of it has begun.
        """
        with self._lock:
            if entry.state is State.ORPHAN:
                self.settle(entry)
            elif entry.state is State.RUNNING:
                self._in_pool -= 1
                entry.hold(is_resting=is_resting)
            held = entry.state is State.HELD
        self._pump.end_soon()
        return held

    def due(self, entry: E) -> None:
        """Let a held head run; nothing happens to one that was dropped meanwhile."""
        with self._lock:
            if entry.state is State.HELD:
                self._make_ready(entry)
        self._pump.end_soon()

    def again(self, entry: E) -> None:
        """Run a head again whose run was lost; the lost run of an orphan only unlocks its lane."""
        with self._lock:
            if entry.state is State.ORPHAN:
                self.settle(entry)
            elif entry.state is State.RUNNING:
                self._in_pool -= 1
                self._make_ready(entry)
        self._pump.end_soon()

    def freeze(self, source: Hashable) -> None:
        """Start nothing more of `source`; what runs goes on."""
        with self._lock:
            self._frozen.add(source)

    def thaw(self, source: Hashable) -> None:
        """Start entries of `source` again."""
        with self._lock:
            self._frozen.discard(source)
            for entry in self._sources.get(source, ()):
                if entry.state is State.READY:
                    heapq.heappush(self._ready, entry)
        self._pump.end_soon()

    def reconsider(self) -> None:
        """Ask again whether what was held back may start."""
        with self._lock:
            for entry in self._held_back:
                heapq.heappush(self._ready, entry)
            self._held_back.clear()
        self._pump.end_soon()

    def close(self, source: Hashable) -> list[E]:
        """Forget every entry of `source` that does not run; return those dropped, in order of admission."""
        dropped = []
        with self._lock:
            for entry in list(self._sources.get(source, ())):
                if entry.state is State.RUNNING:
                    entry.orphan()
                elif entry.state is not State.ORPHAN:
                    entry.drop()
                    self._remove(entry)
                    dropped.append(entry)
            self._frozen.discard(source)
            self._ranks.newest.pop(source, None)
        self._pump.end_soon()
        return dropped

    def is_full(self) -> bool:
        """Say whether as many entries run as may."""
        with self._lock:
            return self._in_pool >= self._pool.slots()

    def count(self, source: Hashable) -> int:
        """Return how many entries of `source` are not settled."""
        with self._lock:
            return len(self._sources.get(source, ()))

    def running(self, source: Hashable) -> int:
        """Return how many entries of `source` run now."""
        with self._lock:
            return sum(entry.state in IN_POOL for entry in self._sources.get(source, ()))

    def is_frozen(self, source: Hashable) -> bool:
        """Say whether nothing of `source` may start."""
        # Without the lock: it is asked under one that is also taken where this one is held.
        return source in self._frozen

    def is_idle(self, source: Hashable) -> bool:
        """Say whether nothing of `source` runs, or is held in the middle of its work."""
        with self._lock:
            return not any(
                entry.state in IN_POOL or (entry.state is State.HELD and not entry.is_resting)
                for entry in self._sources.get(source, ())
            )

    def only_waits(self, source: Hashable) -> bool:
        """Say whether all entries of `source` wait for something that may take long, or behind one that does."""
        with self._lock:
            heads = {self._lanes[entry.lane][0] for entry in self._sources.get(source, ())}
            return all(head.state is State.HELD or head in self._held_back for head in heads)

    def has(self, lane: Hashable) -> bool:
        """Say whether `lane` has entries that are not settled, orphans included."""
        with self._lock:
            return lane in self._lanes

    def in_pool(self) -> list[E]:
        """Return every entry that runs now, orphans included."""
        with self._lock:
            return [queue[0] for queue in self._lanes.values() if queue[0].state in IN_POOL]

    def waiting(self, source: Hashable) -> Iterator[E]:
        """Iterate over the entries of `source` that do not run, in order of admission."""
        with self._lock:
            return iter([entry for entry in self._sources.get(source, ()) if entry.state not in IN_POOL])

    def pump(self, most: int | None = None) -> None:
        """Start what may start, at most `most` entries. One thread pumps at a time; others leave their work to it."""
        started = 0
        while most is None or started < most:
            started += 1
            with self._lock:
                if self._pumping:
                    return
                entry, error = self._next()
                if entry is None:
                    return
                self._pumping = True
                if error is None:
                    entry.start()
                    self._ranks.started = max(self._ranks.started, entry.rank)
                    self._in_pool += 1
            try:
                if error is None:
                    self._starter.start(entry)
                else:
                    self._starter.fail_start(entry, error)
            except Exception as exc:
                if error is not None:
                    raise
                self._hold_unstarted(entry)
                self._starter.fail_start(entry, exc)
            finally:
                with self._lock:
                    self._pumping = False

    def _hold_unstarted(self, entry: E) -> None:
        with self._lock:
            if entry.state is State.RUNNING:
                self._in_pool -= 1
                entry.hold()

    def _make_ready(self, entry: E) -> None:
        entry.make_ready()
        heapq.heappush(self._ready, entry)

    def _remove(self, entry: E) -> None:
        owned = self._sources[entry.shard]
        del owned[entry]
        if not owned:
            del self._sources[entry.shard]
        self._held_back.discard(entry)
        queue = self._lanes[entry.lane]
        queue.remove(entry)
        if not queue:
            del self._lanes[entry.lane]
        elif queue[0].state not in _AT_HEAD:
            self._make_ready(queue[0])

    def _next(self) -> tuple[E | None, Exception | None]:
        """Return what may start next, or cannot be started and why; None if there is nothing."""
        slots = self._pool.slots()
        while self._ready and self._in_pool < slots:
            entry = heapq.heappop(self._ready)
            if entry.state is not State.READY or entry.shard in self._frozen:
                continue
            try:
                may_start = entry.may_start()
            except Exception as exc:
                entry.hold()
                self._held_back.discard(entry)
                return entry, exc
            if may_start:
                self._held_back.discard(entry)
                return entry, None
            self._held_back.add(entry)
        return None, None
