"""How `claim.transaction` may be used, and not; what it promises is in tests/contract/test_transactions.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from django.db import connections, transaction
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, event, insert, select
from sqlalchemy.orm import Session

from celery_sharding.dedup import current_claim, deduplicate
from celery_sharding.dedup.stores.database import claim_metadata, claims_table
from celery_sharding.errors import DeduplicationError
from support.shop_databases import DjangoShop, Shop, SqlalchemyShop, open_app, open_shop, payments

# After the tests of Django's stores, whose settings this process then has.
pytestmark = pytest.mark.xdist_group("django")


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    """A shop that uses SQLAlchemy."""
    with open_shop("sqlalchemy", f"sqlite:///{tmp_path / 'shop.sqlite'}") as shop:
        yield shop


@pytest.fixture
def till(tmp_path: Path) -> Iterator[Shop]:
    """A shop that uses Django."""
    with open_shop("django", f"sqlite:///{tmp_path / 'shop.sqlite'}") as shop:
        yield shop


@pytest.fixture
def app() -> Iterator[Celery]:
    with open_app() as app:
        yield app


def test_misuse_is_told_and_leaves_nothing(app: Celery, shop: SqlalchemyShop) -> None:
    @app.task(shared=False)
    @deduplicate(key="how")
    def pay(how: str) -> None:
        claim = current_claim()
        with Session(shop.engine) as session:
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
        assert shop.count() == effects


def test_a_missing_table_is_named_with_the_way_to_make_it(app: Celery, shop: SqlalchemyShop) -> None:
    claim_metadata.drop_all(shop.engine)

    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> None:
        with Session(shop.engine) as session, current_claim().transaction(session):
            session.execute(insert(payments).values(order_id=order_id))

    result: Any = pay.delay(1)
    assert isinstance(result.result, DeduplicationError)
    assert "claims_table(Base.metadata)" in str(result.result)


def test_the_table_may_have_another_name_and_the_session_a_block_of_its_own(app: Celery, shop: SqlalchemyShop) -> None:
    own = claims_table(MetaData(), "shop_claims")
    own.metadata.create_all(shop.engine)

    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> str:
        with Session(shop.engine) as session, session.begin(), current_claim().transaction(session, table=own):
            session.execute(insert(payments).values(order_id=order_id))
        return "paid"

    assert pay.delay(1).get() == "paid"
    with shop.engine.connect() as connection:
        assert len(connection.execute(select(own)).all()) == 1


def test_nothing_is_written_after_sqlite_has_rolled_back_by_itself(app: Celery, shop: SqlalchemyShop) -> None:
    # Given a driver that begins no transaction, as SQLAlchemy advises for savepoints
    shop.disconnect()

    @event.listens_for(shop.engine, "connect")
    def begin_nothing(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    event.listen(shop.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))

    @app.task(shared=False)
    @deduplicate(key="order_id")
    def pay(order_id: int) -> None:
        with shop.transaction():
            shop.pay(order_id)
            shop.execute("ROLLBACK")
            with suppress(DeduplicationError):
                shop.pay(order_id)

    # When a task writes after that, then it would commit at once, and is refused
    result: Any = pay.delay(1).result
    assert isinstance(result, DeduplicationError)
    assert "rolled the transaction" in str(result)
    assert shop.count() == 0


@pytest.mark.parametrize("begun", ["inside", "before"])
def test_a_second_database_is_refused_if_it_is_begun_inside_the_block(
    app: Celery, shop: SqlalchemyShop, tmp_path: Path, begun: str
) -> None:
    other = create_engine(f"sqlite:///{tmp_path / 'other.sqlite'}")
    elsewhere = Table("elsewhere", MetaData(), Column("n", Integer))
    elsewhere.create(other)

    # Given a session that spans two databases
    @app.task(shared=False)
    @deduplicate()
    def pay() -> None:
        with Session(shop.engine, binds={elsewhere: other}) as session:
            if begun == "before":
                session.execute(select(elsewhere))
            with current_claim().transaction(session):
                session.execute(insert(elsewhere).values(n=1))

    # When it writes to the second one, then it is refused; SQLAlchemy does not tell what it has begun before
    result: Any = pay.delay().result
    with other.connect() as connection:
        written = connection.scalars(select(elsewhere)).all()
    other.dispose()
    assert (type(result), written) == ((DeduplicationError, []) if begun == "inside" else (type(None), [1]))


@pytest.mark.parametrize("how", ["set_rollback", "swallowed error", "closed", "nested", "twice"])
def test_a_transaction_that_django_cannot_commit_is_told_and_leaves_nothing(
    app: Celery, till: DjangoShop, how: str
) -> None:
    @app.task(shared=False)
    @deduplicate(key="how")
    def pay(how: str) -> str:
        if how == "nested":
            with transaction.atomic(using="shop"), current_claim().transaction(using="shop"):
                till.pay(1)
        with current_claim().transaction(using="shop", result="stored"):
            till.pay(1)
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
                till.pay(1)
        return "paid"

    result: Any = pay.delay(how).result
    assert isinstance(result, DeduplicationError)
    assert till.count() == (1 if how == "twice" else 0)
    # And the work can be done again
    if how != "twice":
        assert pay.delay("well").get() == "paid"


def test_what_is_missing_in_django_is_named(app: Celery, till: DjangoShop) -> None:
    from celery_sharding.django.models import Claim

    with connections["shop"].schema_editor() as editor:
        editor.delete_model(Claim)

    @app.task(shared=False)
    @deduplicate(key="using")
    def pay(using: str) -> None:
        with current_claim().transaction(using=using):
            till.pay(1)

    for using, advice in (("shop", "migrate celery_sharding --database shop"), ("elsewhere", "elsewhere")):
        result: Any = pay.delay(using).result
        assert isinstance(result, DeduplicationError)
        assert advice in str(result)
    assert till.count() == 0


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
