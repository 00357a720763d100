"""Checks of how a group is doing: owners, backlog, dead letters, and the clocks that they depend on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from celery_sharding.journal.events import Vitals
from celery_sharding.monitoring.doctor.finding import Finding, Patient, Severity
from celery_sharding.monitoring.health import name_some
from celery_sharding.monitoring.ownership import FRESH_SECONDS
from celery_sharding.monitoring.shard_state import STATES
from celery_sharding.monitoring.status import GroupStatus, ShardStatus
from celery_sharding.rabbitmq.connect import close_connection, open_connection
from celery_sharding.rabbitmq.streams import decode
from celery_sharding.rabbitmq.tail import Tail

# Between the clocks of two synchronized hosts.
_SKEW_SECONDS = 1.0
_VITALS_SECONDS = 2.5
_STATES: tuple[tuple[str, Severity], ...] = (
    ("missing", "error"),
    ("stuck", "error"),
    ("unowned", "warning"),
    ("no standby", "warning"),
)


def check_shards(patient: Patient) -> Iterator[Finding]:
    status = patient.status
    consumed = [row for row in status.rows if row.state not in ("waiting", "paused")]
    owned = [row for row in consumed if row.owner or row.standbys]
    if consumed and not owned:
        yield Finding("error", "workers", "no worker consumes it", "start one")
    else:
        for state, severity in _STATES:
            rows = [row for row in consumed if row.state == state]
            if rows:
                yield Finding(severity, "workers", f"{state}: {_labels(status, rows)}", STATES[state][1])
        if all(row.state in ("ok", "idle", "draining") for row in consumed):
            yield Finding("ok", "workers", "every shard has an owner and a standby")
    paused = [row for row in status.rows if row.state == "paused"]
    if status.paused or paused:
        yield Finding(
            "note",
            "paused",
            "the whole group is paused" if status.paused else f"paused: {_labels(status, paused)}",
            f"`celery shards resume {status.name}` resumes it",
        )


def check_backlog(patient: Patient) -> Iterator[Finding]:
    status, name = patient.status, patient.group.name
    if status.generation and status.limbo_ready:
        yield Finding(
            "error",
            "limbo",
            f"{status.limbo_ready} messages came without a ring and wait in limbo",
            "start a worker, or run `celery shards declare`: a new generation takes them, in order",
        )
    if status.earlier:
        labels = _labels(status, status.earlier)
        yield Finding(
            "warning",
            "segments",
            f"not drained yet: {labels}; what was published later waits behind it",
            "none needed while workers run; a key that retries, or a shard without an owner, holds it up",
        )
    if status.dead_letters:
        yield Finding(
            "warning",
            "dead letters",
            f"{status.dead_letters} wait in {patient.names.dead}",
            f"list them with `celery shards dead-letters list {name}`, then replay or discard them",
        )
    if not (status.limbo_ready or status.earlier or status.dead_letters):
        yield Finding("ok", "backlog", "no dead letters, nothing in limbo or in earlier generations")


def check_clocks(patient: Patient) -> Iterator[Finding]:
    """Compare this host's clock with those of the workers, whose vitals come once a second."""
    found: dict[str, float] = {}
    rounds: set[str] = set()
    names = patient.names

    def note(body: bytes, offset: int) -> None:
        event = decode(body, stream=names.journal, offset=offset)
        vitals = None if event is None else Vitals.parse(event)
        if vitals is None:
            return
        if vitals.by in found:
            rounds.add(vitals.by)
        found[vitals.by] = vitals.at - time.time()

    if not any(row.owner or row.standbys or row.state == "stuck" for row in patient.status.rows):
        return
    connection = open_connection(patient.connect())
    try:
        Tail(connection, names.journal, "next", note)
        deadline = time.monotonic() + _VITALS_SECONDS
        while (left := deadline - time.monotonic()) > 0 and not rounds:
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=left)
    finally:
        close_connection(connection)
    wrong = {by: seconds for by, seconds in found.items() if abs(seconds) > _SKEW_SECONDS}
    for by, seconds in sorted(wrong.items()):
        side = "ahead of" if seconds > 0 else "behind"
        yield Finding(
            "error" if abs(seconds) > FRESH_SECONDS else "warning",
            "clocks",
            f"the clock of {by} is {abs(seconds):.1f} s {side} the clock here, so lags and owners are wrong",
            "synchronize the clocks of all hosts (NTP)",
        )
    if found and not wrong:
        yield Finding("ok", "clocks", f"the clocks of {len(found)} workers agree with this one")


def _labels(status: GroupStatus, rows: Sequence[ShardStatus]) -> str:
    return name_some([status.label(row) for row in rows])
