"""The state of a message that became a dead letter before it was a request: FAILURE, with the reason.

What Celery does when a task fails is done for it as far as the message can be read: its errbacks are called, and the
chord or chain that it is part of fails. A SUCCESS that is stored already, by an earlier run, stands.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from celery import states as state
from celery.app.task import Context
from celery.backends.base import DisabledBackend
from celery.backends.rpc import RPCBackend

from celery_sharding.texts import describe
from celery_sharding.worker.run.delivery import Delivery
from celery_sharding.worker.run.state_writer import StateWriter

logger = logging.getLogger(__name__)

_EMBEDDED = ("errbacks", "chord", "chain")


def tell_dead(states: StateWriter, delivery: Delivery, failure: BaseException) -> None:
    """Store FAILURE for a dead letter, in due course, if its message names a task id."""
    task_id = delivery.task_id
    if task_id:
        what = f"FAILURE of {delivery.headers.get('task')}[{task_id}]"
        states.tell(what, partial(_store, states, task_id, delivery.message, failure))


def _store(states: StateWriter, task_id: str, message: Any, failure: BaseException) -> None:
    backend = states.app.backend
    if _has_succeeded(backend, task_id):
        return
    properties = message.properties or {}
    request = Context(
        {
            **(message.headers or {}),
            **_read_embedded(message),
            "id": task_id,
            "reply_to": properties.get("reply_to"),
            "correlation_id": properties.get("correlation_id") or task_id,
        }
    )
    backend.mark_as_failure(task_id, failure, request=request, store_result=not request.ignore_result)


def _read_embedded(message: Any) -> dict[str, Any]:
    """Return whom the message wants to be told of its end; nothing if it cannot be read."""
    try:
        payload = message.payload
        embedded = payload if isinstance(payload, dict) else payload[2]
        return {name: embedded.get(name) for name in _EMBEDDED}
    except Exception as exc:  # whatever a serializer raises
        logger.debug("the body of a dead letter cannot be read: %s", describe(exc))
        return dict.fromkeys(_EMBEDDED)


def _has_succeeded(backend: Any, task_id: str) -> bool:
    # Neither can be asked: results of `rpc://` are in their caller's queue.
    if isinstance(backend, DisabledBackend | RPCBackend):
        return False
    return bool(backend.get_task_meta(task_id, cache=False)["status"] == state.SUCCESS)
