"""Which store keeps an app's claims, and whether a worker may start with it.

The store follows from the result backend. It is looked for when a claim is needed or a worker starts, never when a
task is defined or published: publishers need no backend.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from typing import Any, cast

from celery_sharding.dedup.claims import ClaimStore
from celery_sharding.dedup.mark import deduplicated_tasks
from celery_sharding.dedup.stores.opening import SERVING, open_store, without_password
from celery_sharding.errors import NoUsableStore, StoreRefused, StoreUnavailable

logger = logging.getLogger(__name__)


def store_for(app: Any, *, eager: bool = False) -> ClaimStore:
    """Return the store of `app`, the same one at each call in this process.

    Args:
        app: The Celery app.
        eager: The task runs in its caller (`apply`, `task_always_eager`): an app without a backend that serves gets a
            store in memory, because nobody else can run the same call.

    Raises:
        NoUsableStore: The backend cannot keep claims; the message lists what serves.
        StoreUnavailable: The backend could not be opened.
    """
    pid, store = getattr(app, _ATTRIBUTE, (None, None))
    if pid != os.getpid():  # None yet, or our parent's, whose connections are not ours.
        with _lock:
            pid, store = getattr(app, _ATTRIBUTE, (None, None))
            if pid != os.getpid():
                _inherited.append(store)
                store = open_store(app, eager=eager)
                setattr(app, _ATTRIBUTE, (os.getpid(), store))
    return cast(ClaimStore, store)


def check_tasks(app: Any, *, has_child_processes: bool = True) -> None:
    """Refuse to start a worker whose deduplicated tasks would have no store, or one that takes no claims.

    A store that does not answer is waited for by the tasks.

    Args:
        app: The Celery app, finalized.
        has_child_processes: The worker's pool is prefork: a store in memory would be another one in each child.

    Raises:
        NoUsableStore: Names the tasks, and what serves. `backend`, `tasks`.
    """
    tasks = deduplicated_tasks(app)
    if not tasks:
        return
    try:
        store = store_for(app, eager=bool(app.conf.task_always_eager))
    except NoUsableStore as exc:
        raise _refusal(exc.message, tasks, exc.backend) from exc
    except StoreRefused as exc:
        raise _refused(exc, tasks, app) from exc
    except StoreUnavailable as exc:
        logger.warning("%s; deduplicated tasks will wait for it or fail, as they say", exc)
        return
    if has_child_processes and store.is_of_one_process:
        name = app.conf.result_backend
        raise _refusal(f"{name} is another memory in each child process. {SERVING}", tasks, name)
    if store.caveat is not None:
        logger.warning("@deduplicate of %s holds as well as it can: %s", ", ".join(tasks), store.caveat)
    try:
        store.check()
    except StoreRefused as exc:
        raise _refused(exc, tasks, app) from exc
    except StoreUnavailable as exc:
        logger.warning("%s; deduplicated tasks will wait for it or fail, as they say", exc)


def _refused(error: StoreRefused, tasks: Iterable[str], app: Any) -> NoUsableStore:
    return _refusal(f"claims cannot be written: {error.message}", tasks, without_password(app), refused=True)


def _refusal(message: str, tasks: Iterable[str], backend: Any, *, refused: bool = False) -> NoUsableStore:
    names = ", ".join(tasks)
    return NoUsableStore(
        f"{message}. Deduplicated tasks of this worker: {names}", backend=backend, tasks=names, refused=refused
    )


_ATTRIBUTE = "_celery_sharding_store"
_lock = threading.Lock()
# Kept: a connection that is collected takes leave of its server, which would be its parent's leave, too.
_inherited: list[Any] = []
