"""Kills a task after each of its database statements in turn: python dedup_killed_process.py FOLDER

Prints one line for each kill and, last, how many there were. Exits 1 if any of them left not exactly one effect.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from celery import Celery
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, event, func, insert, select
from sqlalchemy.orm import Session

from celery_sharding.dedup import current_claim, deduplicate
from celery_sharding.dedup.stores.database import claim_metadata

metadata = MetaData()
payments = Table("payments", metadata, Column("id", Integer, primary_key=True), Column("order_id", Integer))


def main(folder: Path) -> int:
    moment = 0
    while True:
        moment += 1
        place = folder / str(moment)
        place.mkdir()
        with make_engine(place).begin() as connection:
            metadata.create_all(connection)
            claim_metadata.create_all(connection)
        was_killed = run(place, kill_at=moment)
        run(place, kill_at=0)
        run(place, kill_at=0)
        with make_engine(place).connect() as connection:
            effects = connection.execute(select(func.count()).select_from(payments)).scalar_one()
        if effects != 1:
            sys.stdout.write(f"killed at moment {moment}: {effects} effects\n")
            return 1
        if not was_killed:
            sys.stdout.write(f"{moment - 1}\n")
            return 0


def run(place: Path, *, kill_at: int) -> bool:
    """Run the task in a child, killed at its moment number `kill_at`; say whether it was."""
    child = os.fork()
    if child == 0:
        if kill_at:
            kill_myself(at=kill_at)
        task = make_task(place)
        os._exit(0 if task.delay(7).get() == "paid" else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"the child ended with {code}")
    return code != 0


def kill_myself(*, at: int) -> None:
    moments = [0]

    def count(*_: Any) -> None:
        moments[0] += 1
        if moments[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("before_cursor_execute", "after_cursor_execute", "commit", "checkin"):
        event.listen(Engine, name, count)


def make_engine(place: Path) -> Engine:
    return create_engine(f"sqlite:///{place / 'shop.sqlite'}")


def make_task(place: Path) -> Any:
    app = Celery("shop", backend=f"db+sqlite:///{place / 'results.sqlite'}")
    app.conf.update(task_always_eager=True, task_eager_propagates=True)
    engine = make_engine(place)

    @app.task
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        with Session(engine) as session, current_claim().transaction(session, result="paid"):
            session.execute(insert(payments).values(order_id=order_id))
        return "paid"

    return pay


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
