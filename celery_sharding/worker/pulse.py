"""Signs of life on a worker's connection while its main thread waits.

Before the event loop runs nobody sends heartbeats, and a broker that hears nothing for two of them closes the
connection: a worker that waited for the lock of a group would have to begin anew, and might never come to an end.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

_T = TypeVar("_T")


def call_with_pulse(connection: Any, call: Callable[[], _T]) -> _T:
    """Return what `call` returns, which runs in another thread and must not use `connection`.

    Nothing is read meanwhile, so what the connection delivers comes when the event loop runs.

    Args:
        connection: Of kombu; used by this thread only.
    """
    inner = connection.connection
    heartbeat_seconds = getattr(inner, "heartbeat", None)
    if not heartbeat_seconds or not hasattr(inner, "send_heartbeat"):
        return call()
    with ThreadPoolExecutor(1, thread_name_prefix="shards-start") as executor:
        result = executor.submit(call)
        while not wait([result], timeout=heartbeat_seconds / 2).done:
            inner.send_heartbeat()
    return result.result()
