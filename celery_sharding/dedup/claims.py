"""The life of a claim, and what a store must do to keep it.

A claim is the record of one dedup key. These are its states; each arrow is one atomic step of the store, and the names
beside the arrows say who may take it:

                 claim (anybody)                 commit (holder)
    absent ──────────────────────▶ running ─────────────────────────▶ done ──▶ absent
                                   │ ▲ │ ▲                                TTL
             park (holder: its run │ │ │ │ claim (anybody, if the lease has lapsed;
             will be retried)      │ │ │ │        with `evict`, if the holder is provably gone)
                                   ▼ │ │ └──┐
                                 parked│    │
             claim (same task id) ──┘  │ release (holder: it failed)
                                       ▼    │
                                   released ┘ claim (anybody)

A parked claim also goes to anybody once its lease has lapsed, and its holder may release it. A failure to be remembered
is committed like a result. An operator may `forget` any record, which makes it released; a held one only by force.

The *holder* is whoever presents the token of the record: renew, park, commit and release compare it and change the
record in one step, so a run that lost the claim can change nothing. Commit and claim may be repeated with the same
token, because a store's answer can be lost on its way.

Each claim gets a *fencing* token greater than all before it for this key: the last one plus one, or the store's clock
in microseconds if that is larger. So it rises even when the record has expired in between.

Only the store's clock judges leases and expiry; a task's machine may be wrong about the time.

`decide` and the functions after it are this state machine in Python, pure, for the stores without scripts on a server.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from celery_sharding.dedup.owners import Owner, new_owner

VERSION = 1
RUNNING, PARKED, RELEASED, DONE = "running", "parked", "released", "done"
STATES = (RUNNING, PARKED, RELEASED, DONE)


class StoreClock(Protocol):
    """A store's clock."""

    def __call__(self) -> float:
        """Return the time in seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Claimed:
    token: str
    fencing: int


@dataclass(frozen=True, slots=True)
class Running:
    """Another run holds the claim. `parked`: it waits for its retry, in no process."""

    token: str
    owner: Owner
    lease_left_seconds: float
    parked: bool


@dataclass(frozen=True, slots=True)
class Done:
    result: bytes


Outcome = Claimed | Running | Done


@dataclass(frozen=True, slots=True)
class Record:
    """A claim as it is stored. Times are seconds of the store's clock; `owner` and `token` are None when released."""

    state: str
    token: str | None
    fencing: int
    owner: Owner | None
    lease_until: float
    expires_at: float
    attempts: int
    result: bytes | None


@dataclass(frozen=True, slots=True)
class Shown:
    """A claim as people see it. `lease_left_seconds` is below 0 for a lapsed lease, None if there is none.

    `owner` is the holder, if any; `task_id` is that of the run that holds it or has done the work.
    """

    key: str
    state: str
    owner: Owner | None
    task_id: str | None
    fencing: int
    attempts: int
    lease_left_seconds: float | None
    expires_in_seconds: float
    result_bytes: int | None


class ClaimStore(Protocol):
    """Where claims are kept. All methods are atomic, and safe from any thread and process.

    They raise `StoreUnavailable` if the store did not answer (it may have acted), `StoreRefused` if it refused, and
    `DamagedRecord` if the record cannot be read, or was written by a newer version of this library.

    Attributes:
        caveat: Why claims may be lost here; a worker logs it when it starts. None if they are safe.
        is_of_one_process: Other processes do not see these claims.
    """

    caveat: str | None = None
    is_of_one_process: bool = False

    def claim(
        self, key: str, *, owner: Owner, lease_seconds: float, ttl_seconds: float, evict: str | None = None
    ) -> Outcome:
        """Reserve `key` for `owner`, whose `run_id` becomes the token.

        Args:
            key: Non-empty. Equal keys mean the same work.
            owner: The run that wants the claim.
            lease_seconds: Life of a claim that nobody renews.
            ttl_seconds: How long the record is kept beyond that.
            evict: The token of a holder that is provably gone; its lease counts as lapsed.
        """

    def renew(self, key: str, token: str, *, lease_seconds: float) -> bool:
        """Let the lease end `lease_seconds` from now. False: the claim no longer runs under `token`."""

    def park(self, key: str, token: str, *, lease_seconds: float) -> bool:
        """Keep the claim for a retry of the same task id within `lease_seconds`. False: it is not `token`'s."""

    def commit(self, key: str, token: str, *, result: bytes, ttl_seconds: float) -> bool:
        """Mark the work done and keep `result` for `ttl_seconds`. False: not `token`'s claim; nothing changed."""

    def release(self, key: str, token: str) -> bool:
        """Give the claim up undone. False: it is not `token`'s; nothing changed."""

    def show(self, key: str) -> Shown | None:
        """Return the record of `key` for people to read, None if there is none."""

    def forget(self, key: str, *, force: bool) -> bool:
        """Let the next claim of `key` run, even if the work is done; the fencing token stays. For operators.

        Args:
            force: Also forget a held claim, whose commit is then refused, and delete a record that cannot be read.

        Returns:
            False: It is held, running or parked, and nothing changed. True also if there was no record.
        """

    def check(self) -> None:
        """Try every step of a claim on a key of its own, and leave nothing behind.

        Raises:
            StoreRefused: Claims cannot be written; the message names what is missing.
        """
        owner = new_owner("check")
        key = f"celery-sharding:check:{owner.run_id}"
        self.claim(key, owner=owner, lease_seconds=1.0, ttl_seconds=1.0)
        self.renew(key, owner.run_id, lease_seconds=1.0)
        self.commit(key, owner.run_id, result=b"", ttl_seconds=0.001)

    def purge(self) -> int:
        """Delete the expired records, and return how many; 0 where the store does so by itself."""
        return 0


def decide(record: Record | None, *, owner: Owner, evict: str | None, now: float) -> Running | Done | None:
    """Return what keeps `owner` from the claim, None if nothing does. Stores have checked the record."""
    if record is None or record.expires_at <= now or record.state == RELEASED:
        return None
    if record.state == DONE:
        assert record.result is not None
        return Done(record.result)
    assert record.token is not None
    assert record.owner is not None
    parked = record.state == PARKED
    if record.token in (owner.run_id, evict) or record.lease_until <= now:
        return None
    if parked and record.owner.task_id == owner.task_id:
        return None
    return Running(record.token, record.owner, record.lease_until - now, parked)


def claimed(record: Record | None, *, owner: Owner, lease_seconds: float, ttl_seconds: float, now: float) -> Record:
    """Return the record after `owner` has claimed what `decide` found free."""
    again = record is not None and record.token == owner.run_id and record.state == RUNNING
    fencing = next_fencing(0 if record is None else record.fencing, now=now)
    attempts = 1 if record is None or record.expires_at <= now else record.attempts + 1
    return Record(
        state=RUNNING,
        token=owner.run_id,
        fencing=record.fencing if again and record is not None else fencing,
        owner=owner,
        lease_until=now + lease_seconds,
        expires_at=now + lease_seconds + ttl_seconds,
        attempts=record.attempts if again and record is not None else attempts,
        result=None,
    )


def held(record: Record, *, state: str, lease_seconds: float, now: float) -> Record:
    """Return the record after its holder renewed (`RUNNING`) or parked (`PARKED`) it."""
    kept_seconds = record.expires_at - record.lease_until
    return replace(record, state=state, lease_until=now + lease_seconds, expires_at=now + lease_seconds + kept_seconds)


def committed(record: Record, *, result: bytes, ttl_seconds: float, now: float) -> Record:
    return replace(record, state=DONE, lease_until=now, expires_at=now + ttl_seconds, result=result)


def released(record: Record) -> Record:
    """Return the record after its holder gave it up; the fencing token stays."""
    return replace(record, state=RELEASED, token=None, owner=None)


def forgotten(record: Record) -> Record:
    """Return the record after an operator has made it forget its holder or its result."""
    return replace(record, state=RELEASED, token=None, owner=None, result=None)


def is_held(record: Record, *, now: float) -> bool:
    """Say whether a lease keeps others out: that of a run, or of one that waits for its retry."""
    return record.state in (RUNNING, PARKED) and record.lease_until > now and record.expires_at > now


def next_fencing(last: int, *, now: float) -> int:
    """Return a fencing token greater than `last`, and than those of records that have expired."""
    return max(last + 1, int(now * 1_000_000))


def shown(key: str, record: Record, *, now: float) -> Shown:
    is_held = record.state in (RUNNING, PARKED)
    return Shown(
        key=key,
        state=record.state,
        owner=record.owner if is_held else None,
        task_id=None if record.owner is None else record.owner.task_id,
        fencing=record.fencing,
        attempts=record.attempts,
        lease_left_seconds=record.lease_until - now if is_held else None,
        expires_in_seconds=record.expires_at - now,
        result_bytes=None if record.result is None else len(record.result),
    )
