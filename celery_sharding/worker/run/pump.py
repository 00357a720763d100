"""When the lanes are pumped: at once when a run has ended, else once for a whole turn of the worker's event loop.

Messages come many at a time, so what they make ready starts together at the end of the turn. The run that follows
another of its key must not wait for them: it is handed to the pool, and written to a child, as soon as the one ahead of
it is acknowledged. The way from the end of one run to the start of the next bounds the rate of a hot key.

    message, message … ──▶ end of the turn ─┐
    result ─────────────────────────────────┴▶ pump, then write to the children

A solo pool runs the task inside the pump, while nothing is read. So each turn starts one run, and only after all that
had come was read and has taken effect: a signal, a command, a pause must not wait for all that the worker holds.

    result ──▶ the next turn: read ──nothing came──▶ pump, one run
                                └──something came──▶ two turns later the same again

A thread pool settles from its threads. There, on an embedded broker, and once the worker stops, everything is done at
once. With turns, all calls come from one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from celery_sharding.worker.ports import Loop


class Writer(Protocol):
    """Hands runs that wait in the pool's buffer to idle children."""

    def write(self) -> None: ...


class Turn:
    """The end of the event loop's turns.

    Args:
        loop: None to have no turns.
        pump: Starts what may run.

    Attributes:
        starts_at_once: How many runs may start in one pump; None: as many as the pool takes.
    """

    def __init__(self, loop: Loop | None, pump: Callable[[], None]) -> None:
        self._loop = loop
        self._pump = pump
        self._writer: Writer | None = None
        self._is_ending = False
        self.starts_at_once = 1 if loop is not None and loop.reads_first else None

    def end_soon(self) -> None:
        """Pump at the end of this turn; at once without turns."""
        if self._loop is None:
            self._pump()
        elif not self._is_ending:
            self._is_ending = True
            self._loop.call_next(self._end)

    def end(self) -> None:
        """Pump now, and let nothing that this starts wait in the pool's buffer; in a solo pool, in the next turn."""
        if self._loop is not None and self._loop.reads_first:
            self.end_soon()
            return
        self._pump()
        if self._writer is not None:
            self._writer.write()

    def begin(self, writer: Writer | None) -> None:
        """Begin with a new connection. An error of another callback may have swallowed the end of the last turn.

        Args:
            writer: None to leave it to the pool.
        """
        self._writer = writer
        self._is_ending = False
        self.end_soon()

    def stop(self) -> None:
        """Have no more turns: the event loop is about to end."""
        self._loop = self._writer = None

    def _end(self) -> None:
        if not self._is_ending:
            return
        loop = self._loop
        if loop is not None and loop.reads_first and loop.read() and self._loop is not None:
            # What was read may have asked for a call in the next turn, which calls in no certain order.
            loop.call_next(self._go_on)
            return
        self._is_ending = False
        self._pump()
        if self._writer is not None:
            self._writer.write()

    def _go_on(self) -> None:
        if self._loop is not None:
            self._loop.call_next(self._end)
        else:
            self._end()
