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
        DeduplicationError: The table is missing; the session's transaction was ended inside, by whomever; or it is no
            single transaction.
    """
    from celery_sharding.dedup.stores.schema import default_claims_table

    rows = default_claims_table if table is None else table
    effects = Effects(result)
    try:
        connection = session.connection()
        began = session.get_transaction()
        _check_begins(connection, key)
        _write_row(connection, rows, key=key, token=token, fencing=fencing, ttl_seconds=ttl_seconds)
        with _one_database(session, connection, key), _one_transaction(connection, key):
            yield effects
            session.flush()
        if session.get_transaction() is not began or not session.is_active:
            raise DeduplicationError(
                f"the session was committed or rolled back inside claim.transaction() of {key!r}; the transaction "
                "commits by itself at the end of the block, or not at all if an error leaves it",
                key=key,
            )
        stored = None if effects.result is None else encode(effects.result)
        _finish_row(connection, rows, key, token, stored)
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
            # Locked, so that what another run has just committed is seen at any isolation level.
            row = (
                connection.execute(select(rows).where(rows.c.id == identity).with_for_update()).mappings().one_or_none()
            )
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


def _finish_row(connection: Connection, rows: Table, key: str, token: str, result: bytes | None) -> None:
    """Store the result, and see that the row is still there: that what was written with it is, too.

    A database may have rolled back by itself (a deadlock, a trigger), and PostgreSQL refuses everything after an error
    but answers a commit as if nothing were wrong. If the task has caught the error, nobody else would notice.
    """
    from sqlalchemy import select, update
    from sqlalchemy.exc import InternalError

    mine = (rows.c.id == row_id(key)) & (rows.c.token == token)
    cause: Exception | None = None
    try:
        if result is not None:
            connection.execute(update(rows).where(mine).values(result=result))
        if connection.execute(select(rows.c.token).where(mine)).one_or_none() is not None:
            return
    except InternalError as exc:
        cause = exc
    raise _rolled_back(key) from cause


def _rolled_back(key: str) -> DeduplicationError:
    return DeduplicationError(
        f"the database has rolled the transaction of {key!r} back: an error of it was caught inside. Nothing of it "
        "stands. Put what may fail into `with session.begin_nested():`, or let the error leave the block",
        key=key,
    )


def _check_begins(connection: Connection, key: str) -> None:
    """Refuse a connection that commits each statement by itself.

    There is no one way to ask; these are the drivers' own, before the first statement of a transaction.
    """
    driver: Any = connection.connection.driver_connection
    if hasattr(driver, "get_autocommit"):  # PyMySQL, mysqlclient
        commits_each = driver.get_autocommit()
    elif hasattr(driver, "isolation_level") and hasattr(driver, "in_transaction"):  # sqlite3
        commits_each = driver.isolation_level is None and not driver.in_transaction
    else:  # psycopg, psycopg2 and others
        commits_each = getattr(driver, "autocommit", False)
    if commits_each is True:
        raise DeduplicationError(
            f"claim.transaction() of {key!r} needs a transaction, but this engine has isolation_level AUTOCOMMIT; give "
            "it a session of another one",
            key=key,
        )


@contextmanager
def _one_database(session: Session, connection: Connection, key: str) -> Iterator[None]:
    """Refuse that the session begins on a second database meanwhile, unless it commits both in two phases.

    What it had begun before is not seen: SQLAlchemy has no public way to ask a session for its connections.
    """
    from sqlalchemy import event

    others: list[str] = []

    def note(_session: Session, _transaction: Any, begun: Connection) -> None:
        if begun.engine is not connection.engine:
            others.append(begun.engine.url.render_as_string(hide_password=True))

    event.listen(session, "after_begin", note)
    try:
        yield
    finally:
        event.remove(session, "after_begin", note)
    if others and not session.twophase:
        raise DeduplicationError(
            f"the session of claim.transaction() of {key!r} has written to a second database, {others[0]}, which "
            "commits by itself; keep the effects in the database of the claims table, or use Session(twophase=True)",
            key=key,
        )


@contextmanager
def _one_transaction(connection: Connection, key: str) -> Iterator[None]:
    """Refuse statements after SQLite has ended the transaction by itself: with a driver that begins none, each of them
    would commit at once.
    """
    from sqlalchemy import event

    if connection.dialect.name != "sqlite":
        yield
        return

    def check(begun: Connection, *_: Any) -> None:
        driver: Any = begun.connection.driver_connection
        if not getattr(driver, "in_transaction", True):
            raise _rolled_back(key)

    event.listen(connection, "before_cursor_execute", check)
    try:
        yield
    finally:
        event.remove(connection, "before_cursor_execute", check)


def _is_missing(connection: Connection, rows: Table) -> bool:
    from sqlalchemy import inspect
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return not inspect(connection.engine).has_table(rows.name, schema=rows.schema)
    except SQLAlchemyError:
        return False
