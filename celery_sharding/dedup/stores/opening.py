"""From a result backend to the store that keeps claims in it. No driver is imported before its backend is in use."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery.exceptions import ImproperlyConfigured

from celery_sharding.dedup.claims import ClaimStore
from celery_sharding.errors import NoUsableStore, StoreRefused, StoreUnavailable

ANSWER_SECONDS = 5.0
"""How long a claim waits for an answer of Redis before the store counts as unavailable."""

SERVING = (
    "@deduplicate keeps its claims in the result backend. Usable ones: redis://, rediss://, sentinel:// (Redis, "
    "Valkey), db+… (SQLite file, PostgreSQL, MySQL, MariaDB), django-db, django-cache (in Redis, Memcached or a "
    "database), file:// on a local disk, cache+memcached:// without a guarantee, and cache+memory:// within one "
    "process (--pool threads or solo)"
)


def open_store(app: Any, *, eager: bool) -> ClaimStore:
    """Return a new store for `app` in this process.

    Raises:
        NoUsableStore, StoreUnavailable: As `store_for`.
    """
    backend = _open_backend(app)
    for module, name, open_in in _STORES:
        if _is_instance(backend, module, name):
            with _password_hidden():
                store = open_in(app, backend)
            if store is not None:
                return store
    if eager:
        return _in_memory()
    url = getattr(backend, "url", None) or app.conf.result_backend or type(backend).__name__
    url = _without_password(str(url))
    raise NoUsableStore(f"the result backend {url!r} cannot keep claims. {SERVING}", backend=url)


def _in_redis(app: Any, backend: Any) -> ClaimStore:
    from celery_sharding.dedup.stores.redis import RedisStore

    # Connections of our own: those of the backend wait for an answer as long as results may take, 120 s by default, and
    # meanwhile a run holds its slot. Made as the backend makes its client (read in Celery 5.7.0), also with Sentinel.
    parameters = dict(backend.connparams)
    for name in ("socket_timeout", "socket_connect_timeout"):
        given = parameters.get(name)
        parameters[name] = ANSWER_SECONDS if given is None else min(given, ANSWER_SECONDS)
    return RedisStore(backend._create_client(**parameters), prefix=f"{_prefix(app)}celery-sharding:dedup:")


def _in_database(app: Any, backend: Any) -> ClaimStore:
    from celery_sharding.dedup.stores.database import DatabaseStore, open_engine

    engine = open_engine(backend.url, backend.engine_options)
    callback = getattr(backend.session_manager, "engine_callback", None)
    if callback is not None:
        callback(engine)
    # In the schema where Celery keeps the results of tasks.
    return DatabaseStore(engine, schema=(app.conf.database_table_schemas or {}).get("task"))


def _in_cache(app: Any, backend: Any) -> ClaimStore | None:
    if backend.backend == "memory":
        return None if _is_child_process() else _in_memory()
    from celery_sharding.dedup.stores.memcached import MemcachedStore

    return MemcachedStore(backend.servers, backend.options, namespace=_prefix(app))


def _in_files(app: Any, backend: Any) -> ClaimStore:
    from celery_sharding.dedup.stores.filesystem import FilesystemStore

    return FilesystemStore(Path(os.fsdecode(backend.path)) / "celery-sharding-dedup")


def _in_django_database(app: Any, backend: Any) -> ClaimStore | None:
    from django.db import router

    from celery_sharding.dedup.stores.django import open_database

    return open_database(router.db_for_write(backend.TaskModel))


def _in_django_cache(app: Any, backend: Any) -> ClaimStore | None:
    from celery_sharding.dedup.stores.django import open_cache

    alias = app.conf.cache_backend or "default"
    return open_cache(alias, in_memory=None if _is_child_process() else _in_memory())


def _in_memory() -> ClaimStore:
    from celery_sharding.dedup.stores.memory import MemoryStore

    return MemoryStore()


# Module and name of a backend's class, and what opens its store; None: it cannot keep claims as it is configured.
_STORES: tuple[tuple[str, str, Callable[[Any, Any], ClaimStore | None]], ...] = (
    ("celery.backends.redis", "RedisBackend", _in_redis),
    ("celery.backends.database", "DatabaseBackend", _in_database),
    ("celery.backends.cache", "CacheBackend", _in_cache),
    ("celery.backends.filesystem", "FilesystemBackend", _in_files),
    ("django_celery_results.backends.database", "DatabaseBackend", _in_django_database),
    ("django_celery_results.backends.cache", "CacheBackend", _in_django_cache),
)


def _open_backend(app: Any) -> Any:
    try:
        with _password_hidden():
            return app.backend
    except StoreUnavailable:
        raise
    except ImproperlyConfigured as exc:
        # A missing folder or driver.
        reason = " ".join(str(exc).split()).rstrip(".")
        url = without_password(app)
        raise NoUsableStore(f"the result backend {url!r} does not work: {reason}. {SERVING}", backend=url) from exc
    except Exception as exc:
        # Some backends connect when they are made (databases create their tables), and each driver has its own errors.
        cls = StoreRefused if _is_refusal(exc) else StoreUnavailable
        raise cls(f"the result backend could not be opened: {type(exc).__name__}: {exc}") from exc


def _is_refusal(error: Exception) -> bool:
    """Say whether a database refused to let Celery make its tables, which it does when it opens its backend."""
    if "sqlalchemy" not in sys.modules:
        return False
    from sqlalchemy.exc import SQLAlchemyError

    from celery_sharding.dedup.stores.database import is_refusal

    return isinstance(error, SQLAlchemyError) and is_refusal(error)


@contextmanager
def _password_hidden() -> Iterator[None]:
    """Replace an error that may quote the URL, with a part of its password, by one that does not."""
    try:
        yield
    except ValueError as exc:
        raise StoreUnavailable(
            "the URL of the result backend cannot be read; percent-encode what is special in its user and password "
            f"('/' as %2F), and write its servers as host:port ({type(exc).__name__})"
        ) from None


def _is_instance(backend: Any, module: str, name: str) -> bool:
    """Like isinstance, without importing a backend whose driver may not be installed."""
    known = getattr(sys.modules.get(module), name, None)
    return known is not None and isinstance(backend, known)


def _is_child_process() -> bool:
    billiard = sys.modules.get("billiard.process")
    return billiard is not None and billiard.current_process().name != "MainProcess"


def _prefix(app: Any) -> str:
    options = app.conf.get("result_backend_transport_options") or {}
    return options.get("global_keyprefix") or ""


def without_password(app: Any) -> str:
    return _without_password(str(app.conf.result_backend))


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    # A driver may also take it from the query.
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}" if separator else url
