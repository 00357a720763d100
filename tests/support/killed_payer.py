"""Kills a task after each of its database statements: python -m support.killed_payer sqlalchemy|django URL RECORDS

URL is the database of the effects, RECORDS that of the claim store. Prints after how many statements a run was killed
in turn; each left one effect when the task was run again. Exits 1 and says after which statement one did not.
"""

from __future__ import annotations

import functools
import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from typing import Any

from celery import Celery
from django.conf import settings
from django.db import connections
from django.db.backends.signals import connection_created
from sqlalchemy import Engine, create_engine, event, text

from celery_sharding.dedup import deduplicate
from support.shop_databases import Shop, open_shop


def main(kind: str, url: str, records: str) -> int:
    do_not_wait_for_disks()
    with open_shop(kind, url) as shop:
        task = make_task(shop, records)
        shop.disconnect()
        moment, was_killed = 0, True
        while was_killed:
            moment += 1
            was_killed = in_child(functools.partial(pay_and_be_killed, task, records, at=moment))
            in_child(functools.partial(pay_twice, task))
            if (effects := shop.count()) != 1:
                sys.stdout.write(f"killed after statement {moment}: {effects} effects\n")
                return 1
            shop.clear()
            shop.disconnect()
    sys.stdout.write(f"{moment - 1}\n")
    return 0


def do_not_wait_for_disks() -> None:
    """Let SQLite leave that to the kernel, which outlives us."""

    def hurry(connection: Any, *_: Any, **__: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", hurry)
    connection_created.connect(lambda connection, **_: hurry(connection.connection), weak=False)


def in_child(call: Callable[[], None]) -> bool:
    """Call in a forked child; say whether it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            call()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"the child ended with {code}")
    return code != 0


def make_task(shop: Shop, records: str) -> Any:
    app = Celery("shop", backend=f"db+{records}", set_as_current=False)
    app.conf.update(task_always_eager=True, task_eager_propagates=True, database_create_tables_at_setup=False)

    @app.task(name="shop.pay", shared=False)
    @deduplicate(key="order_id")
    def pay_order(order_id: int) -> str:
        with shop.transaction(result="paid"):
            shop.pay(order_id)
        return "paid"

    @app.task(name="shop.warm_up", shared=False)
    def warm_up() -> None:
        """Loads what the children then need not load."""

    assert warm_up.delay().get() is None
    assert app.backend
    return pay_order


def pay_and_be_killed(task: Any, records: str, *, at: int) -> None:
    """Run the task, killed after its statement or commit number `at`, if there are as many."""
    with create_engine(records).begin() as connection:
        # So that this run makes the store's table, too.
        connection.execute(text("DROP TABLE IF EXISTS celery_sharding_dedup"))
    kill_myself(at=at)
    assert task.delay(7).get() == "paid"


def pay_twice(task: Any) -> None:
    assert [task.delay(7).get() for _ in range(2)] == ["paid", "paid"]


def kill_myself(*, at: int) -> None:
    moments = [0]

    def count(*_: Any) -> None:
        moments[0] += 1
        if moments[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("after_cursor_execute", "checkin"):  # a connection comes back after its commit
        event.listen(Engine, name, count)
    if settings.configured:
        watch_django(count)


def watch_django(count: Callable[[], None]) -> None:
    """Call `count` after each statement and each commit of Django's connection."""

    def and_count(execute: Callable[..., Any], *arguments: Any) -> Any:
        found = execute(*arguments)
        count()
        return found

    connection = connections["shop"]
    connection.ensure_connection()
    connection.execute_wrappers.append(and_count)
    commit = connection.commit
    connection.commit = lambda: and_count(commit)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
