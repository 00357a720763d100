"""Claims in Django's databases, and in its caches that can compare and set.

A claim is never written on the connection that tasks use, where it would be part of their transactions: the store has
connections of its own, which Django makes with the same settings, and SQLAlchemy pools.
"""

from __future__ import annotations

import re
from typing import Any

from django.conf import settings
from django.core.cache import caches
from django.db import connections, router
from django.utils.module_loading import import_string
from sqlalchemy import URL

from celery_sharding.dedup.claims import ClaimStore
from celery_sharding.dedup.stores.database import DatabaseStore, open_engine

_PREFIX = "celery-sharding:dedup:"


def open_database(alias: str) -> ClaimStore | None:
    """Return a store in the database `alias` of Django's settings.

    None: other processes do not see it, because it is in memory, or `DatabaseStore` does not support it.
    """
    known = connections[alias]
    drivername = _drivername(known)
    if drivername is None or (known.vendor == "sqlite" and known.is_in_memory_db()):
        return None

    def connect() -> Any:
        connection = connections[alias].copy()
        connection.settings_dict.get("OPTIONS", {}).pop("pool", None)
        connection.connect()
        return connection.connection

    url = URL.create(drivername, database=str(known.settings_dict["NAME"]))
    return DatabaseStore(open_engine(url, {"creator": connect}))


def open_cache(alias: str, *, in_memory: ClaimStore | None) -> ClaimStore | None:
    """Return a store in the cache `alias` of Django's settings; None: it cannot compare and set.

    Args:
        in_memory: The store for a cache in the memory of the process; None: refuse such a cache.
    """
    cache = caches[alias]
    prefix = f"{cache.key_prefix}:{_PREFIX}" if cache.key_prefix else _PREFIX
    if _is(cache, "django.core.cache.backends.redis.RedisCache"):
        return _in_redis(_client_of_redis_cache(cache), prefix)
    if _is(cache, "django_redis.cache.RedisCache") and hasattr(cache.client, "get_client"):
        return _in_redis(cache.client.get_client(write=True), prefix)
    if _is(cache, "django.core.cache.backends.memcached.PyMemcacheCache"):
        from celery_sharding.dedup.stores.memcached import MemcachedStore

        place = settings.CACHES[alias]
        servers = re.split("[;,]", place["LOCATION"]) if isinstance(place["LOCATION"], str) else place["LOCATION"]
        return MemcachedStore(servers, place.get("OPTIONS", {}), namespace=cache.key_prefix)
    if _is(cache, "django.core.cache.backends.db.DatabaseCache"):
        # In a table of its own: Django culls that of the cache.
        return open_database(router.db_for_write(cache.cache_model_class))
    if _is(cache, "django.core.cache.backends.locmem.LocMemCache"):
        return in_memory
    return None


def _drivername(connection: Any) -> str | None:
    """Return SQLAlchemy's name of the driver that Django uses."""
    if connection.vendor == "postgresql":
        from django.db.backends.postgresql.psycopg_any import is_psycopg3

        return "postgresql+psycopg" if is_psycopg3 else "postgresql+psycopg2"
    return {"mysql": "mysql+mysqldb", "sqlite": "sqlite"}.get(connection.vendor)


def _in_redis(client: Any, prefix: str) -> ClaimStore:
    from celery_sharding.dedup.stores.redis import RedisStore

    return RedisStore(client, prefix=prefix)


def _client_of_redis_cache(cache: Any) -> Any:
    """Return the redis-py client of Django's own Redis cache, which hides it (read in Django 4.2 to 5.2)."""
    return cache._cache.get_client(None, write=True)


def _is(cache: Any, path: str) -> bool:
    try:
        return isinstance(cache, import_string(path))
    except ImportError:
        return False
