"""Following groups: the snapshot for faces that look all the time.

`read_snapshot` appends a nonce to two logs at each call, so who looks once a second must not call it. A `Watcher` reads
the logs to their ends once, then tails them on a connection of its own, in a thread of its own, and only counts
messages anew. What it shows is what `read_snapshot` would.

    connecting ──▶ following ──the connection or a log is lost──▶ waiting ──a second or more──▶ connecting

While it is not following, the last snapshot stays, with its age, and `error` says why.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from amqp import exceptions as amqp_errors
from kombu.exceptions import OperationalError

from celery_sharding.admin.snapshot import GroupStatus, Snapshot, judge_now
from celery_sharding.admin.vitals import VitalsLog
from celery_sharding.connecting import Connect, close_connection, open_connection
from celery_sharding.errors import LogError, ShardingError
from celery_sharding.layout import fold
from celery_sharding.manifest import load
from celery_sharding.streams import NONCE, decode, read_backwards
from celery_sharding.tail import Tail
from celery_sharding.topology import Names

logger = logging.getLogger(__name__)

# How often a group that is not declared yet is looked for.
_UNDECLARED_SECONDS = 5.0
_PAUSE_FIRST_SECONDS, _PAUSE_MAX_SECONDS = 1.0, 10.0
_LAST_EVENTS = 200
_STOP_SECONDS = 10.0

OnEvent = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class View:
    """What a watcher knows: the last snapshot, None before the first, and why there is no newer one ("": nothing)."""

    snapshot: Snapshot | None = None
    error: str = ""


class Watcher:
    """Keeps the snapshot of `groups`, given by name, up to date while it is started.

    Args:
        connect: Makes a kombu connection; its settings are used.
        every_seconds: How often messages are counted.
        history_seconds: How far back the journal is read at first, if it reaches as far.
        on_event: Called with a group's name and each event of its journal, in its order, in the watcher's thread;
            after a lost connection some come again.
    """

    def __init__(
        self,
        connect: Connect,
        groups: Iterable[str],
        *,
        every_seconds: float = 1.0,
        history_seconds: float = 0.0,
        on_event: OnEvent | None = None,
    ) -> None:
        self._connect = connect
        self._groups = tuple(groups)
        self._every_seconds = every_seconds
        self._history_seconds = history_seconds
        self._on_event = on_event
        self._view = View(error="not connected yet")
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shards-watcher", daemon=True)

    @property
    def view(self) -> View:
        """The latest; from any thread, at once."""
        return self._view

    def start(self) -> None:
        """Begin to follow, in the background; once."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for that."""
        self._stopped.set()
        self._thread.join(_STOP_SECONDS)

    def wait_newer(self, than: View, *, timeout_seconds: float) -> View:
        """Return the view as soon as it is another than `than`, or when the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._view is not than, timeout_seconds)
        return self._view

    def _show(self, view: View) -> None:
        with self._changed:
            self._view = view
            self._changed.notify_all()

    def _run(self) -> None:
        pause = _PAUSE_FIRST_SECONDS
        while not self._stopped.is_set():
            before = self._view.snapshot
            connection: Any = self._connect()
            try:
                self._follow(open_connection(connection))
            except (OperationalError, amqp_errors.AMQPError, ShardingError, OSError) as exc:
                if not self._view.error:
                    logger.warning("the groups cannot be followed: %s", exc)
                self._show(View(self._view.snapshot, error=_one_line(exc)))
            finally:
                close_connection(connection)
            pause = _PAUSE_FIRST_SECONDS if self._view.snapshot is not before else min(pause * 2, _PAUSE_MAX_SECONDS)
            self._stopped.wait(pause)

    def _follow(self, connection: Any) -> None:
        followed = [_Followed(connection, name, self._history_seconds, self._on_event) for name in self._groups]
        while not self._stopped.is_set():
            statuses = tuple(group.status() for group in followed)
            self._show(View(Snapshot(time.time(), statuses)))
            deadline = time.monotonic() + self._every_seconds
            while (left := deadline - time.monotonic()) > 0 and not self._stopped.is_set():
                try:
                    connection.drain_events(timeout=left)
                except TimeoutError:
                    break


class _Followed:
    """One group on a watcher's connection."""

    def __init__(self, connection: Any, name: str, history_seconds: float, on_event: OnEvent | None) -> None:
        self._connection = connection
        self._names = Names(name)
        self._history_seconds = history_seconds
        self._on_event = on_event
        self._vitals = VitalsLog()
        self._looked_at = 0.0
        self._begin()

    def status(self) -> GroupStatus:
        if not self._layout.limbo and time.monotonic() - self._looked_at > _UNDECLARED_SECONDS:
            self._begin()
        if not self._layout.limbo:
            return GroupStatus(self._names.group)
        return judge_now(self._connection, self._names, self._layout, self._vitals.at(time.time()))

    def _begin(self) -> None:
        """Read what there is, then tail it."""
        self._looked_at = time.monotonic()
        self._layout = load(self._connection, self._names)
        if not self._layout.limbo:
            return
        start = self._read_journal()
        self._tails = [
            Tail(self._connection, self._names.manifest, self._layout.offset + 1, self._on_manifest),
            Tail(self._connection, self._names.journal, start, self._on_journal),
        ]

    def _read_journal(self) -> int | str:
        """Note the last events, and return the offset of the next."""
        events: list[tuple[int, Mapping[str, Any]]] = []
        since = time.time() - self._history_seconds
        try:
            for batch in read_backwards(self._connection, self._names.journal):
                events = [*batch, *events]
                if len(events) >= _LAST_EVENTS and _moment(events[0][1]) < since:
                    break
        except LogError as exc:
            if not exc.facts.get("missing"):
                raise
            return "next"
        for _, event in events:
            self._note(event)
        return events[-1][0] + 1 if events else "next"

    def _note(self, event: Mapping[str, Any]) -> None:
        self._vitals.note(event)
        if self._on_event is not None:
            self._on_event(self._names.group, event)

    def _on_manifest(self, body: bytes, offset: int) -> None:
        event = decode(body, stream=self._names.manifest, offset=offset)
        if event is not None:
            self._layout = fold(self._layout, offset, event)

    def _on_journal(self, body: bytes, offset: int) -> None:
        event = decode(body, stream=self._names.journal, offset=offset)
        if event is not None and event["event"] != NONCE:
            self._note(event)


def _moment(event: Mapping[str, Any]) -> float:
    at = event.get("at")
    return float(at) if isinstance(at, int | float) else 0.0


def _one_line(exc: Exception) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__
