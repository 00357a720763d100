"""The ledger of a soak: a row for each message, written in the transaction of its claim."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Engine, Integer, MetaData, Table, Text, create_engine, event, insert, select
from sqlalchemy.orm import Session

from celery_sharding.dedup import claims_table

metadata = MetaData()
entries = Table(
    "ledger", metadata, Column("id", Integer, primary_key=True), Column("key", Text), Column("number", Integer)
)
claims_table(metadata)


def create_ledger(folder: Path) -> None:
    """Make the tables."""
    metadata.create_all(_open(folder, os.getpid()))


def begin_session(folder: Path) -> Session:
    """Return a session of this process, which may be a forked one."""
    return Session(_open(folder, os.getpid()))


def enter(session: Session, key: str, number: int) -> None:
    """Add a row."""
    session.execute(insert(entries).values(key=key, number=number))


def read_entries(folder: Path) -> Iterator[tuple[str, int]]:
    """Return (key, number) of all rows, in the order in which they were committed."""
    with begin_session(folder) as session:
        rows = session.execute(select(entries.c.key, entries.c.number).order_by(entries.c.id))
        yield from ((key, number) for key, number in rows)


@cache
def _open(folder: Path, process: int) -> Engine:
    """Return the engine of `process`: one engine does not serve two."""
    engine = create_engine(f"sqlite:///{folder / 'ledger.db'}", connect_args={"timeout": 30})

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        # Survives the kill of a process, which is what happens here, and not a power cut.
        connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF;")

    return engine
