"""Claims in a database, through SQLAlchemy: SQLite, PostgreSQL, MySQL, MariaDB.

One row for each key. A claim inserts it; only if it exists, a second transaction locks it, decides and updates. Renew,
commit and release are one conditional update each, so they compare and set in one step. A step that fails because the
server has closed an idle connection is repeated on a new one, as `claims` allows.

On SQLite every transaction takes the write lock first (`BEGIN IMMEDIATE`), so processes of one host wait for each
other instead of failing. The clock is the database's; on SQLite that of its one host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

from sqlalchemy import (
    URL,
    BigInteger,
    Connection,
    Double,
    Engine,
    MetaData,
    bindparam,
    cast,
    create_engine,
    delete,
    event,
    inspect,
    make_url,
    select,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from celery_sharding.dedup import claims
from celery_sharding.dedup.claims import Claimed, Outcome, Record
from celery_sharding.dedup.owners import Owner
from celery_sharding.dedup.stores.records import from_fields, row_id, row_key, to_fields
from celery_sharding.dedup.stores.schema import (
    DIALECTS,
    POSTGRESQL_CLOCK,
    claim_metadata,
    claims_table,
    clock,
    insert_if_absent,
    read_clock,
    records_table,
    statement_clock,
)
from celery_sharding.dedup.stores.stepping import Step, SteppingStore, T
from celery_sharding.errors import NoUsableStore, StoreRefused, StoreUnavailable

__all__ = ["DatabaseStore", "claim_metadata", "claims_table", "open_engine"]

_metadata = MetaData()
_records = records_table(_metadata)
# Made once: that takes as long as a round trip. The other columns come from the parameters.
_INSERT_AT_ONCE = (
    postgresql.insert(_records)
    .values(
        lease_until=POSTGRESQL_CLOCK + bindparam("lease_seconds", type_=Double),
        expires_at=POSTGRESQL_CLOCK + bindparam("kept_seconds", type_=Double),
        fencing=cast(POSTGRESQL_CLOCK * 1_000_000, BigInteger),
    )
    .on_conflict_do_nothing()
    .returning(_records.c.fencing)
)
_CREATE_ATTEMPTS = 5
_SQLITE_WAIT_MS = 30_000
_PURGE_BATCH = 500


def open_engine(url: str | URL, options: Mapping[str, Any]) -> Engine:
    """Return an engine of our own for the database of the result backend.

    Raises:
        NoUsableStore: Claims cannot be kept in this kind of database, or it is private to one connection.
    """
    name = make_url(url).get_backend_name()
    if name not in DIALECTS:
        raise NoUsableStore(f"@deduplicate cannot keep claims in {name}; it can in {', '.join(DIALECTS)}", backend=name)
    if name == "sqlite":
        engine = create_engine(url, **options)
        database = engine.url.database or ":memory:"
        if ":memory:" in database or "mode=memory" in database or engine.url.query.get("mode") == "memory":
            raise NoUsableStore(
                "@deduplicate cannot keep claims in an SQLite database in memory, which is private to a connection; "
                "name a file in the URL of the result backend",
                backend=str(url),
            )
        _begin_immediately(engine)
        return engine
    # Each statement has to see what was committed while it waited for a lock.
    return create_engine(url, **{**options, "isolation_level": "READ COMMITTED"})


class DatabaseStore(SteppingStore):
    """A `ClaimStore` in a database. Makes its table at the first use. Do not carry it across a fork.

    Args:
        schema: That of the table; None: the database's default.
    """

    def __init__(self, engine: Engine, *, schema: str | None = None) -> None:
        if schema is not None:
            engine = engine.execution_options(schema_translate_map={None: schema})
        self._engine = engine
        self._schema = schema
        # On PostgreSQL a transaction of one statement takes twice as many round trips as the statement alone.
        is_postgresql = engine.dialect.name == "postgresql"
        self._alone = engine.execution_options(isolation_level="AUTOCOMMIT") if is_postgresql else engine
        self._lock = Lock()
        self._is_made = False

    def claim(
        self, key: str, *, owner: Owner, lease_seconds: float, ttl_seconds: float, evict: str | None = None
    ) -> Outcome:
        def insert(connection: Connection) -> Claimed | None:
            if connection.dialect.name == "postgresql":
                from_now = claims.claimed(
                    None, owner=owner, lease_seconds=lease_seconds, ttl_seconds=ttl_seconds, now=0.0
                )
                fencing = _insert_at_once(connection, key, from_now)
                return None if fencing is None else Claimed(owner.run_id, fencing)
            now = read_clock(connection)
            first = claims.claimed(None, owner=owner, lease_seconds=lease_seconds, ttl_seconds=ttl_seconds, now=now)
            is_new = insert_if_absent(connection, _records, _to_row(key, first))
            return Claimed(owner.run_id, first.fencing) if is_new else None

        return self._serve(key, insert, is_alone=True) or super().claim(
            key, owner=owner, lease_seconds=lease_seconds, ttl_seconds=ttl_seconds, evict=evict
        )

    def change(self, key: str, step: Step[T]) -> T:
        def work(connection: Connection) -> tuple[bool, T]:
            row = connection.execute(_select(key).with_for_update()).mappings().one_or_none()
            record, answer = step(None if row is None else from_fields(key, row), read_clock(connection))
            if record is None:
                return True, answer
            if row is None:
                return insert_if_absent(connection, _records, _to_row(key, record)), answer
            connection.execute(update(_records).where(_records.c.id == row_id(key)).values(**to_fields(record)))
            return True, answer

        while True:
            is_done, answer = self._serve(key, work)
            if is_done:
                return answer

    def discard(self, key: str) -> None:
        self._serve(key, lambda connection: connection.execute(delete(_records).where(_records.c.id == row_id(key))))

    def commit(self, key: str, token: str, *, result: bytes, ttl_seconds: float) -> bool:
        def step(connection: Connection) -> bool:
            now = clock(connection)
            changes = {"state": claims.DONE, "result": result, "lease_until": now, "expires_at": now + ttl_seconds}
            return _change(connection, key, token, (claims.RUNNING, claims.DONE), changes)

        return self._serve(key, step, is_alone=True)

    def release(self, key: str, token: str) -> bool:
        changes = {"state": claims.RELEASED, "token": None, "owner": None}
        states = (claims.RUNNING, claims.PARKED)
        return self._serve(key, lambda connection: _change(connection, key, token, states, changes), is_alone=True)

    def check(self) -> None:
        try:
            super().check()
        finally:
            # A worker checks before its pool forks; the children have connections of their own.
            self._engine.dispose()

    def purge(self) -> int:
        """Delete what has expired in batches, each a short transaction."""

        def step(connection: Connection) -> tuple[int, int]:
            now = read_clock(connection)
            expired = select(_records.c.id).where(_records.c.expires_at <= now).limit(_PURGE_BATCH)
            # One by one, by primary key and in order: locking rows in another order could deadlock with others that
            # purge, or with a claim that takes an expired row over.
            found = sorted(connection.scalars(expired).all())
            rows = (delete(_records).where(_records.c.id == name, _records.c.expires_at <= now) for name in found)
            return len(found), sum(connection.execute(row).rowcount for row in rows)

        total = 0
        while True:
            found, deleted = self._serve("", step)
            total += deleted
            if found < _PURGE_BATCH:
                return total

    def _hold(self, key: str, token: str, *, state: str, lease_seconds: float) -> bool:
        def step(connection: Connection) -> bool:
            lease_until = statement_clock(connection) + lease_seconds
            kept_seconds = _records.c.expires_at - _records.c.lease_until
            changes = {"expires_at": lease_until + kept_seconds, "lease_until": lease_until, "state": state}
            return _change(connection, key, token, (claims.RUNNING,), changes)

        return self._serve(key, step, is_alone=True)

    def _serve(self, key: str, step: Callable[[Connection], T], *, is_alone: bool = False) -> T:
        """Do `step` in a transaction of its own; `is_alone`: it changes something in one statement."""
        engine = self._alone if is_alone else self._engine
        try:
            self._make_table()
            try:
                with engine.begin() as connection:
                    return step(connection)
            except DBAPIError as exc:
                if not exc.connection_invalidated:
                    raise
            with engine.begin() as connection:
                return step(connection)
        except SQLAlchemyError as exc:
            if is_refusal(exc):
                raise StoreRefused(
                    f"the database refused the claim {key!r}: {_first_line(exc)}. Let its user create the table "
                    f"{self._table_name}, or create it and grant SELECT, INSERT, UPDATE and DELETE on it; "
                    "database_table_schemas={'task': …} names another schema",
                    key=key,
                ) from exc
            raise StoreUnavailable(
                f"the database did not serve the claim {key!r}: {type(exc).__name__}: {exc}", key=key
            ) from exc

    def _make_table(self) -> None:
        if self._is_made:
            return
        with self._lock:
            for attempt in range(_CREATE_ATTEMPTS):
                try:
                    _metadata.create_all(self._engine)
                    break
                except SQLAlchemyError:
                    # Another process may make it at the same moment: check and create are not one step.
                    if attempt + 1 == _CREATE_ATTEMPTS and not self._has_table():
                        raise
            self._is_made = True

    def _has_table(self) -> bool:
        return inspect(self._engine).has_table(_records.name, schema=self._schema)

    @property
    def _table_name(self) -> str:
        return _records.name if self._schema is None else f"{self._schema}.{_records.name}"


# How drivers report a missing right, a refused login, and a read-only database.
_SQLSTATES = ("42501", "3F000", "25006", "28000", "28P01")
_MYSQL_CODES = (1044, 1045, 1049, 1142, 1143, 1227, 1290, 1792, 1836)
_REFUSALS = ("readonly database", "unable to open database file", "password authentication failed", "permission denied")


def is_refusal(error: SQLAlchemyError) -> bool:
    """Say whether the database answered, and refuses to let claims be written."""
    found = getattr(error, "orig", None)
    if found is None:
        return False
    state = getattr(found, "sqlstate", None) or getattr(found, "pgcode", None)
    code = found.args[0] if found.args else None
    return state in _SQLSTATES or code in _MYSQL_CODES or any(text in str(found) for text in _REFUSALS)


def _first_line(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]


def _to_row(key: str, record: Record) -> dict[str, Any]:
    return {"id": row_id(key), "key": row_key(key), **to_fields(record)}


def _insert_at_once(connection: Connection, key: str, from_now: Record) -> int | None:
    """Insert a record whose times count from now, in one round trip; return its fencing token, None if it exists."""
    row = _to_row(key, from_now)
    del row["fencing"]
    row |= {"lease_seconds": row.pop("lease_until"), "kept_seconds": row.pop("expires_at")}
    return connection.execute(_INSERT_AT_ONCE, row).scalar_one_or_none()


def _change(connection: Connection, key: str, token: str, states: tuple[str, ...], changes: dict[str, Any]) -> bool:
    holder = (_records.c.id == row_id(key)) & (_records.c.token == token) & _records.c.state.in_(states)
    # In the order given: MySQL and MariaDB compute a column from the new values of those before it.
    return connection.execute(update(_records).where(holder).ordered_values(*changes.items())).rowcount == 1


def _select(key: str) -> Any:
    return select(_records).where(_records.c.id == row_id(key))


def _begin_immediately(engine: Engine) -> None:
    # The driver begins a transaction as a reader, which may then fail to become the writer.
    @event.listens_for(engine, "connect")
    def take_over_transactions(dbapi_connection: Any, _record: Any) -> None:
        dbapi_connection.isolation_level = None
        dbapi_connection.execute(f"PRAGMA busy_timeout = {_SQLITE_WAIT_MS}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
