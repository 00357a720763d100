"""Kills a task after each of its database statements in turn: python dedup_killed_process.py FOLDER sqlalchemy|django

Prints one line for each kill and, last, how many there were. Exits 1 if any of them left not exactly one effect.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import django
from celery import Celery
from django.conf import settings
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, event, insert
from sqlalchemy.orm import Session

import celery_sharding
from celery_sharding.dedup import current_claim, deduplicate
from celery_sharding.dedup.stores.database import claim_metadata

metadata = MetaData()
payments = Table("payments", metadata, Column("id", Integer, primary_key=True), Column("order_id", Integer))


def run_program(folder: Path, kind: str) -> int:
    """Kill a child at its first, second, … statement or commit, run the task again after each; return how often."""
    root = str(Path(celery_sharding.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, __file__, str(folder), kind],
        env=os.environ | {"PYTHONPATH": root},
        text=True,
        capture_output=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.split()[-1])


def main(folder: Path, kind: str) -> int:
    make_task = TASKS[kind]
    if kind == "django":
        set_up_django()
    template = folder / "template"
    template.mkdir()
    in_child(lambda: make_tables(kind, template))
    moment = 0
    while True:
        moment += 1
        place = folder / str(moment)
        shutil.copytree(template, place)
        was_killed = run(make_task, place, kill_at=moment)
        run(make_task, place, kill_at=0)
        run(make_task, place, kill_at=0)
        with contextlib.closing(sqlite3.connect(place / "shop.sqlite")) as database:
            (effects,) = database.execute("SELECT COUNT(*) FROM payments").fetchone()
        if effects != 1:
            sys.stdout.write(f"killed at moment {moment}: {effects} effects\n")
            return 1
        if not was_killed:
            sys.stdout.write(f"{moment - 1}\n")
            return 0


def run(make_task: Callable[[Path], Any], place: Path, *, kill_at: int) -> bool:
    """Run the task in a child, killed at its moment number `kill_at`; say whether it was."""

    def pay() -> None:
        task = make_task(place)
        if kill_at:
            kill_myself(at=kill_at)
        assert task.delay(7).get() == "paid"

    return in_child(pay)


def in_child(call: Callable[[], None]) -> bool:
    """Call in a forked child; say whether it was killed."""
    child = os.fork()
    if child == 0:
        call()
        sys.stdout.flush()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"the child ended with {code}")
    return code != 0


def make_tables(kind: str, place: Path) -> None:
    with make_engine(place).begin() as connection:
        metadata.create_all(connection)
        if kind == "sqlalchemy":
            claim_metadata.create_all(connection)
    if kind == "django":
        os.chdir(place)
        from django.core.management import call_command

        call_command("migrate", verbosity=0)


def kill_myself(*, at: int) -> None:
    moments = [0]

    def count(*_: Any) -> None:
        moments[0] += 1
        if moments[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("before_cursor_execute", "after_cursor_execute", "commit", "checkin"):
        event.listen(Engine, name, count)
    if settings.configured:
        watch_django(count)


def make_engine(place: Path) -> Engine:
    return create_engine(f"sqlite:///{place / 'shop.sqlite'}")


def make_app(place: Path) -> Celery:
    app = Celery("shop", backend=f"db+sqlite:///{place / 'results.sqlite'}")
    app.conf.update(task_always_eager=True, task_eager_propagates=True)
    return app


def make_sqlalchemy_task(place: Path) -> Any:
    engine = make_engine(place)

    @make_app(place).task
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        with Session(engine) as session, current_claim().transaction(session, result="paid"):
            session.execute(insert(payments).values(order_id=order_id))
        return "paid"

    return pay


def make_django_task(place: Path) -> Any:
    os.chdir(place)
    from django.db import connection

    @make_app(place).task
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        with current_claim().transaction(result="paid"), connection.cursor() as cursor:
            cursor.execute("INSERT INTO payments (order_id) VALUES (%s)", [order_id])
        return "paid"

    return pay


def set_up_django() -> None:
    """Configure Django once, for a database in the folder that each child goes to; each fork then costs little."""
    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": "shop.sqlite", "OPTIONS": {"timeout": 30}}
    settings.configure(INSTALLED_APPS=["celery_sharding.django"], DATABASES={"default": database})
    django.setup()


def watch_django(count: Callable[[], None]) -> None:
    """Call `count` before and after each statement and each commit of Django's connection."""
    from django.db import connection

    def around(execute: Callable[..., Any], *arguments: Any) -> Any:
        count()
        found = execute(*arguments)
        count()
        return found

    connection.ensure_connection()
    connection.execute_wrappers.append(around)
    commit = connection.commit
    connection.commit = lambda: around(commit)


TASKS: dict[str, Callable[[Path], Any]] = {"sqlalchemy": make_sqlalchemy_task, "django": make_django_task}


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2]))
