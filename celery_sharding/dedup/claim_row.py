"""The effects of a task and its claim in one transaction of the user's database.

The row of the claims table is written in the transaction of the user's own rows, so both are committed or neither is:
a run that is killed at any instruction leaves either nothing or everything. The primary key lets one run through; the
others wait for its commit and then find the row. That row is the authority on "done", whatever the claim store says:

    no row, or an expired one      this run goes on, and the row commits with its effects
    a row that lives               another run has committed: `AlreadyDone` ends this one with the row's result
    an expired row of a later run  this run is stale: `ClaimLost`

The algorithm is here; `sqlalchemy_row` and `django_row` are the two kinds of `ClaimsTable` it works on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from celery_sharding.dedup.results import ResultCodec
from celery_sharding.dedup.stores.records import row_id, row_key
from celery_sharding.errors import ClaimLost, DeduplicationError


class AlreadyDone(BaseException):
    """Ends a run whose effects another run has committed. Not an `Exception`, so that tasks do not catch it.

    `result` is what that run stored with its effects, None if nothing.
    """

    def __init__(self, result: bytes | None) -> None:
        super().__init__("another run has committed this work")
        self.result = result


class Effects:
    """The open transaction. Assign `result` to store a value with the effects, for duplicates of this run."""

    def __init__(self, result: Any) -> None:
        self.result = result


@dataclass(frozen=True, slots=True)
class ClaimRow:
    """What a run writes into its row. `fencing` orders the runs of a key; `ttl_seconds` is how long the row counts."""

    key: str
    token: str
    fencing: int
    ttl_seconds: float

    @property
    def id(self) -> str:
        return row_id(self.key)

    def to_columns(self, *, now: float) -> dict[str, Any]:
        """Return the columns beside the primary key; `now` is the database's time."""
        return {
            "key": row_key(self.key),
            "token": self.token,
            "fencing": self.fencing,
            "expires_at": now + self.ttl_seconds,
            "result": None,
        }


class ClaimsTable(Protocol):
    """A claims table in a database of the user's, for one run and its row."""

    def transaction(self) -> AbstractContextManager[None]:
        """Begin a transaction, commit it at the end of the block, and roll it back on any error.

        Raises:
            DeduplicationError: This connection cannot do so, or the table is missing.
        """

    def guard(self) -> AbstractContextManager[None]:
        """Refuse, while the task writes, whatever would end the transaction early or commit past it."""

    def read_clock(self) -> float:
        """Return the database's time in seconds."""

    def insert(self, columns: Mapping[str, Any]) -> bool:
        """Insert the row, after any transaction that is inserting it. False: it exists."""

    def replace_expired(self, columns: Mapping[str, Any], *, now: float) -> bool:
        """Write over a row of an earlier run that has expired. False: there is none."""

    def lock(self) -> tuple[float, bytes | None] | None:
        """Lock the row, and return when it expires, and its result; None: it was deleted meanwhile.

        Locked, so that what another run has just committed is seen at any isolation level.
        """

    def finish(self, result: bytes | None) -> bool:
        """Store the result, and say whether the row is still there: whether what was written with it is, too.

        A database may have rolled back by itself (a deadlock, a trigger), and PostgreSQL refuses everything after an
        error but answers a commit as if nothing were wrong. If the task has caught the error, nobody else would notice.
        """

    def rolled_back(self) -> DeduplicationError:
        """Return the error for a transaction of which nothing stands any more."""


@contextmanager
def commit_with_effects(table: ClaimsTable, row: ClaimRow, *, result: Any, results: ResultCodec) -> Iterator[Effects]:
    """Write the row of the claim, let the caller write, commit both; roll both back on any error.

    Raises:
        AlreadyDone: Another run has committed.
        ClaimLost: A later run had it, and the row has expired since.
        DeduplicationError: The table is missing; the transaction was ended inside, by whomever; or it is no single
            transaction.
    """
    effects = Effects(result)
    with table.transaction():
        _write(table, row)
        with table.guard():
            yield effects
        stored = None if effects.result is None else results.encode(effects.result)
        if not table.finish(stored):
            raise table.rolled_back()


def _write(table: ClaimsTable, row: ClaimRow) -> None:
    now = table.read_clock()
    columns = row.to_columns(now=now)
    while not table.insert(columns):
        if table.replace_expired(columns, now=now):
            return
        found = table.lock()
        if found is None:
            continue
        expires_at, result = found
        if expires_at > now:
            raise AlreadyDone(result)
        raise ClaimLost(
            f"a later run of {row.key!r} has committed; the effects of this one were rolled back", key=row.key
        )
