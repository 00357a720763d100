"""Which store keeps an app's claims, and whether a worker may start with it.

The store follows from the result backend. It is looked for when a claim is needed or a worker starts, never when a
task is defined or published: publishers need no backend.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterable
from typing import Any, cast

from celery.exceptions import ImproperlyConfigured

from celery_sharding.dedup.claims import Store
from celery_sharding.errors import NoUsableStore, StoreUnavailable

logger = logging.getLogger(__name__)

_SERVING = (
    "@deduplicate keeps its claims in the result backend. What serves: redis://, rediss://, sentinel:// (Redis, "
    "Valkey), db+… (SQLite file, PostgreSQL, MySQL, MariaDB), and cache+memory:// within one process (--pool "
    "threads or solo)"
)


def store_for(app: Any, *, eager: bool = False) -> Store:
    """Return the store of `app`, the same one at each call in this process.

    Args:
        app: The Celery app.
        eager: The task runs in its caller (`apply`, `task_always_eager`): an app without a backend that serves gets a
            store in memory, because nobody else can run the same call.

    Raises:
        NoUsableStore: The backend has no atomic primitive; the message lists what serves.
        StoreUnavailable: The backend could not be opened.
    """
    pid, store = getattr(app, _ATTRIBUTE, (None, None))
    if pid != os.getpid():  # None yet, or our parent's, whose connections are not ours.
        with _lock:
            pid, store = getattr(app, _ATTRIBUTE, (None, None))
            if pid != os.getpid():
                store = _open_store(app, eager=eager)
                setattr(app, _ATTRIBUTE, (os.getpid(), store))
    return cast(Store, store)


def purge(app: Any) -> int:
    """Delete the claim records of `app` whose time to live is over, and return how many they were.

    Needed in databases and files; 0 where records expire by themselves. May run at any time, and more than once at the
    same time.

    Raises:
        NoUsableStore: As `store_for`.
        StoreUnavailable: The store did not answer; what was deleted so far is deleted.
    """
    delete_expired = getattr(store_for(app), "purge", None)
    return 0 if delete_expired is None else int(delete_expired())


def is_deduplicated(task: Any) -> bool:
    """Say whether the body of `task` carries `@deduplicate`."""
    return getattr(task.run, "__deduplicate__", None) is not None


def check_tasks(app: Any, *, has_child_processes: bool = True) -> None:
    """Refuse to start a worker whose deduplicated tasks would have no store.

    Args:
        app: The Celery app, finalized.
        has_child_processes: The worker's pool is prefork: a store in memory would be another one in each child.

    Raises:
        NoUsableStore: Names the tasks, and what serves. `backend`, `tasks`.
    """
    tasks = sorted(name for name, task in app.tasks.items() if is_deduplicated(task))
    if not tasks:
        return
    try:
        store = store_for(app, eager=bool(app.conf.task_always_eager))
    except NoUsableStore as exc:
        raise _refusal(exc.message, tasks, exc.backend) from exc
    except StoreUnavailable as exc:
        logger.warning("%s; deduplicated tasks will wait for it or fail, as they say", exc)
        return
    if has_child_processes and type(store).__name__ == "MemoryStore":
        raise _refusal("cache+memory:// is another memory in each child process. " + _SERVING, tasks, "cache+memory://")


def _refusal(message: str, tasks: Iterable[str], backend: Any) -> NoUsableStore:
    names = ", ".join(tasks)
    return NoUsableStore(f"{message}. Deduplicated tasks of this worker: {names}", backend=backend, tasks=names)


def _open_store(app: Any, *, eager: bool) -> Store:
    backend = _open_backend(app)
    if _is_instance(backend, "celery.backends.redis", "RedisBackend"):
        from celery_sharding.dedup.stores.redis import RedisStore

        options = app.conf.get("result_backend_transport_options") or {}
        prefix = options.get("global_keyprefix") or ""
        return RedisStore(lambda: backend.client, prefix=f"{prefix}celery-sharding:dedup:")
    if _is_instance(backend, "celery.backends.database", "DatabaseBackend"):
        from celery_sharding.dedup.stores.database import DatabaseStore, open_engine

        engine = open_engine(backend.url, backend.engine_options)
        callback = getattr(backend.session_manager, "engine_callback", None)
        if callback is not None:
            callback(engine)
        return DatabaseStore(engine)
    is_memory = _is_instance(backend, "celery.backends.cache", "CacheBackend") and backend.backend == "memory"
    if eager or (is_memory and not _is_child_process()):
        from celery_sharding.dedup.stores.memory import MemoryStore

        return MemoryStore()
    name = getattr(backend, "url", None) or app.conf.result_backend or type(backend).__name__
    raise NoUsableStore(
        f"the result backend {_without_password(str(name))!r} has no atomic primitive. {_SERVING}",
        backend=_without_password(str(name)),
    )


def _open_backend(app: Any) -> Any:
    try:
        return app.backend
    except ImproperlyConfigured:
        raise
    except Exception as exc:
        # Some backends connect when they are made (databases create their tables), and each driver has errors of its
        # own.
        raise StoreUnavailable(f"the result backend could not be opened: {type(exc).__name__}: {exc}") from exc


def _is_instance(backend: Any, module: str, name: str) -> bool:
    """Like isinstance, without importing a backend whose driver may not be installed."""
    known = getattr(sys.modules.get(module), name, None)
    return known is not None and isinstance(backend, known)


def _is_child_process() -> bool:
    billiard = sys.modules.get("billiard.process")
    return billiard is not None and billiard.current_process().name != "MainProcess"


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if separator else url


_ATTRIBUTE = "_celery_sharding_store"
_lock = threading.Lock()
