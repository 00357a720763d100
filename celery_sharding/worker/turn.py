"""When the lanes are pumped: at once when a run has ended, else once for a whole turn of the worker's event loop.

Messages come many at a time, so what they make ready starts together at the end of the turn. The run that follows
another of its key must not wait for them: it is handed to the pool, and written to a child, as soon as the one ahead of
it is acknowledged. The way from the end of one run to the start of the next bounds the rate of a hot key.

    message, message … ──▶ end of the turn ─┐
    result ─────────────────────────────────┴▶ pump, then write to the children

Only prefork pools have turns: a solo pool runs tasks inside the pump, a thread pool settles from its threads. There, on
an embedded broker, and once the worker stops, everything is done at once. With turns, all calls come from one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Turn:
    """The end of the event loop's turns.

    Args:
        call_soon: Calls a function when the event loop comes round; None to have no turns.
        pump: Starts what may run.
    """

    def __init__(self, call_soon: Callable[[Callable[[], None]], Any] | None, pump: Callable[[], None]) -> None:
        self._call_soon = call_soon
        self._pump = pump
        self._write: Callable[[], None] | None = None
        self._is_ending = False

    def end_soon(self) -> None:
        """Pump at the end of this turn; at once without turns."""
        if self._call_soon is None:
            self._pump()
        elif not self._is_ending:
            self._is_ending = True
            self._call_soon(self._end)

    def end(self) -> None:
        """Pump now, and let nothing that this starts wait in the pool's buffer."""
        self._pump()
        if self._write is not None:
            self._write()

    def begin(self, write: Callable[[], None] | None) -> None:
        """Begin with a new connection. An error of another callback may have swallowed the end of the last turn.

        Args:
            write: Hands runs that wait in the pool's buffer to idle children; None to leave it to the pool.
        """
        self._write = write
        self._is_ending = False
        self.end_soon()

    def stop(self) -> None:
        """Have no more turns: the event loop is about to end."""
        self._call_soon = self._write = None

    def _end(self) -> None:
        if self._is_ending:
            self._is_ending = False
            self.end()
