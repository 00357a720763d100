"""The effects of a task and its claim in one transaction of a Django database: what `transaction` does with a session.

The row is written in one `atomic` block with the effects, the outermost one of its connection, so it commits at its
end. Django leaves such a block without a commit and without an error if something inside was to be rolled back, or
closed the connection; both are errors here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from celery_sharding.dedup.stores.records import row_id, row_key
from celery_sharding.dedup.transaction import AlreadyDone, Effects
from celery_sharding.errors import ClaimLost, DeduplicationError

_CLOCKS = {
    "postgresql": "SELECT EXTRACT(EPOCH FROM clock_timestamp())",
    # In UTC: local times come twice when clocks are put back.
    "mysql": "SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6)) / 1e6",
}

_VENDORS = ("sqlite", *_CLOCKS)
_NO_SESSION = "claim.transaction() without a SQLAlchemy session is for a database of Django"


@contextmanager
def commit_with_effects(
    using: str,
    *,
    key: str,
    token: str,
    fencing: int,
    ttl_seconds: float,
    result: Any,
    encode: Callable[[Any], bytes],
) -> Iterator[Effects]:
    """Write the row of the claim, let the caller write, commit both; roll both back on any error.

    Args:
        using: The alias of the database in Django's settings.

    Raises:
        AlreadyDone: Another run has committed.
        ClaimLost: A later run had it, and the row has expired since.
        DeduplicationError: The table is missing, a transaction is open already, or it was rolled back inside.
    """
    connection = _open_connection(using, key)
    from django.db import OperationalError, ProgrammingError, transaction

    if connection.vendor not in _VENDORS:
        raise DeduplicationError(
            f"claim.transaction() does not know {connection.vendor}; it works with {', '.join(_VENDORS)}",
            key=key,
        )
    effects, has_begun = Effects(result), False
    try:
        with ExitStack() as stack:
            _enter_outermost(stack, connection, using, key)
            _write_row(connection, using, key=key, token=token, fencing=fencing, ttl_seconds=ttl_seconds)
            has_begun = True
            with connection.execute_wrapper(partial(_execute_inside, key)):
                yield effects
            stored = None if effects.result is None else encode(effects.result)
            if not (_can_commit(connection) and _finish_row(using, key, token, stored)):
                transaction.set_rollback(True, using=using)
                raise _rolled_back(key)
    except (OperationalError, ProgrammingError) as exc:
        if not has_begun and _is_missing(connection):
            raise DeduplicationError(
                "the database has no claims table; put 'celery_sharding.django' into INSTALLED_APPS and run "
                f"`manage.py migrate celery_sharding --database {using}`",
                key=key,
            ) from exc
        raise


def _execute_inside(key: str, execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: Any) -> Any:
    """Execute a statement, unless SQLite has ended the transaction by itself: it would commit at once."""
    connection = context["connection"]
    if connection.vendor == "sqlite" and not connection.connection.in_transaction:
        raise _rolled_back(key)
    return execute(sql, params, many, context)


def _rolled_back(key: str) -> DeduplicationError:
    return DeduplicationError(
        f"the transaction of {key!r} was rolled back: a database error inside it was caught, or set_rollback was "
        "called, or its connection was closed. Nothing of it stands. Put what may fail into an atomic block of its own "
        "inside",
        key=key,
    )


def _finish_row(using: str, key: str, token: str, result: bytes | None) -> bool:
    """Store the result, and say whether the row is still there: whether what was written with it is, too.

    Django does not see that a database has rolled back by itself, or, on PostgreSQL, refuses everything after an error.
    """
    from django.db import InternalError

    mine = _rows(using).filter(id=row_id(key), token=token)
    try:
        if result is not None:
            mine.update(result=result)
        return bool(mine.exists())
    except InternalError:
        return False


def purge_rows() -> int:
    """Delete the expired rows of each database whose routers keep the claims table there; return how many there were.

    0 where Django, or the app `celery_sharding.django`, is not in use.
    """
    apps = getattr(sys.modules.get("django.apps"), "apps", None)
    if apps is None or not apps.ready or not apps.is_installed("celery_sharding.django"):
        return 0
    from django.db import connections, router

    from celery_sharding.django.models import Claim

    deleted = 0
    for using in connections:
        connection = connections[using]
        if connection.vendor not in _VENDORS:
            continue  # Also a "default" that is left empty on purpose.
        if router.allow_migrate_model(using, Claim) and not _is_missing(connection):
            deleted += _delete_expired(connection)
    return deleted


def _delete_expired(connection: Any) -> int:
    # Not by the model: where somebody listens for deletions, Django reads the rows first and deletes them by their key
    # alone, also one that a run has made its own meanwhile.
    from celery_sharding.django.models import Claim

    table = connection.ops.quote_name(Claim._meta.db_table)
    with connection.cursor() as cursor:
        cursor.execute(f"DELETE FROM {table} WHERE expires_at <= %s", [_read_clock(connection)])
        return int(cursor.rowcount)


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


def _enter_outermost(stack: ExitStack, connection: Any, using: str, key: str) -> None:
    from django.db import transaction

    try:
        # Without autocommit, Django's outermost block does not commit either. (Inside a TestCase it is off, too.)
        if not connection.in_atomic_block and not connection.get_autocommit():
            raise RuntimeError("the database has AUTOCOMMIT off")
        stack.enter_context(transaction.atomic(using=using, durable=True))
    except RuntimeError as exc:
        raise DeduplicationError(
            f"claim.transaction() of {key!r} commits at its end, so it must be the outermost atomic block of database "
            f"{using!r}: {exc}",
            key=key,
        ) from exc


def _write_row(connection: Any, using: str, *, key: str, token: str, fencing: int, ttl_seconds: float) -> None:
    rows, identity = _rows(using), row_id(key)
    now = _read_clock(connection)
    values = {
        "key": _shown_key(connection, key),
        "token": token,
        "fencing": fencing,
        "expires_at": now + ttl_seconds,
        "result": None,
    }
    while not _insert(using, {"id": identity, **values}):
        if rows.filter(id=identity, expires_at__lte=now, fencing__lt=fencing).update(**values):
            return
        # Locked, so that what another run has just committed is seen at any isolation level.
        row = rows.select_for_update().filter(id=identity).first()
        if row is None:
            continue  # Deleted between the statements.
        if row.expires_at > now:
            raise AlreadyDone(None if row.result is None else bytes(row.result))
        raise ClaimLost(f"a later run of {key!r} has committed; the effects of this one were rolled back", key=key)


def _shown_key(connection: Any, key: str) -> str:
    """Return `key` as it is shown in its row: a table of MySQL's may be unable to hold more than Latin letters."""
    shown = row_key(key)
    return shown.encode("ascii", "backslashreplace").decode() if connection.vendor == "mysql" else shown


def _insert(using: str, values: dict[str, Any]) -> bool:
    from django.db import IntegrityError, transaction

    try:
        with transaction.atomic(using=using):
            _rows(using).create(**values)
    except IntegrityError:
        return False
    return True


def _rows(using: str) -> Any:
    from celery_sharding.django.models import Claim

    return Claim.objects.using(using)


def _read_clock(connection: Any) -> float:
    """Return the database's time in seconds; SQLite's is that of its one host."""
    if connection.vendor == "sqlite":
        return time.time()
    with connection.cursor() as cursor:
        cursor.execute(_CLOCKS[connection.vendor])
        return float(cursor.fetchone()[0])


def _can_commit(connection: Any) -> bool:
    return not connection.closed_in_transaction and not connection.get_rollback()


def _is_missing(connection: Any) -> bool:
    from django.db import DatabaseError

    from celery_sharding.django.models import Claim

    try:
        return Claim._meta.db_table not in connection.introspection.table_names()
    except DatabaseError:
        return False
