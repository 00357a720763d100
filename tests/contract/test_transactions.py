"""Effects and claim in one transaction of the user's database, through SQLAlchemy and through Django."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from typing import Any

import pytest
from celery import Celery
from django.db import connections
from sqlalchemy import create_engine, insert, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from celery_sharding.dedup import current_claim, deduplicate
from celery_sharding.dedup.claim_row import AlreadyDone, ClaimRow, commit_with_effects
from celery_sharding.dedup.django_row import read_clock
from celery_sharding.dedup.owners import new_owner
from celery_sharding.dedup.results import ResultCodec
from celery_sharding.dedup.sqlalchemy_row import SessionTable
from celery_sharding.dedup.stores import store_for
from celery_sharding.errors import ClaimLost, DeduplicationError
from support.shop_databases import DATABASES, Shop, SqlalchemyShop, claims, open_app, open_shop, payments, url_of

OF_SQLALCHEMY = DATABASES[:3]


@pytest.fixture(scope="module", params=DATABASES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """A shop for the tests of this module."""
    kind, name = request.param
    with open_shop(kind, url_of(name, request, tmp_path_factory.mktemp("shop"))) as shop:
        yield shop


@pytest.fixture
def shop(opened: Shop) -> Shop:
    """An empty shop."""
    opened.clear()
    return opened


@pytest.fixture
def app() -> Iterator[Celery]:
    with open_app() as app:
        yield app


def forget(app: Celery, key: str) -> None:
    """Lose what the claim store knows of `key`; the row in the database stays."""
    assert store_for(app).forget(key, force=True)


def test_effects_and_claim_commit_together_or_not_at_all(app: Celery, shop: Shop) -> None:
    errors = [ValueError("broken")]

    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        with shop.transaction():
            shop.pay(order_id)
            if errors:
                raise errors.pop()
        return "paid"

    # When the first run fails inside, then nothing of it is left
    assert isinstance(pay.delay(1).result, ValueError)
    assert shop.count() == 0
    # And the next one commits, and is found
    assert [pay.delay(1).get() for _ in range(2)] == ["paid", "paid"]
    assert shop.count() == 1


def test_the_row_is_the_authority_when_the_claim_store_forgot(app: Celery, shop: Shop) -> None:
    # Given a run whose record in the store was lost
    went_on = []

    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int, with_result: bool) -> str:
        try:
            with shop.transaction() as effects:
                shop.pay(order_id)
                if with_result:
                    effects.result = {"paid": order_id}
            went_on.append(order_id)
        except Exception:
            went_on.append("caught")
        return "returned"

    for order_id, with_result, stored in ((1, True, {"paid": 1}), (2, False, None)):
        assert pay.delay(order_id, with_result).get() == "returned"
        forget(app, f"{pay.name}:{order_id}")
        # When a duplicate comes, then it ends at the row, with what was stored beside the effects
        assert pay.delay(order_id, with_result).get() == stored
        # And from then on the store knows it again
        assert pay.delay(order_id, with_result).get() == stored
    assert went_on == [1, 2]
    assert shop.count() == 2


def test_a_task_that_swallows_its_end_is_a_duplicate_nevertheless(app: Celery, shop: Shop) -> None:
    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        try:
            with shop.transaction(result="first"):
                shop.pay(order_id)
        except BaseException:
            return "swallowed"
        return "first"

    pay.delay(1)
    forget(app, f"{pay.name}:1")
    assert pay.delay(1).get() == "first"


def test_a_holder_that_was_taken_over_before_its_transaction_leaves_one_effect(app: Celery, shop: Shop) -> None:
    # Given a run that is overtaken by another one, which commits first
    overtaken = []

    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        if not overtaken:
            overtaken.append(order_id)
            forget(app, f"{pay.name}:{order_id}")
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(lambda: pay.delay(order_id).result).result(60) == "second"
            mine = "first"
        else:
            mine = "second"
        with shop.transaction(result=mine):
            shop.pay(order_id)
        return mine

    # Then it ends with that one's result, and there is one effect
    assert pay.delay(1).result == "second"
    assert shop.count() == 1


def test_a_holder_taken_over_after_its_effects_keeps_its_result(app: Celery, shop: Shop) -> None:
    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        with shop.transaction():
            shop.pay(order_id)
        forget(app, f"{pay.name}:{order_id}")
        store_for(app).claim(f"{pay.name}:1", owner=new_owner("x"), lease_seconds=60, ttl_seconds=60)
        return "paid"

    assert pay.delay(1).result == "paid"
    assert shop.count() == 1


def test_an_expired_row_gives_way_to_a_later_run_but_not_to_an_earlier_one(app: Celery, shop: Shop) -> None:
    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        with shop.transaction():
            shop.pay(order_id)
        return "paid"

    # Given a row whose time to live is over
    pay.delay(1)
    shop.age_claims(fencing=1)
    forget(app, f"{pay.name}:1")
    # When a later run comes, then it takes the row
    assert pay.delay(1).get() == "paid"
    assert shop.count() == 2
    # And when a run with a lower fencing token comes, then it is refused
    shop.age_claims(fencing=2**60)
    forget(app, f"{pay.name}:1")
    assert isinstance(pay.delay(1).result, ClaimLost)
    assert shop.count() == 2


@pytest.mark.parametrize("is_expired", [False, True])
def test_of_concurrent_transactions_of_one_key_one_is_left(app: Celery, shop: Shop, is_expired: bool) -> None:
    # Given six runs of one key that all believe to hold the claim, of which five wait for the one that was first
    runs, first_is_in, others = 6, threading.Event(), threading.Semaphore(0)

    @app.task(shared=False)
    @deduplicate()
    def pay(number: int) -> str:
        claim = current_claim()
        claim.key = "any\0text"
        if number:
            first_is_in.wait(60)
            others.release()
        with shop.transaction(result="once"):
            shop.pay(number)
            first_is_in.set()
            for _ in range(runs - 1):
                others.acquire(timeout=60)
            threading.Event().wait(0.3)  # until they wait in the database, which says nothing of it
        return "once"

    app.finalize()  # not in all threads at once
    if is_expired:
        # Which takes the row of an earlier one over
        pay_before(app, shop)
    # When it commits, then all of them have its result
    with ThreadPoolExecutor(runs) as pool:
        results = list(pool.map(lambda number: pay.delay(number).result, range(runs)))
    assert results == ["once"] * runs
    assert shop.count() == 1 + is_expired


def pay_before(app: Celery, shop: Shop) -> None:
    @app.task(shared=False)
    @deduplicate()
    def pay_first() -> None:
        current_claim().key = "any\0text"
        with shop.transaction():
            shop.pay(0)

    pay_first.delay().get()
    shop.age_claims(fencing=1)


def test_an_error_of_the_database_that_was_caught_never_parts_effects_and_claim(app: Celery, shop: Shop) -> None:
    # Given a task that goes on when a statement has failed
    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        with shop.transaction():
            shop.pay(order_id)
            with pytest.raises(Exception, match="no_such_table"):
                shop.execute("SELECT * FROM no_such_table")
        return "paid"

    # Then both stand, or neither and the task is told: PostgreSQL refuses what comes after an error
    result: Any = pay.delay(1).result
    assert shop.count() == (1 if result == "paid" else 0)
    assert result == "paid" or isinstance(result, DeduplicationError)


def test_effects_do_not_commit_without_the_claim_that_the_database_rolled_back(app: Celery, shop: Shop) -> None:
    # Given a database that rolls back by itself, as for a deadlock, and a task that writes again
    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> None:
        with shop.transaction():
            shop.execute("ROLLBACK")
            with suppress(DeduplicationError):
                shop.pay(order_id)

    # Then nothing stands, and the task is told
    result: Any = pay.delay(1).result
    assert isinstance(result, DeduplicationError)
    assert "rolled" in str(result)
    assert shop.count() == 0


@pytest.mark.parametrize("opened", OF_SQLALCHEMY, indirect=True)
def test_a_run_that_has_read_before_another_committed_finds_it_done(shop: SqlalchemyShop) -> None:
    # Given a session that has read, at the isolation level where it goes on seeing what it saw
    is_sqlite = shop.engine.dialect.name == "sqlite"
    engine = shop.engine if is_sqlite else shop.engine.execution_options(isolation_level="REPEATABLE READ")
    with Session(engine) as late:
        late.execute(select(claims)).all()
        if is_sqlite:
            late.rollback()  # there a reader keeps others from writing
        with Session(shop.engine) as session, transaction(session, token="theirs"):
            session.execute(insert(payments).values(order_id=1))
        # When it comes to write, then it is told in a moment, whatever it can see
        with pytest.raises((AlreadyDone, DBAPIError)), transaction(late):
            late.execute(insert(payments).values(order_id=1))
    assert shop.count() == 1


@pytest.mark.parametrize("opened", OF_SQLALCHEMY, indirect=True)
def test_an_engine_that_commits_each_statement_is_refused(shop: SqlalchemyShop) -> None:
    engine = create_engine(shop.engine.url, isolation_level="AUTOCOMMIT")
    with pytest.raises(DeduplicationError, match="AUTOCOMMIT"), Session(engine) as session, transaction(session):
        session.execute(insert(payments).values(order_id=1))
    engine.dispose()
    assert shop.count() == 0


@pytest.mark.parametrize("opened", DATABASES[-1:], indirect=True)
def test_the_clock_of_mariadb_is_the_same_when_local_times_come_twice_in_django_too(shop: Shop) -> None:
    for seconds in (1_761_438_600, 1_761_442_200):  # half past two, twice
        shop.execute(f"SET timestamp = {seconds}")
        assert read_clock(connections["shop"]) == seconds
    shop.disconnect()


def transaction(session: Session, token: str = "mine") -> AbstractContextManager[object]:
    row = ClaimRow("key", token, fencing=1, ttl_seconds=60)
    return commit_with_effects(SessionTable(session, row, None), row, result=None, results=ResultCodec(None, "key"))
