"""Databases of a shop, in which payments are written in the transaction of a claim: through SQLAlchemy, or Django."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import django
import pymysql
import pytest
from celery import Celery, _state
from django.apps import apps
from django.conf import settings
from django.db import connections
from django.test.utils import modify_settings
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, delete, func, insert, make_url, select, update
from sqlalchemy.orm import Session

from celery_sharding.dedup import claim_metadata, current_claim
from celery_sharding.dedup.claim_row import Effects

ENGINES = {"sqlite": "sqlite3", "postgresql": "postgresql", "mysql": "mysql"}
SQLITE_WAIT_SECONDS = 60

DATABASES = [
    pytest.param((kind, database), marks=pytest.mark.xdist_group(group), id=f"{kind}-{database}")
    for kind in ("sqlalchemy", "django")
    for database, group in (("sqlite", "files"), ("postgresql", "postgresql"), ("mariadb", "mariadb"))
    # The tests of Django share the settings of a process, and so the process.
    for group in (["django"] if kind == "django" else [group])
]

payments = Table("payments", MetaData(), Column("order_id", Integer), mysql_engine="InnoDB")
claims = claim_metadata.tables["celery_sharding_claims"]


class Shop(Protocol):
    """A database with a table of payments and the claims table, as tasks write to it."""

    def transaction(self, **options: Any) -> AbstractContextManager[Effects]:
        """`current_claim().transaction` of this database."""

    def pay(self, order_id: int) -> None:
        """Write a payment, in the transaction of this thread."""

    def execute(self, statement: str) -> None:
        """Let the database do `statement`, in the transaction of this thread."""

    def count(self) -> int:
        """Return how many payments have been committed."""

    def clear(self) -> None:
        """Delete all payments and claims."""

    def disconnect(self) -> None:
        """Close what is open to the database."""

    def age_claims(self, *, fencing: int) -> None:
        """Let the time to live of all claims be over, whose fencing token becomes `fencing`."""


class SqlalchemyShop:
    def __init__(self, url: str) -> None:
        self.engine = create_engine(url, connect_args={"timeout": SQLITE_WAIT_SECONDS} if "sqlite" in url else {})
        self._here = threading.local()

    @contextmanager
    def transaction(self, **options: Any) -> Iterator[Effects]:
        with Session(self.engine) as session, current_claim().transaction(session, **options) as effects:
            self._here.session = session
            yield effects

    def pay(self, order_id: int) -> None:
        self._here.session.execute(insert(payments).values(order_id=order_id))

    def execute(self, statement: str) -> None:
        self._here.session.connection().exec_driver_sql(statement)

    def count(self) -> int:
        with self.engine.connect() as connection:
            return connection.execute(select(func.count()).select_from(payments)).scalar_one()

    def age_claims(self, *, fencing: int) -> None:
        with self.engine.begin() as connection:
            connection.execute(update(claims).values(expires_at=1.0, fencing=fencing))

    def clear(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(delete(payments))
            connection.execute(delete(claims))

    def disconnect(self) -> None:
        self.engine.dispose()


class DjangoShop:
    """The database "shop" of Django, which `set_up_django` has opened."""

    @contextmanager
    def transaction(self, **options: Any) -> Iterator[Effects]:
        try:
            with current_claim().transaction(using="shop", **options) as effects:
                yield effects
        finally:
            if threading.current_thread() is not threading.main_thread():
                connections["shop"].close()

    def pay(self, order_id: int) -> None:
        with connections["shop"].cursor() as cursor:
            cursor.execute("INSERT INTO payments VALUES (%s)", [order_id])

    def execute(self, statement: str) -> None:
        with connections["shop"].cursor() as cursor:
            cursor.execute(statement)

    def count(self) -> int:
        with connections["shop"].cursor() as cursor:
            cursor.execute("SELECT COUNT(*) FROM payments")
            return int(cursor.fetchone()[0])

    def age_claims(self, *, fencing: int) -> None:
        from celery_sharding.django.models import Claim

        Claim.objects.using("shop").update(expires_at=1.0, fencing=fencing)

    def clear(self) -> None:
        self.execute("DELETE FROM payments")
        self.execute("DELETE FROM celery_sharding_claims")

    def disconnect(self) -> None:
        connections["shop"].close()


@contextmanager
def open_app() -> Iterator[Celery]:
    """Yield the app of a shop, whose tasks run where they are called; its claims are in memory."""
    app = Celery("shop", backend="cache+memory://", set_as_current=False)
    app.conf.task_always_eager = True
    try:
        yield app
    finally:
        app.close()
        # Eager tasks of several threads restore this global of Celery's in the wrong order.
        _state._set_task_join_will_block(False)


@contextmanager
def open_shop(kind: str, url: str) -> Iterator[Shop]:
    """Yield the shop in the database at `url`, through "sqlalchemy" or "django"; its tables are new, and go with it."""
    open_it = {"sqlalchemy": _open_sqlalchemy_shop, "django": _open_django_shop}[kind]
    with open_it(url) as shop:
        yield shop


@contextmanager
def _open_sqlalchemy_shop(url: str) -> Iterator[Shop]:
    shop = SqlalchemyShop(url)
    for metadata in (payments.metadata, claim_metadata):
        metadata.create_all(shop.engine)
    try:
        yield shop
    finally:
        for metadata in (payments.metadata, claim_metadata):
            metadata.drop_all(shop.engine)
        shop.engine.dispose()


@contextmanager
def _open_django_shop(url: str) -> Iterator[Shop]:
    with set_up_django(url) as connection:
        from celery_sharding.django.models import Claim

        shop = DjangoShop()
        shop.execute("CREATE TABLE payments (order_id INTEGER)")
        with connection.schema_editor() as editor:
            editor.create_model(Claim)
        try:
            yield shop
        finally:
            shop.execute("DROP TABLE payments")
            if Claim._meta.db_table in connection.introspection.table_names():
                with connection.schema_editor() as editor:
                    editor.delete_model(Claim)


@contextmanager
def set_up_django(url: str) -> Iterator[Any]:
    """Yield Django's connection to the database at `url`, named "shop"; the settings may be those of another test."""
    if not settings.configured:
        settings.configure()
    if not apps.ready:
        django.setup()
    connections.settings["shop"] = connections.configure_settings({"default": {}, "shop": django_database(url)})["shop"]
    with modify_settings(INSTALLED_APPS={"append": "celery_sharding.django"}):
        connection = connections["shop"]
        try:
            yield connection
        finally:
            connection.close()
            del connections["shop"]
            del connections.settings["shop"]


def django_database(url: str) -> dict[str, Any]:
    """Return the settings by which Django opens the database at `url`."""
    place = make_url(url)
    name = place.get_backend_name()
    found = {"ENGINE": f"django.db.backends.{ENGINES[name]}", "NAME": place.database}
    if name == "sqlite":
        return found | {"OPTIONS": {"timeout": SQLITE_WAIT_SECONDS}}
    if name == "mysql":
        pymysql.install_as_MySQLdb()
    return found | {"HOST": place.host, "PORT": place.port, "USER": place.username}


def url_of(database: str, request: pytest.FixtureRequest, folder: Path) -> str:
    """Return the URL of one of `DATABASES`: a file in `folder`, or the server that the fixture of that name starts."""
    return f"sqlite:///{folder / 'shop.sqlite'}" if database == "sqlite" else request.getfixturevalue(database).url
