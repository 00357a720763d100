"""The effects of a task and its claim in one transaction of the user's database.

The row of the claims table is written in the transaction of the user's own rows, so both are committed or neither is:
a run that is killed at any instruction leaves either nothing or everything. The primary key lets one run through; the
others wait for its commit and then find the row. That row is the authority on "done", whatever the claim store says:

    no row, or an expired one      this run goes on, and the row commits with its effects
    a row that lives               another run has committed: `AlreadyDone` ends this one with the row's result
    an expired row of a later run  this run is stale: `ClaimLost`

SQLite: the first statement takes the write lock, so begin here, before reading in the same transaction, and give the
engine a time-out above your longest transaction (`connect_args={"timeout": 30}`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from celery_sharding.dedup.stores.records import row_id, row_key
from celery_sharding.errors import ClaimLost, DeduplicationError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Table
    from sqlalchemy.orm import Session


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


@contextmanager
def commit_with_effects(
    session: Session,
    *,
    key: str,
    token: str,
    fencing: int,
    ttl_seconds: float,
    table: Table | None,
    result: Any,
    encode: Callable[[Any], bytes],
) -> Iterator[Effects]:
    """Write the row of the claim, let the caller write, commit both; roll both back on any error.

    Raises:
        AlreadyDone: Another run has committed.
        ClaimLost: A later run had it, and the row has expired since.
        DeduplicationError: The table is missing, or the session was committed or rolled back inside.
    """
    from celery_sharding.dedup.stores.schema import default_claims_table

    rows = default_claims_table if table is None else table
    effects = Effects(result)
    try:
        connection = session.connection()
        began = session.get_transaction()
        _write_row(connection, rows, key=key, token=token, fencing=fencing, ttl_seconds=ttl_seconds)
        yield effects
        if session.get_transaction() is not began or not session.is_active:
            raise DeduplicationError(
                f"the session was committed or rolled back inside claim.transaction() of {key!r}; the transaction "
                "commits by itself at the end of the block, or not at all if an error leaves it",
                key=key,
            )
        session.flush()
        if effects.result is not None:
            _store_result(connection, rows, key, encode(effects.result))
        session.commit()
    except BaseException:
        session.rollback()
        raise


def _write_row(connection: Connection, rows: Table, *, key: str, token: str, fencing: int, ttl_seconds: float) -> None:
    from sqlalchemy import select, update
    from sqlalchemy.exc import OperationalError, ProgrammingError

    from celery_sharding.dedup.stores.schema import DIALECTS, insert_if_absent, read_clock

    if connection.dialect.name not in DIALECTS:
        raise DeduplicationError(
            f"claim.transaction() does not know {connection.dialect.name}; it works with {', '.join(DIALECTS)}", key=key
        )
    identity = row_id(key)
    try:
        now = read_clock(connection)
        values = {
            "key": row_key(key),
            "token": token,
            "fencing": fencing,
            "expires_at": now + ttl_seconds,
            "result": None,
        }
        while not insert_if_absent(connection, rows, {"id": identity, **values}):
            expired = (rows.c.id == identity) & (rows.c.expires_at <= now) & (rows.c.fencing < fencing)
            if connection.execute(update(rows).where(expired).values(**values)).rowcount == 1:
                return
            row = connection.execute(select(rows).where(rows.c.id == identity)).mappings().one_or_none()
            if row is None:
                continue  # Deleted between the statements.
            if row["expires_at"] > now:
                raise AlreadyDone(row["result"])
            raise ClaimLost(f"a later run of {key!r} has committed; the effects of this one were rolled back", key=key)
    except (OperationalError, ProgrammingError) as exc:
        if _is_missing(connection, rows):
            raise DeduplicationError(
                f"the database has no table {rows.name!r}; add claims_table(Base.metadata) to your models and migrate, "
                "or run claim_metadata.create_all(engine)",
                key=key,
            ) from exc
        raise


def _store_result(connection: Connection, rows: Table, key: str, data: bytes) -> None:
    from sqlalchemy import update

    connection.execute(update(rows).where(rows.c.id == row_id(key)).values(result=data))


def _is_missing(connection: Connection, rows: Table) -> bool:
    from sqlalchemy import inspect
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return not inspect(connection.engine).has_table(rows.name, schema=rows.schema)
    except SQLAlchemyError:
        return False
