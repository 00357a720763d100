"""A stream read by whoever drains the connection, from some offset on, for as long as the connection lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_PREFETCH = 500


class Tail:
    """Calls `on_event(body, offset)` for every message of a stream; acknowledges in batches."""

    def __init__(self, connection: Any, stream: str, offset: Any, on_event: Callable[[bytes, int], None]) -> None:
        self._on_event = on_event
        self._unacknowledged = 0
        self._channel = channel = connection.channel()
        channel.basic_qos(0, _PREFETCH, False)
        channel.basic_consume(stream, callback=self._on_message, arguments={"x-stream-offset": offset})

    def close(self) -> None:
        """Read no more."""
        self._channel.close()

    def _on_message(self, message: Any) -> None:
        self._unacknowledged += 1
        if self._unacknowledged >= _PREFETCH // 2:
            self._channel.basic_ack(message.delivery_tag, multiple=True)
            self._unacknowledged = 0
        body = message.body
        self._on_event(
            body if isinstance(body, bytes) else body.encode(), int(message.headers.get("x-stream-offset", 0))
        )
