"""What the library does to Celery's prefork pool beyond its public face, and why.

guard_flush     Celery flushes the pool when the consumer closes or loses its connection: runs that were sent to a
                child and not yet reported as accepted are struck off, though the child runs them. Nobody would
                learn of their end, so they would be left unacknowledged by a warm shutdown and repeated elsewhere.
collect_killed  Children that we have killed are replaced before the pool is registered with the event loop anew.
listen_anew     The pool listens for the end of each child once: after an event it has no descriptor for it any more. If
                the child is not collected yet, or lives, since the event was meant for an earlier owner of the
                descriptor, the pool could not be registered anew: the worker would end with the same error.
DirectWriter    The pool writes a run to a child when the event loop says that the child's pipe takes data: a round
                later, behind the messages that came in meanwhile.
cut_off         For another thread, while the main thread is blocked: what a child runs, or was handed, is known to the
                pool's own jobs only.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Collection
from typing import Any

from celery_sharding.celery_hooks.site import WorkerSite

logger = logging.getLogger(__name__)

_ACCEPT_SECONDS = 2.0
_COLLECT_SECONDS = 5.0


class PreforkPool:
    """The children of the prefork pool of `consumer`, Celery's."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._killed: list[int] = []

    def kill(self, pid: int) -> None:
        """Kill a child and the run in it."""
        self._killed.append(pid)
        self._consumer.pool.terminate_job(pid, signal.SIGKILL)

    def cut_off(self, requests: Collection[Any]) -> set[int] | None:
        """Kill the processes that run `requests` or were handed them; what none was handed never begins.

        For another thread, while the main thread is blocked. Returns the processes, None if there was nothing to end.
        """
        waiting = self._consumer.pool._pool.outbound_buffer
        pids = set()
        was_any = False
        for request in requests:
            job = request._apply_result and request._apply_result()
            if request.time_start is not None:
                pids.add(request.worker_pid)
            elif job is not None:
                try:
                    waiting.remove(job)
                    was_any = True
                except ValueError:
                    pids |= {process.pid for process in (job._write_to, job._scheduled_for) if process is not None}
        if not pids and not was_any:
            return None
        for request in requests:
            request.is_cut_off = True
        for pid in pids:
            self.kill(pid)
        return pids

    def prepare(self) -> None:
        """At each connect: make the pool ready to be registered with the event loop."""
        self._collect_killed()
        listen_anew(self._consumer.pool)

    def _collect_killed(self) -> None:
        """Let the pool replace the children that were killed, before it is registered again."""
        deadline = time.monotonic() + _COLLECT_SECONDS
        while not all(is_gone(pid) for pid in self._killed) and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._killed:
            self._killed.clear()
            self._consumer.pool.maintain_pool()


def guard_flush(site: WorkerSite) -> None:
    """Let the pool tell which runs it has begun before Celery flushes it; at each connect, since it starts late."""
    pool = site.consumer.pool
    if not (site.consumer.hub and site.pool.has_children) or getattr(pool.flush, "is_guarded", False):
        return
    stock = pool.flush

    def flush() -> None:
        site.shards.freeze()
        _await_accepted(site)
        stock()

    flush.is_guarded = True  # type: ignore[attr-defined]
    pool.flush = flush


def _await_accepted(site: WorkerSite) -> None:
    """Run the event loop until every run in the pool was accepted by a child."""
    if not site.runs.unaccepted():
        return
    c = site.consumer
    if c.connection is None:
        # The hub was reset with the connection. Children that died meanwhile must be replaced first: they have no
        # pipes to listen to.
        c.pool.maintain_pool()
        listen_anew(c.pool)
        try:
            c.pool.register_with_event_loop(c.hub)
        except (ValueError, OSError) as exc:
            logger.warning("the pool could not be asked for the runs it has begun: %r", exc)
            return
    deadline = time.monotonic() + _ACCEPT_SECONDS
    loop = c.hub.create_loop()
    while site.runs.unaccepted() and time.monotonic() < deadline:
        c.timer.call_after(0.02, _wake)
        try:
            next(loop)
        except StopIteration:
            loop = c.hub.create_loop()
        except c.connection_errors as exc:
            logger.debug("the connection was lost while the pool was asked: %r", exc)
            return


def listen_anew(pool: Any) -> None:
    """Let the pool make a descriptor, when it is registered, for each child whose end it does not listen for.

    Args:
        pool: Celery's.
    """
    for child in pool._pool._pool:  # there is no public way to them
        if getattr(child, "_sentinel_poll", 0) is None:
            del child._sentinel_poll


class DirectWriter:
    """Writes the runs in the pool's buffer to its idle children, without waiting for the event loop.

    Args:
        pool: Celery's, registered with `hub`.
    """

    def __init__(self, pool: Any, hub: Any) -> None:
        inner = pool._pool  # there is no public way to its pipes
        self._waiting, self._pipes = inner.outbound_buffer, inner._all_inqueues
        self._hub = hub

    def write(self) -> None:
        if self._waiting:
            self._hub.consolidate_callback(list(self._pipes))


def is_gone(pid: int) -> bool:
    """Say whether a child process has ended, without reaping it: the pool does that."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except (ChildProcessError, OverflowError):
        return True


def _wake() -> None:
    """Make the event loop come round."""
