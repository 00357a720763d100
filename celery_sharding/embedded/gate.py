"""No fork in the middle of what another thread does with an embedded broker.

    open ──a thread enters──▶ inside ──it leaves──▶ open
    open ──a thread forks───▶ shut ──the parent and the child, each for itself──▶ open

SQLite keeps the locks that it holds on a file in the memory of its process, and mutexes beside them. A child that is
forked while another thread is in a transaction inherits them, with nobody to release them: it hangs, finds the database
locked for ever, or believes in a lock that is its parent's. A worker without an event loop, as on the embedded brokers,
forks in a thread of the pool whenever a process of the pool has ended.

So whoever reads or writes the broker is inside: one thread at a time, as deep as it likes. A fork waits until that
thread has left, before all that wait to enter; SQLite's time-out bounds how long that is. A thread that is inside forks
at once, and its child is inside, too. Nothing inside waits for a thread outside.
"""

from __future__ import annotations

import os
import threading


class Gate:
    """Entered by `with`, from any thread, and shut by each fork of the process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: int | None = None
        self._depth = 0
        self._forks = 0
        os.register_at_fork(before=self._shut, after_in_parent=self._open, after_in_child=self._open_in_child)

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if self._inside != me:
                self._changed.wait_for(lambda: self._inside is None and not self._forks)
                self._inside = me
            self._depth += 1

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._inside = None
                self._changed.notify_all()

    def _shut(self) -> None:
        # Held through the fork, so that the child does not inherit it from another thread.
        self._changed.acquire()
        self._forks += 1
        me = threading.get_ident()
        self._changed.wait_for(lambda: self._inside in (None, me))

    def _open(self) -> None:
        self._forks -= 1
        self._changed.notify_all()
        self._changed.release()

    def _open_in_child(self) -> None:
        self._forks = 0  # the others that waited to fork are in the parent
        self._changed.release()


gate = Gate()
