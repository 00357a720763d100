"""The remote command `revoke`, which asks the result backend for each task, in the main process of every worker.

Here the thread of the states asks, and stores REVOKED where nothing else is stored; the rest is done at once, and as
Celery does it: the ids are noted, so that no worker begins the tasks, and what runs is terminated if that is wanted.

Celery's `revoke` marks what the worker does not run by `get_state` and `mark_as_revoked`, and its `terminate` calls
`revoke` of its module.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from celery.platforms import signals
from celery.utils.functional import maybe_list
from celery.worker import state as worker_state
from celery.worker.control import Panel, control_command

_STOP = "TERM"


def install_revoke(*_: Any) -> None:
    """Put our `revoke` and `terminate` in front of Celery's, once in a process; what was public stays so."""
    stock = Panel.data["revoke"]
    if hasattr(stock, "tells_states"):
        return

    def revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **options: Any) -> dict[str, str]:
        states = getattr(state.consumer, "shards_states", None)
        if states is None:
            return stock(state, task_id, terminate, signal, **options)  # type: ignore[no-any-return]
        ids = set(maybe_list(task_id) or [])
        worker_state.revoked.update(ids)
        states.tell(f"REVOKED of {', '.join(map(str, ids))}", partial(stock, state, ids))
        if not terminate:
            return {"ok": f"tasks {ids} flagged as revoked"}
        number = signals.signum(signal or _STOP)
        found = [request for id_ in ids if (request := worker_state.requests.get(id_)) is not None]
        for request in found:
            request.terminate(state.consumer.pool, signal=number)
        return {"ok": f"terminate: {', '.join(request.id for request in found) or 'tasks unknown'}"}

    def terminate(state: Any, signal: Any, task_id: Any, **options: Any) -> dict[str, str]:
        return revoke(state, task_id, terminate=True, signal=signal, **options)

    revoke.tells_states = True  # type: ignore[attr-defined]
    for command in (revoke, terminate):
        facts = Panel.meta[command.__name__]
        control_command(
            name=command.__name__, help=facts.help, signature=facts.signature, args=facts.args, variadic=facts.variadic
        )(command)
