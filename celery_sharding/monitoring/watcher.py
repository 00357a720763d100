"""Following groups: an up-to-date snapshot for Flower, metrics and `status --watch`.

`read_snapshot` appends a nonce to two logs at each call, so it must not be called once a second. A `Watcher` reads the
logs to their ends once, then tails them on a connection and in a thread of its own, and only counts messages anew. It
shows what `read_snapshot` would, and better rates, from its own counts.

    connecting ──▶ following ──the connection or a log is lost──▶ waiting ──a second or more──▶ connecting

While it is not following, the last snapshot stays, and `error` says why. A log that is deleted, as when a group is
removed, counts as lost: the broker cancels the consumer, and everything is read anew. No error ends the thread. A
forked child has no such thread: its watcher shows what was known at the fork, and says so.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from amqp import exceptions as amqp_errors
from kombu.exceptions import OperationalError

from celery_sharding.errors import LogError, ShardingError
from celery_sharding.layout.manifest import load
from celery_sharding.layout.retention import Reading
from celery_sharding.monitoring.management import Management, QueueFacts
from celery_sharding.monitoring.ownership import FRESH_SECONDS, WINDOW_SECONDS, OwnershipLog, read_recent_events
from celery_sharding.monitoring.snapshot import ask_management, counted_queues, derive_status
from celery_sharding.monitoring.status import GroupStatus, Snapshot
from celery_sharding.monitoring.totals import Totals, TotalsLog
from celery_sharding.rabbitmq.connect import Connect, close_connection, open_connection
from celery_sharding.rabbitmq.queues import count_queues
from celery_sharding.rabbitmq.streams import NONCE, decode
from celery_sharding.rabbitmq.tail import Tail
from celery_sharding.topology import Names

logger = logging.getLogger(__name__)

# How often a group that is not declared yet is looked for.
_UNDECLARED_SECONDS = 5.0
# How often the management API is asked, whose counts are seconds old; and how soon after it did not answer.
_MANAGEMENT_SECONDS, _MANAGEMENT_PAUSE_SECONDS = 5.0, 30.0
_PAUSE_FIRST_SECONDS, _PAUSE_MAX_SECONDS = 1.0, 10.0
_COUNTS_SECONDS = 1.0
_DRAIN_SECONDS = 1.0
_STOP_SECONDS = 10.0

# A watcher counts every few seconds; if it has not for so long, it hangs.
STALE_SECONDS = 30.0


class EventSink(Protocol):
    """Takes the events of groups' journals, in their order, in the watcher's thread; after a loss some come again."""

    def note(self, group: str, event: Mapping[str, Any]) -> None: ...


_EXPECTED = (OperationalError, amqp_errors.AMQPError, ShardingError, OSError)


@dataclass(frozen=True, slots=True)
class View:
    """What a watcher knows: the last snapshot, None before the first, and why there is no newer one ("": there is).

    `totals` is what was counted by group and shard since the watcher was made; it never shrinks.
    """

    snapshot: Snapshot | None = None
    error: str = ""
    totals: Mapping[tuple[str, str], Totals] = field(default_factory=dict)

    def why_stale(self, now: float) -> str:
        """Return why the snapshot is not up to date, or not there; "" if it is."""
        if self.error or self.snapshot is None:
            return self.error
        age_seconds = now - self.snapshot.taken_at
        return "" if age_seconds < STALE_SECONDS else f"the watcher hangs: its last snapshot is {age_seconds:.0f} s old"


class Watcher:
    """Keeps the snapshot of `groups`, given by name, up to date while it is started.

    Args:
        every_seconds: How often messages are counted.
        history_seconds: How far back the journal is read at first, if it reaches as far.
        sink: Takes the events of the journals, too.
        management: Asked, too, now and then.
    """

    def __init__(
        self,
        connect: Connect,
        groups: Iterable[str],
        *,
        every_seconds: float = 1.0,
        history_seconds: float = 0.0,
        sink: EventSink | None = None,
        management: Management | None = None,
    ) -> None:
        self._connect = connect
        self._groups = tuple(groups)
        self._every_seconds = every_seconds
        self._history_seconds = history_seconds
        self._sink = sink
        self._management = _ManagementPoll(management, self._groups)
        self._totals = TotalsLog(time.time())
        self._view = View(error="not connected yet")
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    @property
    def view(self) -> View:
        """The latest; from any thread, without waiting."""
        if os.getpid() != self._pid:
            return dataclasses.replace(
                self._view, error="the process was forked; start a watcher of its own in the child"
            )
        return self._view

    def start(self) -> None:
        """Start to follow, in the background; once."""
        self._thread = threading.Thread(target=self._run, name="shards-watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop, and wait for the thread; without effect if it was not started."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)

    def wait_newer(self, than: View, *, timeout_seconds: float) -> View:
        """Return the view as soon as it is not `than` any more, or when the time is over."""
        if os.getpid() == self._pid:
            with self._changed:
                self._changed.wait_for(lambda: self._view is not than, timeout_seconds)
        return self.view

    def _show(self, view: View) -> None:
        with self._changed:
            self._view = view
            self._changed.notify_all()

    def _run(self) -> None:
        pause = _PAUSE_FIRST_SECONDS
        while not self._stopped.is_set():
            before = self._view.snapshot
            try:
                self._connect_and_follow()
            except _EXPECTED as exc:
                self._fail(exc)
            except Exception as exc:
                # If the thread ended, the last snapshot would look up to date.
                logger.exception("cannot follow the groups")
                self._fail(exc)
            pause = _PAUSE_FIRST_SECONDS if self._view.snapshot is not before else min(pause * 2, _PAUSE_MAX_SECONDS)
            self._stopped.wait(pause)

    def _fail(self, exc: Exception) -> None:
        error = " ".join(str(exc).split()) or type(exc).__name__
        if error != self._view.error:
            logger.warning("cannot follow the groups: %s", error)
        self._show(dataclasses.replace(self._view, error=error))

    def _connect_and_follow(self) -> None:
        connection: Any = self._connect()
        try:
            self._follow(open_connection(connection))
        finally:
            close_connection(connection)

    def _follow(self, connection: Any) -> None:
        followed = [_Followed(connection, name, self._history_seconds, self) for name in self._groups]
        while not self._stopped.is_set():
            self._management.poll()
            statuses = tuple(group.status(self._management.queues) for group in followed)
            self._show(View(Snapshot(time.time(), statuses, self._management.error), totals=self._totals.totals))
            deadline = time.monotonic() + self._every_seconds
            while (left := deadline - time.monotonic()) > 0 and not self._stopped.is_set():
                connection.heartbeat_check()
                try:
                    connection.drain_events(timeout=min(left, _DRAIN_SECONDS))
                except TimeoutError:
                    pass  # nothing came

    def note(self, group: str, event: Mapping[str, Any]) -> None:
        """Take an event of a journal; called by what follows it."""
        self._totals.note(group, event)
        if self._sink is None:
            return
        try:
            self._sink.note(group, event)
        except Exception:
            logger.exception("%s: a receiver of journal events failed", group)  # the picture goes on


class _ManagementPoll:
    """What the management API said last of the groups' queues, and why it says nothing, if so."""

    def __init__(self, management: Management | None, groups: Iterable[str]) -> None:
        self._management = management
        self._groups = groups
        self._next_at = 0.0
        self.queues: dict[str, QueueFacts] = {}
        self.error = ""

    def poll(self) -> None:
        """Ask again, if it is time to."""
        if self._management is not None and time.monotonic() >= self._next_at:
            self.queues, self.error = ask_management(self._management, self._groups)
            self._next_at = time.monotonic() + (_MANAGEMENT_PAUSE_SECONDS if self.error else _MANAGEMENT_SECONDS)


class _Followed:
    """One group on a watcher's connection."""

    def __init__(self, connection: Any, name: str, history_seconds: float, sink: EventSink) -> None:
        self._connection = connection
        self._names = Names(name)
        self._history_seconds = history_seconds
        self._sink = sink
        self._ownership = OwnershipLog()
        self._counts: deque[tuple[float, Mapping[str, int | None]]] = deque()
        self._begin()

    def status(self, broker: Mapping[str, QueueFacts]) -> GroupStatus:
        if not self._layout.limbo and time.monotonic() - self._looked_at > _UNDECLARED_SECONDS:
            self._begin()
        if not self._layout.limbo:
            return GroupStatus(self._names.group, protocol=self._layout.protocol)
        queues = counted_queues(self._names, self._layout)
        ready, consumers = count_queues(self._connection, self._names.group, queues)
        now = time.monotonic()
        while self._counts and now - self._counts[0][0] > WINDOW_SECONDS:
            self._counts.popleft()
        group = derive_status(
            self._names,
            self._layout,
            ready=ready,
            consumers=consumers,
            ownership=self._ownership.at(time.time()),
            now=time.time(),
            counted=[(now - at, counts) for at, counts in self._counts],
            broker=broker,
        )
        if not self._counts or now - self._counts[-1][0] >= _COUNTS_SECONDS:
            self._counts.append((now, ready))
        return group

    def _begin(self) -> None:
        """Read what there is, then tail it."""
        self._looked_at = time.monotonic()
        self._layout = load(self._connection, self._names)
        self._reading = Reading(self._layout)
        if not self._layout.limbo:
            return
        start = self._read_journal()
        self._tails = [
            Tail(self._connection, self._names.manifest, self._layout.through + 1, self._on_manifest),
            Tail(self._connection, self._names.journal, start, self._on_journal),
        ]

    def _read_journal(self) -> int | str:
        """Note the last events, and return the offset of the next."""
        queues = [queue for segment in self._layout.open_segments for queue in segment.queues(self._names)]
        back_seconds = max(FRESH_SECONDS, self._history_seconds)
        # The last owner of each queue is looked for, since a queue may lose its owner at any time.
        events = read_recent_events(self._connection, self._names, back_seconds=back_seconds, backlogged=queues)
        for _, event in events:
            self._note(event)
        return events[-1][0] + 1 if events else "next"

    def _note(self, event: Mapping[str, Any]) -> None:
        self._ownership.note(event)
        self._sink.note(self._names.group, event)

    def _on_manifest(self, body: bytes, offset: int) -> None:
        event = decode(body, stream=self._names.manifest, offset=offset)
        self._reading.note(offset, event)
        if self._reading.misses is not None:
            # What was to be read next is gone; everything is read anew.
            raise LogError(f"{self._names.manifest}: what comes before record {offset} is gone", passes=True)
        self._layout = self._reading.layout
        self._ownership.keep(counted_queues(self._names, self._layout))

    def _on_journal(self, body: bytes, offset: int) -> None:
        event = decode(body, stream=self._names.journal, offset=offset)
        if event is not None and event["event"] != NONCE:
            self._note(event)
