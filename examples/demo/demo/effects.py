"""The effects of the events, and the verdict on them: lost, out of order, twice.

The verdict is read from the rows alone, in the order in which they were committed. It knows nothing of brokers.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from celery_sharding.dedup import claims_table


class Base(DeclarativeBase):
    """The tables of the demo, that of the claims among them."""


claims_table(Base.metadata)


class Effect(Base):
    """What an event did. `id` rises in the order of the commits, `position` is that of the event's first publish."""

    __tablename__ = "effects"

    id: Mapped[int] = mapped_column(primary_key=True)
    account: Mapped[str]
    event: Mapped[str] = mapped_column(index=True)
    position: Mapped[int]
    copy: Mapped[int]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many events had an effect, and what is wrong with them. `example` is the first case of disorder, in words."""

    events: int
    lost: int
    out_of_order: int
    duplicated: int
    example: str | None = None

    @property
    def is_clean(self) -> bool:
        return self.lost == self.out_of_order == self.duplicated == 0


@event.listens_for(Engine, "connect")
def prepare(connection: Any, _record: Any) -> None:
    """Let commits be cheap in all SQLite databases of this process, that of the claims included."""
    if not isinstance(connection, sqlite3.Connection):
        return
    # Survives the kill of a process, which is what is shown here, and not a power cut.
    connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA busy_timeout = 30000;")


@cache
def open_effects(path: Path) -> Engine:
    """Return the engine of the database at `path`, with its tables made. One for each process: call it after a fork."""
    return create_engine(f"sqlite:///{path}", connect_args={"timeout": 30})


def make_tables(path: Path) -> None:
    """Make the tables in the database at `path`."""
    engine = open_effects(path)
    Base.metadata.create_all(engine)


def read_verdict(path: Path, positions: Sequence[str]) -> Verdict:
    """Judge the effects at `path`; `positions` are the ids of all events in the order of their first publish."""
    with open_effects(path).connect() as connection:
        rows = connection.execute(select(Effect.account, Effect.event, Effect.position).order_by(Effect.id)).all()
    return judge(rows, positions)


def judge(rows: Iterable[Any], positions: Sequence[str]) -> Verdict:
    """Judge effects, (account, event, position) each, in the order in which they were committed.

    Out of order is an event whose first effect comes after that of a later event of its key; what a duplicate adds is
    counted as duplicated only.
    """
    runs: Counter[str] = Counter()
    last: dict[str, tuple[int, str]] = {}
    out_of_order = 0
    example = None
    for account, name, position in rows:
        runs[name] += 1
        if runs[name] > 1:
            continue
        before = last.get(account)
        if before is not None and before[0] > position:
            out_of_order += 1
            example = example or f"key {account}: event {name} (sent as no. {position}) after {before[1]} ({before[0]})"
            continue
        last[account] = (position, name)
    return Verdict(
        events=len(runs),
        lost=sum(1 for name in positions if name not in runs),
        out_of_order=out_of_order,
        duplicated=runs.total() - len(runs),
        example=example,
    )
