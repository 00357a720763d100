"""What one turn of the worker's event loop does at its end: acknowledge what it settled, then start what may run.

A prefork worker handles many results and messages in one turn; the lanes are pumped once for all of them:

    result, result, message … ──▶ end of the turn: all acknowledgements are written, then the next runs start

The order of the two is what matters: a run never starts before the one ahead of it in its lane is acknowledged, also if
this process dies in between. So `flush` is called before each start, too, which may settle something itself, and before
a channel closes; `forget` when a channel was lost.

Only prefork pools have turns: a solo pool runs tasks inside the pump, a thread pool settles from its threads. There, on
an embedded broker, and once the worker stops, everything is done at once. With turns, all calls come from one thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import amqp
from amqp.exceptions import AMQPError

logger = logging.getLogger(__name__)

# py-amqp raises AttributeError on a channel whose connection it has already cleared.
CHANNEL_ERRORS = (OSError, AMQPError, AttributeError)


class Turn:
    """The end of the event loop's turns.

    Args:
        call_soon: Calls a function when the event loop comes round; None to have no turns.
        pump: Starts what may run.
    """

    def __init__(self, call_soon: Callable[[Callable[[], None]], Any] | None, pump: Callable[[], None]) -> None:
        self._call_soon = call_soon
        self._pump = pump
        self._is_ending = False
        self._tags: dict[Any, list[int]] = {}
        self._on_failure: dict[Any, Callable[[], None]] = {}

    def end_soon(self) -> None:
        """Pump, and write acknowledgements, at the end of this turn; at once without turns."""
        if self._call_soon is None:
            self._pump()
        elif not self._is_ending:
            self._is_ending = True
            self._call_soon(self._end)

    def acknowledge(self, channel: Any, tag: Any, on_failure: Callable[[], None]) -> None:
        """Acknowledge a delivery before anything else starts; call `on_failure` if that cannot be written."""
        if self._call_soon is None or not isinstance(channel, amqp.Channel):
            self._write(channel, [tag], on_failure)
            return
        self._tags.setdefault(channel, []).append(tag)
        self._on_failure[channel] = on_failure
        self.end_soon()

    def flush(self) -> None:
        """Write the acknowledgements now."""
        tags_of, self._tags = self._tags, {}
        on_failure, self._on_failure = self._on_failure, {}
        for channel, tags in tags_of.items():
            self._write(channel, tags, on_failure[channel])

    def _write(self, channel: Any, tags: list[Any], on_failure: Callable[[], None]) -> None:
        try:
            for tag in tags:
                channel.basic_ack(tag)
        except CHANNEL_ERRORS as exc:
            logger.warning("an acknowledgement did not reach the broker: %r", exc)
            on_failure()

    def forget(self, channel: Any) -> None:
        """Drop the acknowledgements of a channel that is gone: its messages are the broker's again."""
        self._tags.pop(channel, None)
        self._on_failure.pop(channel, None)

    def restart(self) -> None:
        """Begin with a new connection. An error of another callback may have swallowed the end of the last turn."""
        self._is_ending = False
        self.end_soon()

    def stop(self) -> None:
        """Have no more turns: the event loop is about to end."""
        self.flush()
        self._call_soon = None

    def end_before(self, write: Callable[..., None]) -> Callable[..., None]:
        """Return `write`, which hands runs to the pool's processes, with the turn ended before it.

        What the turn makes ready then leaves with the same batch, instead of the next one.
        """

        def end_and_write(*args: Any) -> None:
            self._end()
            write(*args)

        return end_and_write

    def _end(self) -> None:
        if self._is_ending:
            self._is_ending = False
            self.flush()
            self._pump()
