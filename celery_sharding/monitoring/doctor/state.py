"""Checks of how a group is doing: owners, backlog, dead letters, and the clocks that they depend on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from celery_sharding.monitoring.doctor.finding import Finding, Patient, Severity
from celery_sharding.monitoring.health import name_some
from celery_sharding.monitoring.ownership import FRESH_SECONDS, listen_for_vitals
from celery_sharding.monitoring.shard_state import STATES
from celery_sharding.monitoring.status import GroupStatus, ShardStatus
from celery_sharding.rabbitmq.connect import close_connection, open_connection

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
        text = "the whole group is paused" if status.paused else f"paused: {_labels(status, paused)}"
        fix = f"`celery shards resume {status.name}` resumes it"
        yield Finding("note", "paused", text, fix)


def check_backlog(patient: Patient) -> Iterator[Finding]:
    status, name = patient.status, patient.group.name
    if status.generation and status.limbo_ready:
        text = f"{status.limbo_ready} messages came without a ring and wait in limbo"
        fix = "start a worker, or run `celery shards declare`: a new generation takes them, in order"
        yield Finding("error", "limbo", text, fix)
    if status.earlier:
        labels = _labels(status, status.earlier)
        text = f"not drained yet: {labels}; what was published later waits behind it"
        fix = "none needed while workers run; a key that retries, or a shard without an owner, holds it up"
        yield Finding("warning", "segments", text, fix)
    if status.dead_letters:
        text = f"{status.dead_letters} wait in {patient.names.dead}"
        fix = f"list them with `celery shards dead-letters list {name}`, then replay or discard them"
        yield Finding("warning", "dead letters", text, fix)
    if not (status.limbo_ready or status.earlier or status.dead_letters):
        yield Finding("ok", "backlog", "no dead letters, nothing in limbo or in earlier generations")


def check_clocks(patient: Patient) -> Iterator[Finding]:
    """Compare this host's clock with those of the workers, whose vitals come once a second."""
    if not any(row.owner or row.standbys or row.state == "stuck" for row in patient.status.rows):
        return
    found: dict[str, float] = {}
    connection = open_connection(patient.connect())
    try:
        for vitals in listen_for_vitals(connection, patient.names, seconds=_VITALS_SECONDS):
            if vitals.by in found:
                break  # all have been heard once
            found[vitals.by] = vitals.at - time.time()
    finally:
        close_connection(connection)
    wrong = {by: seconds for by, seconds in found.items() if abs(seconds) > _SKEW_SECONDS}
    for by, seconds in sorted(wrong.items()):
        side = "ahead of" if seconds > 0 else "behind"
        text = f"the clock of {by} is {abs(seconds):.1f} s {side} the clock here, so lags and owners are wrong"
        fix = "synchronize the clocks of all hosts (NTP)"
        yield Finding("error" if abs(seconds) > FRESH_SECONDS else "warning", "clocks", text, fix)
    if found and not wrong:
        yield Finding("ok", "clocks", f"the clocks of {len(found)} workers agree with this one")


def _labels(status: GroupStatus, rows: Sequence[ShardStatus]) -> str:
    return name_some([status.label(row) for row in rows])
