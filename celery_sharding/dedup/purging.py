"""Deleting expired records of the claim store and expired rows of claims tables.

Redis and Memcached do so by themselves. In databases and files expired records do no harm but take room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery_sharding.dedup.django_row import purge_rows
from celery_sharding.dedup.stores import store_for

if TYPE_CHECKING:
    from sqlalchemy import Table
    from sqlalchemy.orm import Session


def purge_expired(app: Any) -> int:
    """Delete the expired records of the app's claim store and rows of Django's claims tables, and return how many.

    Raises:
        NoUsableStore: The result backend keeps no claims.
        StoreUnavailable: The store did not answer.
    """
    return store_for(app).purge() + purge_rows()


def purge_claims(session: Session, *, table: Table | None = None) -> int:
    """Delete the expired rows of a SQLAlchemy claims table, commit, and return how many.

    Args:
        session: Of the database that `claim.transaction(session)` writes to.
        table: As in `claim.transaction`.
    """
    from sqlalchemy import delete

    from celery_sharding.dedup.stores.schema import default_claims_table, read_clock

    rows = default_claims_table if table is None else table
    connection = session.connection()
    found = connection.execute(delete(rows).where(rows.c.expires_at <= read_clock(connection)))
    session.commit()
    return found.rowcount
