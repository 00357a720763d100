"""Which store keeps an app's claims, and whether a worker may start with it.

The result backend decides which store it is. It is opened when a claim is needed or a worker starts, never when a task
is defined or published: publishers need no backend.
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
        eager: The task runs in its caller (`apply`, `task_always_eager`): without a suitable backend the store is in
            memory, because no other process can run the same call.

    Raises:
        NoUsableStore: The backend cannot keep claims; the message lists those that can.
        StoreUnavailable: The backend could not be opened.
    """
    pid, store = getattr(app, _ATTRIBUTE, (None, None))
    if pid != os.getpid():  # There is none yet, or it is our parent's, whose connections are not ours.
        with _lock:
            pid, store = getattr(app, _ATTRIBUTE, (None, None))
            if pid != os.getpid():
                _inherited.append(store)
                store = open_store(app, eager=eager)
                setattr(app, _ATTRIBUTE, (os.getpid(), store))
    return cast(ClaimStore, store)


def check_tasks(app: Any, *, has_child_processes: bool = True) -> None:
    """Refuse to start a worker whose deduplicated tasks would have no store, or one that takes no claims.

    If the store does not answer, that is only logged: the tasks wait for it, or fail.

    Args:
        app: Finalized.
        has_child_processes: The worker's pool is prefork: each child would have a store in memory of its own.

    Raises:
        NoUsableStore: Names the tasks, and usable backends. `backend`, `tasks`.
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
        logger.warning(_AWAY, exc)
        return
    if has_child_processes and store.is_of_one_process:
        name = app.conf.result_backend
        raise _refusal(f"with {name}, each child process has a memory of its own. {SERVING}", tasks, name)
    if store.caveat is not None:
        logger.warning("@deduplicate of %s is limited: %s", ", ".join(tasks), store.caveat)
    try:
        store.check()
    except StoreRefused as exc:
        raise _refused(exc, tasks, app) from exc
    except StoreUnavailable as exc:
        logger.warning(_AWAY, exc)


def _refused(error: StoreRefused, tasks: Iterable[str], app: Any) -> NoUsableStore:
    return _refusal(f"claims cannot be written: {error.message}", tasks, without_password(app), refused=True)


def _refusal(message: str, tasks: Iterable[str], backend: Any, *, refused: bool = False) -> NoUsableStore:
    names = ", ".join(tasks)
    return NoUsableStore(
        f"{message}. Deduplicated tasks of this worker: {names}", backend=backend, tasks=names, refused=refused
    )


_ATTRIBUTE = "_celery_sharding_store"
_AWAY = "%s; deduplicated tasks wait for it or fail, as their on_store_error says"
_lock = threading.Lock()
# Kept: a connection that is collected says goodbye to its server, and so would close its parent's, too.
_inherited: list[Any] = []
