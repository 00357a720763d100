"""The claims table in a database of Django's; see `claim_row`.

The row is written in one `atomic` block with the effects, the outermost one of its connection, so it commits at its
end. Django leaves such a block without a commit and without an error if something inside was to be rolled back, or
closed the connection; both are errors here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from celery_sharding.dedup.claim_row import ClaimRow, ClaimsTable
from celery_sharding.errors import DeduplicationError

_CLOCKS = {
    "postgresql": "SELECT EXTRACT(EPOCH FROM clock_timestamp())",
    # In UTC: local times come twice when clocks are put back.
    "mysql": "SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6)) / 1e6",
}
_VENDORS = ("sqlite", *_CLOCKS)
_APP = "celery_sharding"
_NO_SESSION = "claim.transaction() without a SQLAlchemy session is for a database of Django"


class DjangoTable(ClaimsTable):
    """The claims table in the database that Django's settings call `using`, for the run that writes `row`."""

    def __init__(self, using: str, row: ClaimRow) -> None:
        self._using = using
        self._row = row
        self._id = row.id
        self._connection = _open_connection(using, row.key)
        self._is_written = False

    @contextmanager
    def transaction(self) -> Iterator[None]:
        from django.db import OperationalError, ProgrammingError

        try:
            with ExitStack() as stack:
                self._enter_outermost(stack)
                yield
        except (OperationalError, ProgrammingError) as exc:
            if not self._is_written and is_missing(self._connection):
                raise self._missing() from exc
            raise

    @contextmanager
    def guard(self) -> Iterator[None]:
        self._is_written = True
        with self._connection.execute_wrapper(self._execute):
            yield

    def read_clock(self) -> float:
        return read_clock(self._connection)

    def insert(self, columns: Mapping[str, Any]) -> bool:
        from django.db import IntegrityError, transaction

        try:
            with transaction.atomic(using=self._using):
                self._rows.create(id=self._id, **self._storable(columns))
        except IntegrityError:
            return False
        return True

    def replace_expired(self, columns: Mapping[str, Any], *, now: float) -> bool:
        expired = self._rows.filter(id=self._id, expires_at__lte=now, fencing__lt=self._row.fencing)
        return bool(expired.update(**self._storable(columns)))

    def lock(self) -> tuple[float, bytes | None] | None:
        row = self._rows.select_for_update().filter(id=self._id).first()
        return None if row is None else (row.expires_at, None if row.result is None else bytes(row.result))

    def finish(self, result: bytes | None) -> bool:
        from django.db import InternalError

        if self._connection.closed_in_transaction or self._connection.get_rollback():
            return False
        mine = self._rows.filter(id=self._id, token=self._row.token)
        try:
            if result is not None:
                mine.update(result=result)
            return bool(mine.exists())
        except InternalError:
            return False

    def rolled_back(self) -> DeduplicationError:
        return DeduplicationError(
            f"the transaction of {self._row.key!r} was rolled back: a database error inside it was caught, or "
            "set_rollback was called, or its connection was closed. Nothing of it stands. Put what may fail into an "
            "atomic block of its own inside",
            key=self._row.key,
        )

    @property
    def _rows(self) -> Any:
        return _claim_model().objects.using(self._using)

    def _enter_outermost(self, stack: ExitStack) -> None:
        from django.db import transaction

        key, connection = self._row.key, self._connection
        if connection.vendor not in _VENDORS:
            raise DeduplicationError(
                f"claim.transaction() does not know {connection.vendor}; it works with {', '.join(_VENDORS)}", key=key
            )
        if not _is_installed():
            raise self._missing()
        try:
            # Without autocommit, Django's outermost block does not commit either. (Inside a TestCase it is off, too.)
            if not connection.in_atomic_block and not connection.get_autocommit():
                raise RuntimeError("the database has AUTOCOMMIT off")
            stack.enter_context(transaction.atomic(using=self._using, durable=True))
        except RuntimeError as exc:
            raise DeduplicationError(
                f"claim.transaction() of {key!r} commits at its end, so it must be the outermost atomic block of "
                f"database {self._using!r}: {exc}",
                key=key,
            ) from exc

    def _execute(self, execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
        """Execute a statement, unless SQLite has ended the transaction by itself: it would commit at once."""
        connection = context["connection"]
        if connection.vendor == "sqlite" and not connection.connection.in_transaction:
            raise self.rolled_back()
        return execute(sql, params, many, context)

    def _storable(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return `columns` for this database: a table of MySQL's may be unable to hold more than Latin letters."""
        if self._connection.vendor != "mysql":
            return dict(columns)
        return {**columns, "key": columns["key"].encode("ascii", "backslashreplace").decode()}

    def _missing(self) -> DeduplicationError:
        return DeduplicationError(
            "the database has no claims table; put 'celery_sharding.django' into INSTALLED_APPS and run "
            f"`manage.py migrate celery_sharding --database {self._using}`",
            key=self._row.key,
        )


def purge_rows() -> int:
    """Delete the expired rows of each database whose routers keep the claims table there; return how many there were.

    0 where Django, or the app `celery_sharding.django`, is not in use.
    """
    if not _is_installed():
        return 0
    from django.db import connections, router

    deleted = 0
    for using in connections:
        connection = connections[using]
        if connection.vendor not in _VENDORS:
            continue  # Also a "default" that is left empty on purpose.
        if router.allow_migrate_model(using, _claim_model()) and not is_missing(connection):
            deleted += _delete_expired(connection)
    return deleted


def read_clock(connection: Any) -> float:
    """Return the time of a database of Django's in seconds; SQLite's is that of its one host."""
    if connection.vendor == "sqlite":
        return time.time()
    with connection.cursor() as cursor:
        cursor.execute(_CLOCKS[connection.vendor])
        return float(cursor.fetchone()[0])


def is_missing(connection: Any) -> bool:
    """Say whether a database of Django's is known to have no claims table."""
    from django.db import DatabaseError

    try:
        return _claim_model()._meta.db_table not in connection.introspection.table_names()
    except DatabaseError:
        return False


def _delete_expired(connection: Any) -> int:
    # Not by the model: where somebody listens for deletions, Django reads the rows first and deletes them by their key
    # alone, also one that a run has made its own meanwhile.
    table = connection.ops.quote_name(_claim_model()._meta.db_table)
    with connection.cursor() as cursor:
        cursor.execute(f"DELETE FROM {table} WHERE expires_at <= %s", [read_clock(connection)])
        return int(cursor.rowcount)


def _is_installed() -> bool:
    apps = getattr(sys.modules.get("django.apps"), "apps", None)
    return apps is not None and apps.ready and apps.is_installed("celery_sharding.django")


def _claim_model() -> Any:
    """Return the model of the Django app, which Django knows by its label: that app imports this package."""
    from django.apps import apps

    return apps.get_model(_APP, "Claim")


def _open_connection(using: str, key: str) -> Any:
    try:
        from django.core.exceptions import ImproperlyConfigured
        from django.db import connections
        from django.utils.connection import ConnectionDoesNotExist
    except ImportError as exc:
        raise DeduplicationError(f"{_NO_SESSION}, which is not installed", key=key) from exc
    try:
        return connections[using]
    except (ImproperlyConfigured, ConnectionDoesNotExist) as exc:
        raise DeduplicationError(f"{_NO_SESSION}: {exc}", key=key) from exc
