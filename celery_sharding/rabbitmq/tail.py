"""Following a stream from some offset on, for as long as the connection lives and is drained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PREFETCH = 500
_OFFSET = "x-stream-offset"


class Tail:
    """Calls `on_event(body, offset)` for every message of a stream, on a channel of its own."""

    def __init__(self, connection: Any, stream: str, offset: Any, on_event: Callable[[bytes, int], None]) -> None:
        self._channel = connection.channel()
        consume_stream(self._channel, stream, offset, on_event)

    def close(self) -> None:
        """Read no more."""
        self._channel.close()


def consume_stream(
    channel: Any, stream: str, offset: Any, on_event: Callable[[bytes, int], None], *, prefetch: int = PREFETCH
) -> str:
    """Call `on_event(body, offset)` for every message of a stream; return the consumer's tag.

    Args:
        offset: "first", "last", "next", the number of a message, or a moment.
    """
    unacknowledged = 0

    def take(message: Any) -> None:
        nonlocal unacknowledged
        unacknowledged += 1
        if unacknowledged >= prefetch // 2:  # the broker sends on only against acknowledgements
            channel.basic_ack(message.delivery_tag, multiple=True)
            unacknowledged = 0
        body = message.body
        on_event(body if isinstance(body, bytes) else body.encode(), int(message.headers.get(_OFFSET, 0)))

    channel.basic_qos(0, prefetch, False)
    return channel.basic_consume(stream, callback=take, arguments={_OFFSET: offset})  # type: ignore[no-any-return]
