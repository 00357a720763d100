"""The two tables of claims, and the clock and the statements that differ between databases.

`celery_sharding_dedup` is the library's own, in the database of the result backend; `DatabaseStore` makes it.
`celery_sharding_claims` is in the *user's* database, beside the rows that tasks write; the user's migrations make it.
Both may be in one database, so the names differ.

The primary key is the SHA-256 of a key, beside the key itself: databases may ignore case, cut text, or limit the length
of an index.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    cast,
    extract,
    func,
    literal_column,
    select,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite

DIALECTS = ("sqlite", "postgresql", "mysql", "mariadb")
_RESULT_BYTES_MAX = 16 * 1024 * 1024 - 1
# Whatever the server's defaults: keys are any text, and a claim needs transactions.
_MYSQL: dict[str, Any] = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mariadb_engine": "InnoDB",
    "mariadb_charset": "utf8mb4",
}


def claims_table(metadata: MetaData, name: str = "celery_sharding_claims") -> Table:
    """Add the table that `claim.transaction` writes to `metadata` and return it.

    Add it to the metadata of your own tables, so that `create_all` or your migrations make it with them. A table of
    another name is passed on as `claim.transaction(session, table=…)`.
    """
    return Table(
        name,
        metadata,
        Column("id", String(64), primary_key=True),
        Column("key", Text, nullable=False),
        Column("token", String(64), nullable=False),
        Column("fencing", BigInteger, nullable=False),
        Column("expires_at", Double, nullable=False, index=True),
        Column("result", LargeBinary(_RESULT_BYTES_MAX)),
        **_MYSQL,
    )


def records_table(metadata: MetaData) -> Table:
    return Table(
        "celery_sharding_dedup",
        metadata,
        Column("id", String(64), primary_key=True),
        Column("key", Text, nullable=False),
        Column("version", Integer, nullable=False),
        Column("state", String(16), nullable=False),
        Column("token", String(64)),
        Column("fencing", BigInteger, nullable=False),
        Column("owner", Text),
        Column("lease_until", Double, nullable=False),
        Column("expires_at", Double, nullable=False, index=True),
        Column("attempts", Integer, nullable=False),
        Column("result", LargeBinary(_RESULT_BYTES_MAX)),
        **_MYSQL,
    )


claim_metadata = MetaData()
"""Metadata with only the claims table, for `claim_metadata.create_all(engine)`."""
default_claims_table = claims_table(claim_metadata)


POSTGRESQL_CLOCK = cast(extract("epoch", func.clock_timestamp()), Double)
_POSTGRESQL_STATEMENT_CLOCK = cast(extract("epoch", func.statement_timestamp()), Double)
# In UTC: local times come twice when clocks are put back.
_MYSQL_CLOCK = literal_column("(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6)) / 1e6)", Double)


def clock(connection: Connection) -> Any:
    """Return the database's time in seconds as part of a statement, which saves a round trip.

    SQLite has no clock: there it is the time of its one host, as a float.
    """
    name = connection.dialect.name
    if name == "sqlite":
        return time.time()
    return POSTGRESQL_CLOCK if name == "postgresql" else _MYSQL_CLOCK


def statement_clock(connection: Connection) -> Any:
    """Return the time at which the statement began, the same everywhere in it; except on PostgreSQL, as `clock`."""
    return _POSTGRESQL_STATEMENT_CLOCK if connection.dialect.name == "postgresql" else clock(connection)


def read_clock(connection: Connection) -> float:
    now = clock(connection)
    return now if isinstance(now, float) else float(connection.execute(select(now)).scalar_one())


def insert_if_absent(connection: Connection, table: Table, values: dict[str, Any]) -> bool:
    """Insert a row unless its primary key exists, after any transaction that is inserting it. False: it exists."""
    name = connection.dialect.name
    if name in ("mysql", "mariadb"):
        # Not INSERT IGNORE, which leaves all that waited with a shared lock on the row: two of them that go on to
        # change it deadlock. This takes a write lock, and sets lastrowid only if the row existed.
        statement = mysql.insert(table).values(**values)
        unchanged = table.c.fencing + 0 * func.last_insert_id(1)
        return not connection.execute(statement.on_duplicate_key_update(fencing=unchanged)).lastrowid
    insert = postgresql.insert if name == "postgresql" else sqlite.insert
    # The row count of an INSERT goes with its cursor (psycopg 3 then says -1) unless it is preserved.
    done = connection.execute(
        insert(table).values(**values).on_conflict_do_nothing(), execution_options={"preserve_rowcount": True}
    )
    return done.rowcount == 1
