"""Appending to a stream, and reading one to its end.

Events are JSON objects with a name in `event` and `"v": 1`. Names and fields that this version does not know are passed
on as they are, so newer writers do not stop older readers.

The end of a stream is found by appending a nonce and reading up to it. Message counts cannot tell: a stream of five
messages shows 0 or 5, depending on the broker's version. Callers never see nonces.

Nothing here is safe for two threads on one connection. Reading drains the connection's events, so use one that no event
loop reads.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Literal

import amqp
from amqp import exceptions as amqp_errors

from celery_sharding.errors import LogError, TopologyError
from celery_sharding.rabbitmq.channels import Opener, brief_channel, close_channel
from celery_sharding.rabbitmq.confirms import Confirms, Outcome
from celery_sharding.rabbitmq.queues import queue_exists
from celery_sharding.rabbitmq.refusals import is_out_of_reach, out_of_reach
from celery_sharding.rabbitmq.tail import PREFETCH, consume_stream

logger = logging.getLogger(__name__)

EVENT_VERSION = 1
NONCE = "nonce"
# Vitals of many shards are long, and a batch is in memory as a whole.
_BATCH_FIRST, _BATCH_GROWTH, _BATCH_MAX = 20, 4, 1_000
_PERSISTENT = 2

Event = dict[str, Any]


def append(channel: Any, stream: str, event: Mapping[str, Any], *, timeout_seconds: float = 10.0) -> None:
    """Append one event and wait until the broker has confirmed it.

    After a failure the channel is closed.

    Raises:
        LogError: The event was refused, or its confirm did not come in time; then it may be in the log or not.
            `missing` is true if there is no such stream, `passes` if trying again may help.
        OutOfReach: The stream's node is not up.
    """
    message = amqp.Message(encode(event), delivery_mode=_PERSISTENT, content_type="application/json")
    publish_confirmed(channel, message, stream, timeout_seconds=timeout_seconds)


def publish_confirmed(
    channel: Any, message: amqp.Message, queue: str, *, timeout_seconds: float, exchange: str = ""
) -> None:
    """Put `message` into `queue` itself, or publish it to `exchange` under that key, and wait for the confirm.

    Raises:
        LogError, OutOfReach: As for `append`.
    """
    confirms: Confirms[None] = Confirms.of(channel)
    try:
        confirms.publish(None, message, exchange, queue)
        confirms.wait(time.monotonic() + timeout_seconds)
    except TimeoutError as exc:
        close_channel(channel)
        raise LogError(
            f"no confirm from {queue!r} within {timeout_seconds} s; the event may be stored or not",
            stream=queue,
            passes=True,
        ) from exc
    except amqp_errors.ChannelError as exc:
        raise _refused(queue, exc) from exc
    ((_, outcome),) = confirms.take_settled()
    if outcome is Outcome.NACKED:
        close_channel(channel)
        raise LogError(f"the broker refused to store an event in {queue!r}; see its log", stream=queue, passes=True)
    if outcome is Outcome.RETURNED:
        if exchange:
            raise LogError(f"no queue takes what {exchange!r} is sent", stream=exchange, missing=True)
        if queue_exists(channel.connection, queue):
            raise out_of_reach(queue, stream=queue)
        raise LogError(f"there is no queue {queue!r} on the broker", stream=queue, missing=True)


def read_to_end(
    connection: Opener,
    stream: str,
    *,
    offset: Literal["first"] | int | datetime = "first",
    timeout_seconds: float = 30.0,
) -> list[tuple[int, Event]]:
    """Return the events of `stream` with their offsets, up to the moment of the call.

    Args:
        offset: "first"; or the offset of the first event wanted, at most one past the last; or a moment, before which
            some events may come along.
        timeout_seconds: For the whole read.

    Raises:
        LogError: The end was not reached in time, or there is no such stream (`missing`).
    """
    found = read_records(connection, stream, offset=offset, timeout_seconds=timeout_seconds)
    least = offset if isinstance(offset, int) else 0
    return [(number, event) for number, event in _without_nonces(found) if number >= least]


def read_records(
    connection: Opener, stream: str, *, offset: Literal["first"] | int | datetime, timeout_seconds: float = 30.0
) -> list[tuple[int, Event | None]]:
    """Return all there is in `stream`, up to the moment of the call: nonces, too, and None for what is no event.

    If the stream does not keep `offset` any more, it begins with the first record there is. Arguments and errors as for
    `read_to_end`.
    """
    deadline = time.monotonic() + timeout_seconds
    end = nonce_event()
    with brief_channel(connection) as channel:
        append(channel, stream, end, timeout_seconds=timeout_seconds)
        return _read_until(channel, stream, offset, nonce=end["nonce"], prefetch=PREFETCH, deadline=deadline)


def read_backwards(
    connection: Opener, stream: str, *, timeout_seconds: float = 30.0
) -> Iterator[list[tuple[int, Event]]]:
    """Yield the events of `stream`, the last few first, then ever larger batches before them, to its beginning.

    Within a batch, events stand in the order of the log. All that was confirmed before the call is there. Starting from
    a moment would not work: if the reader's clock is ahead, the broker sends nothing before that moment (measured on
    3.10, 4.0 and 4.3).

    Args:
        timeout_seconds: For each batch.

    Raises:
        LogError: As for `read_to_end`.
    """

    def read(start: int | Literal["last"], *, last: int = 0, prefetch: int) -> list[tuple[int, Event | None]]:
        deadline = time.monotonic() + timeout_seconds
        with brief_channel(connection) as channel:
            return _read_until(channel, stream, start, last=last, prefetch=prefetch, deadline=deadline)

    with brief_channel(connection) as channel:  # an empty stream would never deliver a last event
        append(channel, stream, nonce_event(), timeout_seconds=timeout_seconds)
    stop, size = read("last", prefetch=1)[0][0] + 1, _BATCH_FIRST
    while stop > 0:
        start = max(0, stop - size)
        found = read(start, last=stop - 1, prefetch=min(size, PREFETCH))
        yield [(number, event) for number, event in _without_nonces(found) if number < stop]
        # What is older than the stream's maximum age is gone; the broker starts at the first there is.
        stop = start if found[0][0] == start else 0
        size = min(size * _BATCH_GROWTH, _BATCH_MAX)


def nonce_event() -> Event:
    """Return an event that means nothing: whoever reads it has read everything before it."""
    return {"event": NONCE, "nonce": uuid.uuid4().hex}


def _read_until(
    channel: Any,
    stream: str,
    offset: str | int | datetime,
    *,
    nonce: str | None = None,
    last: int = 0,
    prefetch: int,
    deadline: float,
) -> list[tuple[int, Event | None]]:
    """Return what is delivered from `offset` on, None for what is no event: up to `nonce`, or at least up to `last`."""
    found: list[tuple[int, Event | None]] = []
    ended = False

    def take(body: bytes, number: int) -> None:
        nonlocal ended
        if ended:
            return
        event = decode(body, stream=stream, offset=number)
        found.append((number, event))
        ended = (
            number >= last
            if nonce is None
            else event is not None and (event.get("event"), event.get("nonce")) == (NONCE, nonce)
        )

    try:
        tag = consume_stream(channel, stream, offset, take, prefetch=prefetch)
        while not ended:
            left = deadline - time.monotonic()
            if left <= 0:
                raise LogError(
                    f"the end of {stream!r} was not reached in time; is the broker overloaded?",
                    stream=stream,
                    passes=True,
                )
            with contextlib.suppress(socket.timeout):
                channel.connection.drain_events(timeout=left)
        # Else py-amqp would warn of each message that is still on its way when the channel is closed.
        channel.basic_cancel(tag)
    except amqp_errors.ChannelError as exc:
        raise _refused(stream, exc) from exc
    return found


def _without_nonces(found: list[tuple[int, Event | None]]) -> list[tuple[int, Event]]:
    return [(number, event) for number, event in found if event is not None and event.get("event") != NONCE]


def encode(event: Mapping[str, Any]) -> bytes:
    """Return the body of an event's message."""
    text = json.dumps({"v": EVENT_VERSION, **event}, separators=(",", ":"), ensure_ascii=False)
    return text.encode(errors="backslashreplace")  # half a surrogate pair, escaped as JSON does it


def decode(body: bytes | str, *, stream: str, offset: int) -> Event | None:
    """Return the event in `body`; None, and a warning, if it is none."""
    try:
        event = json.loads(body)
    except (ValueError, RecursionError):  # that, if it is nested deeply
        event = None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        logger.warning("%s: message %d is no event of this library; passed over", stream, offset)
        return None
    return event


def _refused(queue: str, exc: amqp_errors.ChannelError) -> TopologyError:
    if is_out_of_reach(exc):
        return out_of_reach(queue, stream=queue)
    return LogError(
        f"the broker refused the use of {queue!r} ({exc.reply_text}); its user needs write and read on the group's "
        "names and on amq.default",
        stream=queue,
    )
