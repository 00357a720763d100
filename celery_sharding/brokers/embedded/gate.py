"""No fork while another thread reads or writes an embedded broker.

    open ──a thread enters──▶ inside ──it leaves──▶ open
    open ──a thread forks───▶ shut ──the parent and the child, each for itself──▶ open

SQLite keeps its locks on a file in the memory of its process, with mutexes beside them. A child that is forked while
another thread is in a transaction inherits them, and nobody releases them: it hangs, finds the database locked for
ever, or believes it holds its parent's lock. A worker without an event loop, as on the embedded brokers, forks in a
thread of the pool whenever a process of the pool has ended.

So whoever reads or writes the broker is inside the gate: one thread at a time, reentrant. A fork waits until that
thread has left, at most for SQLite's time-out. A thread that is inside forks at once, and its child is inside, too.
Nothing inside waits for a thread outside.

A signal handler that raises, at any point, leaves the gate as it should be. Python prints what the hooks of a fork
raise, and forks nevertheless, so the wait goes on to its end, too.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict

# Not a class with `__enter__` and `__exit__`: a signal handler may raise at the beginning of a function, and after a
# call of one, but not between a `with` and a lock of C's.
gate = threading.RLock()
"""Entered by `with`, from any thread, and shut by each fork of the process."""

_held: defaultdict[int, list[bool]] = defaultdict(list)  # by thread, not empty if its fork has shut the gate


def _shut() -> None:
    try:
        if not _held[threading.get_ident()]:
            # Got and noted in one call, so that neither is done without the other.
            _held[threading.get_ident()].extend(map(gate.acquire, [True]))
    finally:
        if not _held[threading.get_ident()]:
            _shut()


def _open() -> None:
    me = threading.get_ident()
    if _held.get(me):
        del _held[me]  # a statement: no handler runs between it and the release
        gate.release()


for _ in range(2):  # if a signal handler raises as one begins, the other does it
    os.register_at_fork(before=_shut, after_in_parent=_open, after_in_child=_open)
