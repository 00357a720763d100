"""Effects and claim in one transaction of the user's database (SQLite here)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, _state
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, func, insert, select, update
from sqlalchemy.orm import Session
from unit.dedup_killed_process import run_program

from celery_sharding.dedup import current_claim, deduplicate
from celery_sharding.dedup.owners import new_owner
from celery_sharding.dedup.stores import store_for
from celery_sharding.dedup.stores.database import claim_metadata, claims_table
from celery_sharding.errors import ClaimLost, DeduplicationError

metadata = MetaData()
payments = Table("payments", metadata, Column("id", Integer, primary_key=True), Column("order_id", Integer))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path / 'shop.sqlite'}", connect_args={"timeout": 60})
    metadata.create_all(engine)
    claim_metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def app() -> Iterator[Celery]:
    app = Celery("shop", backend="cache+memory://", set_as_current=False)
    app.conf.task_always_eager = True
    yield app
    app.close()
    _state._set_task_join_will_block(False)


def count(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(payments)).scalar_one()


def forget(app: Celery, key: str) -> None:
    """Lose the record of the claim store, as a flushed Redis would; the row in the database stays."""
    store_for(app)._records.pop(key)  # type: ignore[attr-defined]


def test_effects_and_claim_commit_together(app: Celery, engine: Engine) -> None:
    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        with Session(engine) as session, current_claim().transaction(session):
            session.execute(insert(payments).values(order_id=order_id))
        return "paid"

    assert [pay.delay(1).get() for _ in range(2)] == ["paid", "paid"]
    assert count(engine) == 1


def test_an_error_rolls_both_back(app: Celery, engine: Engine) -> None:
    errors = [ValueError("broken")]

    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        with Session(engine) as session, current_claim().transaction(session):
            session.execute(insert(payments).values(order_id=order_id))
            if errors:
                raise errors.pop()
        return "paid"

    assert isinstance(pay.delay(1).result, ValueError)
    assert count(engine) == 0
    assert pay.delay(1).get() == "paid"
    assert count(engine) == 1


def test_the_row_is_the_authority_when_the_claim_store_forgot(app: Celery, engine: Engine) -> None:
    # Given a run whose record in the store was lost
    went_on = []

    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int, with_result: bool) -> str:
        try:
            with Session(engine) as session, current_claim().transaction(session) as effects:
                session.execute(insert(payments).values(order_id=order_id))
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
    assert count(engine) == 2


def test_a_task_that_swallows_the_end_is_a_duplicate_nevertheless(app: Celery, engine: Engine) -> None:
    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        try:
            with Session(engine) as session, current_claim().transaction(session, result="first"):
                session.execute(insert(payments).values(order_id=order_id))
        except BaseException:
            return "swallowed"
        return "first"

    pay.delay(1)
    forget(app, f"{pay.name}:1")
    assert pay.delay(1).get() == "first"


def test_a_holder_that_was_taken_over_before_its_transaction_leaves_one_effect(app: Celery, engine: Engine) -> None:
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
        with Session(engine) as session, current_claim().transaction(session, result=mine):
            session.execute(insert(payments).values(order_id=order_id))
        return mine

    # Then it ends with that one's result, and there is one effect
    assert pay.delay(1).result == "second"
    assert count(engine) == 1


def test_a_holder_taken_over_after_its_effects_keeps_its_result(app: Celery, engine: Engine) -> None:
    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        with Session(engine) as session, current_claim().transaction(session):
            session.execute(insert(payments).values(order_id=order_id))
        forget(app, f"{pay.name}:{order_id}")
        store_for(app).claim(f"{pay.name}:1", owner=new_owner("x"), lease_seconds=60, ttl_seconds=60)
        return "paid"

    assert pay.delay(1).result == "paid"
    assert count(engine) == 1


def test_concurrent_transactions_of_one_key_leave_one_effect(app: Celery, engine: Engine) -> None:
    # Given eight runs of one key that all believe to hold the claim
    gate = threading.Barrier(8)

    @app.task(shared=False)
    @deduplicate()
    def pay(order_id: int) -> str:
        claim = current_claim()
        claim.key = "one"
        gate.wait(60)
        with Session(engine) as session, claim.transaction(session, result="once"):
            session.execute(insert(payments).values(order_id=order_id))
        return "once"

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: pay.delay(1).result, range(8)))
    assert results == ["once"] * 8
    assert count(engine) == 1


def test_an_expired_row_gives_way_to_a_later_run_but_not_to_an_earlier_one(app: Celery, engine: Engine) -> None:
    table = claim_metadata.tables["celery_sharding_claims"]

    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        with Session(engine) as session, current_claim().transaction(session):
            session.execute(insert(payments).values(order_id=order_id))
        return "paid"

    # Given a row whose time to live is over
    pay.delay(1)
    forget(app, f"{pay.name}:1")
    with engine.begin() as connection:
        connection.execute(update(table).values(expires_at=1.0))
    # When a later run comes, then it takes the row
    assert pay.delay(1).get() == "paid"
    assert count(engine) == 2
    # And when a run with a lower fencing token comes, then it is refused
    forget(app, f"{pay.name}:1")
    with engine.begin() as connection:
        connection.execute(update(table).values(expires_at=1.0, fencing=2**60))
    assert isinstance(pay.delay(1).result, ClaimLost)
    assert count(engine) == 2


def test_misuse_is_told_and_leaves_nothing(app: Celery, engine: Engine) -> None:
    @app.task(shared=False)
    @deduplicate(key="how")
    def pay(how: str) -> None:
        claim = current_claim()
        with Session(engine) as session:
            with claim.transaction(session):
                session.execute(insert(payments).values(order_id=1))
                if how == "committed":
                    session.commit()
                if how == "rolled back":
                    session.rollback()
                    session.execute(insert(payments).values(order_id=1))
            if how == "twice":
                with claim.transaction(session):
                    session.execute(insert(payments).values(order_id=1))

    for how, message, effects in (
        ("rolled back", "rolled back inside", 0),
        ("twice", "entered twice", 1),
        ("committed", "committed or rolled back inside", 2),
    ):
        result = pay.delay(how)
        assert isinstance(result.result, DeduplicationError)
        assert message in str(result.result)
        assert count(engine) == effects


def test_a_missing_table_is_named_with_the_way_to_make_it(app: Celery, engine: Engine) -> None:
    claim_metadata.drop_all(engine)

    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> None:
        with Session(engine) as session, current_claim().transaction(session):
            session.execute(insert(payments).values(order_id=order_id))

    result: Any = pay.delay(1)
    assert isinstance(result.result, DeduplicationError)
    assert "claims_table(Base.metadata)" in str(result.result)


def test_the_table_may_have_another_name_and_the_session_a_block_of_its_own(app: Celery, engine: Engine) -> None:
    own = claims_table(MetaData(), "shop_claims")
    own.metadata.create_all(engine)

    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        with Session(engine) as session, session.begin(), current_claim().transaction(session, table=own):
            session.execute(insert(payments).values(order_id=order_id))
        return "paid"

    assert pay.delay(1).get() == "paid"
    with engine.connect() as connection:
        assert len(connection.execute(select(own)).all()) == 1


def test_a_process_killed_at_any_statement_leaves_one_effect(tmp_path: Path) -> None:
    assert run_program(tmp_path, "sqlalchemy") > 10
