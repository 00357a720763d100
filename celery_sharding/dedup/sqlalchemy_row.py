"""The claims table of a SQLAlchemy session: its row is written in the session's transaction; see `claim_row`.

SQLite: the first statement takes the write lock, so begin here, before reading in the same transaction, and give the
engine a time-out above your longest transaction (`connect_args={"timeout": 30}`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Table, event, inspect, select, update
from sqlalchemy.exc import InternalError, OperationalError, ProgrammingError, SQLAlchemyError
from sqlalchemy.orm import Session

from celery_sharding.dedup.claim_row import ClaimRow, ClaimsTable
from celery_sharding.dedup.stores.schema import DIALECTS, default_claims_table, insert_if_absent, read_clock
from celery_sharding.errors import DeduplicationError


class SessionTable(ClaimsTable):
    """The claims table as `session` sees it, for the run that writes `row`. `table`: None for the default one."""

    def __init__(self, session: Session, row: ClaimRow, table: Table | None) -> None:
        self._session = session
        self._row = row
        self._id = row.id
        self._table = default_claims_table if table is None else table
        self._is_written = False

    @property
    def _connection(self) -> Connection:
        return self._session.connection()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        try:
            self._check_connection()
            yield
            self._session.commit()
        except BaseException as exc:
            self._session.rollback()
            if not self._is_written and isinstance(exc, OperationalError | ProgrammingError) and self._is_missing():
                raise DeduplicationError(
                    f"the database has no table {self._table.name!r}; add claims_table(Base.metadata) to your models "
                    "and migrate, or run claim_metadata.create_all(engine)",
                    key=self._row.key,
                ) from exc
            raise

    @contextmanager
    def guard(self) -> Iterator[None]:
        self._is_written = True
        session, began = self._session, self._session.get_transaction()
        with self._refuse_second_database(), self._refuse_late_statements():
            yield
            session.flush()
        if session.get_transaction() is not began or not session.is_active:
            raise DeduplicationError(
                f"the session was committed or rolled back inside claim.transaction() of {self._row.key!r}; the "
                "transaction commits by itself at the end of the block, or not at all if an error leaves it",
                key=self._row.key,
            )

    def read_clock(self) -> float:
        return read_clock(self._connection)

    def insert(self, columns: Mapping[str, Any]) -> bool:
        return insert_if_absent(self._connection, self._table, {"id": self._id, **columns})

    def replace_expired(self, columns: Mapping[str, Any], *, now: float) -> bool:
        rows = self._table.c
        expired = (rows.id == self._id) & (rows.expires_at <= now) & (rows.fencing < self._row.fencing)
        return self._connection.execute(update(self._table).where(expired).values(**columns)).rowcount == 1

    def lock(self) -> tuple[float, bytes | None] | None:
        rows = self._table.c
        found = select(rows.expires_at, rows.result).where(rows.id == self._id).with_for_update()
        row = self._connection.execute(found).one_or_none()
        return None if row is None else (row.expires_at, row.result)

    def finish(self, result: bytes | None) -> bool:
        rows, connection = self._table.c, self._connection
        mine = (rows.id == self._id) & (rows.token == self._row.token)
        try:
            if result is not None:
                connection.execute(update(self._table).where(mine).values(result=result))
            return connection.execute(select(rows.token).where(mine)).one_or_none() is not None
        except InternalError as exc:
            raise self.rolled_back() from exc

    def rolled_back(self) -> DeduplicationError:
        return DeduplicationError(
            f"the database rolled the transaction of {self._row.key!r} back: an error of it was caught inside. Nothing "
            "of it stands. Put what may fail into `with session.begin_nested():`, or let the error leave the block",
            key=self._row.key,
        )

    def _check_connection(self) -> None:
        """Refuse a database that is not known, and a connection that commits each statement by itself.

        There is no one way to ask for the latter; these are the drivers' own, before the first statement of a
        transaction.
        """
        key, connection = self._row.key, self._connection
        if connection.dialect.name not in DIALECTS:
            raise DeduplicationError(
                f"claim.transaction() does not know {connection.dialect.name}; it works with {', '.join(DIALECTS)}",
                key=key,
            )
        driver: Any = connection.connection.driver_connection
        if hasattr(driver, "get_autocommit"):  # PyMySQL, mysqlclient
            commits_each = driver.get_autocommit()
        elif hasattr(driver, "isolation_level") and hasattr(driver, "in_transaction"):  # sqlite3
            commits_each = driver.isolation_level is None and not driver.in_transaction
        else:  # psycopg, psycopg2 and others
            commits_each = getattr(driver, "autocommit", False)
        if commits_each is True:
            raise DeduplicationError(
                f"claim.transaction() of {key!r} needs a transaction, but this engine has isolation_level AUTOCOMMIT; "
                "give it a session of another one",
                key=key,
            )

    @contextmanager
    def _refuse_second_database(self) -> Iterator[None]:
        """Refuse that the session begins on a second database meanwhile, unless it commits both in two phases.

        What it had begun before is not seen: SQLAlchemy has no public way to ask a session for its connections.
        """
        session, engine = self._session, self._connection.engine
        others: list[str] = []

        def note(_session: Session, _transaction: Any, begun: Connection) -> None:
            if begun.engine is not engine:
                others.append(begun.engine.url.render_as_string(hide_password=True))

        event.listen(session, "after_begin", note)
        try:
            yield
        finally:
            event.remove(session, "after_begin", note)
        if others and not session.twophase:
            raise DeduplicationError(
                f"the session of claim.transaction() of {self._row.key!r} has written to a second database, "
                f"{others[0]}, which commits by itself; keep the effects in the database of the claims table, or use "
                "Session(twophase=True)",
                key=self._row.key,
            )

    @contextmanager
    def _refuse_late_statements(self) -> Iterator[None]:
        """Refuse statements after SQLite has ended the transaction by itself: with a driver that begins none, each of
        them would commit at once.
        """
        connection = self._connection
        if connection.dialect.name != "sqlite":
            yield
            return

        def check(begun: Connection, *_: Any) -> None:
            driver: Any = begun.connection.driver_connection
            if not getattr(driver, "in_transaction", True):
                raise self.rolled_back()

        event.listen(connection, "before_cursor_execute", check)
        try:
            yield
        finally:
            event.remove(connection, "before_cursor_execute", check)

    def _is_missing(self) -> bool:
        try:
            return not inspect(self._session.get_bind().engine).has_table(self._table.name, schema=self._table.schema)
        except SQLAlchemyError:
            return False
