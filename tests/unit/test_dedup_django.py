"""Effects and claim in one transaction of a Django database."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, _state
from django.db import connections, transaction
from unit.dedup_django import shop_database
from unit.dedup_killed_process import run_program

from celery_sharding.dedup import current_claim, deduplicate
from celery_sharding.dedup.stores import store_for
from celery_sharding.dedup.transaction import AlreadyDone
from celery_sharding.errors import ClaimLost, DeduplicationError

# After the tests of Django's stores, whose settings this process then has.
pytestmark = pytest.mark.xdist_group("django")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Any]:
    with shop_database(tmp_path) as connection:
        yield connection


@pytest.fixture
def app() -> Iterator[Celery]:
    app = Celery("shop", backend="cache+memory://", set_as_current=False)
    app.conf.task_always_eager = True
    yield app
    app.close()
    _state._set_task_join_will_block(False)


def forget(app: Celery, key: str) -> None:
    assert store_for(app).forget(key, force=True)


def write(order_id: int) -> None:
    with connections["shop"].cursor() as cursor:
        cursor.execute("INSERT INTO payments VALUES (%s)", [order_id])


def count() -> int:
    with connections["shop"].cursor() as cursor:
        cursor.execute("SELECT COUNT(*) FROM payments")
        return cursor.fetchone()[0]


def test_effects_and_claim_commit_together_or_not_at_all(app: Celery, database: Any) -> None:
    errors = [ValueError("broken")]

    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        with current_claim().transaction(using="shop"):
            write(order_id)
            if errors:
                raise errors.pop()
        return "paid"

    # When the first run fails inside, then nothing of it is left
    assert isinstance(pay.delay(1).result, ValueError)
    assert count() == 0
    # And the next one commits, and is found
    assert [pay.delay(1).get() for _ in range(2)] == ["paid", "paid"]
    assert count() == 1


def test_the_row_is_the_authority_when_the_claim_store_forgot(app: Celery, database: Any) -> None:
    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int, with_result: bool) -> str:
        with current_claim().transaction(using="shop") as effects:
            write(order_id)
            if with_result:
                effects.result = {"paid": order_id}
        return "returned"

    for order_id, with_result, stored in ((1, True, {"paid": 1}), (2, False, None)):
        assert pay.delay(order_id, with_result).get() == "returned"
        forget(app, f"{pay.name}:{order_id}")
        assert pay.delay(order_id, with_result).get() == stored
    assert count() == 2


def test_an_expired_row_gives_way_to_a_later_run_but_not_to_an_earlier_one(app: Celery, database: Any) -> None:
    from celery_sharding.django.models import Claim

    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        with current_claim().transaction(using="shop"):
            write(order_id)
        return "paid"

    pay.delay(1)
    for fencing, outcome, effects in ((1, "paid", 2), (2**60, ClaimLost, 2)):
        forget(app, f"{pay.name}:1")
        Claim.objects.using("shop").update(expires_at=1.0, fencing=fencing)
        result = pay.delay(1).result
        assert result == outcome or type(result) is outcome
        assert count() == effects


def test_concurrent_transactions_of_one_key_leave_one_effect(app: Celery, database: Any) -> None:
    # Given six runs of one key that all believe to hold the claim
    gate = threading.Barrier(6)

    @app.task(shared=False)
    @deduplicate()
    def pay(order_id: int) -> str:
        claim = current_claim()
        claim.key = "one"
        gate.wait(60)
        try:
            with claim.transaction(using="shop", result="once"):
                write(order_id)
        finally:
            connections["shop"].close()
        return "once"

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda _: pay.delay(1).result, range(6)))
    assert results == ["once"] * 6
    assert count() == 1


@pytest.mark.parametrize("how", ["set_rollback", "swallowed error", "closed", "nested", "twice"])
def test_a_transaction_that_cannot_commit_is_told_and_leaves_nothing(app: Celery, database: Any, how: str) -> None:
    @app.task(shared=False)
    @deduplicate(key="how")
    def pay(how: str) -> str:
        if how == "nested":
            with transaction.atomic(using="shop"), current_claim().transaction(using="shop"):
                write(1)
        with current_claim().transaction(using="shop", result="stored"):
            write(1)
            if how == "set_rollback":
                transaction.set_rollback(True, using="shop")
            if how == "swallowed error":
                try:
                    with transaction.atomic(using="shop", savepoint=False):
                        raise ValueError
                except ValueError:
                    pass
            if how == "closed":
                connections["shop"].close()
        if how == "twice":
            with current_claim().transaction(using="shop"):
                write(1)
        return "paid"

    result: Any = pay.delay(how).result
    assert isinstance(result, DeduplicationError)
    assert count() == (1 if how == "twice" else 0)
    # And the work can be done again
    if how != "twice":
        assert pay.delay("well").get() == "paid"


def test_what_is_missing_is_named(app: Celery, database: Any) -> None:
    from celery_sharding.django.models import Claim

    with database.schema_editor() as editor:
        editor.delete_model(Claim)

    @app.task(shared=False)
    @deduplicate(key="using")
    def pay(using: str) -> None:
        with current_claim().transaction(using=using):
            write(1)

    for using, advice in (("shop", "migrate celery_sharding --database shop"), ("elsewhere", "elsewhere")):
        result: Any = pay.delay(using).result
        assert isinstance(result, DeduplicationError)
        assert advice in str(result)
    assert count() == 0


def test_a_run_that_swallows_its_end_is_a_duplicate_nevertheless(app: Celery, database: Any) -> None:
    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        try:
            with current_claim().transaction(using="shop", result="first"):
                write(order_id)
        except AlreadyDone:
            return "swallowed"
        return "first"

    pay.delay(1)
    forget(app, f"{pay.name}:1")
    assert pay.delay(1).get() == "first"


def test_the_migration_makes_what_the_model_says() -> None:
    check = "makemigrations", "celery_sharding", "--check", "--dry-run"
    program = (
        "import sys; from django.conf import settings; from django.core.management import execute_from_command_line\n"
        "settings.configure(INSTALLED_APPS=['celery_sharding.django'],"
        " DATABASES={'default': {'ENGINE': 'django.db.backends.sqlite3', 'NAME': ':memory:'}})\n"
        "execute_from_command_line(sys.argv)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *check], env=os.environ, text=True, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_process_killed_at_any_statement_leaves_one_effect(tmp_path: Path) -> None:
    assert run_program(tmp_path, "django") > 10
