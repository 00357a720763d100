"""Storing a message as a dead letter: whole, with why, where and when it died.

    full ──stored──▶ acknowledged
     └──refused for good──▶ reduced: without what is largest of its own headers ──stored──▶ acknowledged
                              └──refused for good──▶ held: it stays at the broker, unacknowledged, and its lane waits

The letter is confirmed before the message may be acknowledged. Its body is the message's, byte for byte. The journal
hears of it without the error's text, which may hold data.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from amqp.serialization import dumps

from celery_sharding.journal.events import DeadLettered
from celery_sharding.texts import ID_CHARACTERS_MAX, cut, plain_text
from celery_sharding.wire import (
    ATTEMPTS_HEADER,
    DEAD_AT_HEADER,
    DROPPED_HEADER,
    ERROR_HEADER,
    GROUP_HEADER,
    KEY_HEADER,
    QUEUE_HEADER,
    REASON_HEADER,
)
from celery_sharding.worker.log import Log, Refusal, Write
from celery_sharding.worker.run.delivery import Delivery
from celery_sharding.worker.run.lanes import Lanes

logger = logging.getLogger(__name__)

_SHORT_BYTES_MAX = 255
# Of a reduced letter: the error's characters, the bytes kept free for what says why it died, and its headers' bytes if
# it is not their size that was refused.
_ERROR_CHARACTERS, _OURS_BYTES, _HEADERS_BYTES = 500, 2_500, 8_000
# Without these it could not be replayed.
_NEEDED = ("task", "id", "compression", "lang", "retries", "timelimit", "root_id", "parent_id", "group")


class DeadLetter:
    """One message on its way to the dead-letter queue of its group.

    Args:
        node: The worker's name.
        stored: Called when the broker has it.
    """

    def __init__(
        self, log: Log, lanes: Lanes[Delivery], delivery: Delivery, *, node: str, stored: Callable[[], None]
    ) -> None:
        self._log = log
        self._lanes = lanes
        self._delivery = delivery
        self._node = node
        self._stored = stored
        self._ours: dict[str, Any] = {}

    def store(self, reason: str, error: str | None) -> None:
        """Store it whole, with why, where and when it died."""
        delivery = self._delivery
        reason, error = cut(reason), cut(error or "")
        detail = f" ({error})" if error else ""
        logger.error("%s: task %s becomes a dead letter: %s%s", delivery.place.label, self._name, reason, detail)
        delivery.shard.tally.count("dead")
        self._ours = {
            GROUP_HEADER: delivery.place.group.name,
            KEY_HEADER: delivery.key,
            QUEUE_HEADER: delivery.place.queue,
            REASON_HEADER: reason,
            ERROR_HEADER: error,
            ATTEMPTS_HEADER: delivery.attempts,
            DEAD_AT_HEADER: time.time(),
        }
        self._put({**delivery.headers, **self._ours}, refused=self._reduce)
        self._journal(reason)

    @property
    def _task(self) -> str | None:
        task = self._delivery.headers.get("task")
        return None if task is None else cut(task, ID_CHARACTERS_MAX)

    @property
    def _task_id(self) -> str | None:
        task_id = self._delivery.task_id
        return None if task_id is None else cut(task_id, ID_CHARACTERS_MAX)

    @property
    def _name(self) -> str:
        return f"{self._task}[{self._task_id}]"

    def _put(self, headers: dict[str, Any], refused: Callable[[Refusal], None]) -> None:
        delivery, message = self._delivery, self._delivery.message
        properties = {
            "content_type": _short(message.content_type) or "application/octet-stream",
            "content_encoding": _short(message.content_encoding) or "binary",
            "correlation_id": _short(delivery.task_id),
            "application_headers": headers,
        }
        self._log.write([Write(delivery.place.names.dead, delivery.body, properties, self._stored, refused)])

    def _reduce(self, refusal: Refusal) -> None:
        logger.warning("%s: the dead letter of %s is reduced: %s", self._delivery.place.label, self._name, refusal.why)
        room_bytes = (refusal.headers_bytes_max or _HEADERS_BYTES) - _OURS_BYTES
        self._put(_reduced(self._delivery.headers, self._ours, room_bytes=room_bytes), refused=self._hold)

    def _hold(self, refusal: Refusal) -> None:
        why = cut(refusal.why, _ERROR_CHARACTERS)
        place, shard = self._delivery.place, self._delivery.shard
        logger.error(
            "%s: the dead letter of %s cannot be stored in %s: %s. Its message is kept at the broker, and later ones "
            "of its key wait for it. Raise the broker's limit and restart this worker, or take the message out of %s",
            place.label,
            self._name,
            place.names.dead,
            why,
            place.queue,
        )
        self._journal(f"held, since its dead letter cannot be stored: {why}")
        shard.tally.count("unburied")
        self._lanes.hold(self._delivery)

    def _journal(self, reason: str) -> None:
        delivery, place = self._delivery, self._delivery.place
        event = DeadLettered(place.queue, self._node, self._task_id, self._task, reason, attempts=delivery.attempts)
        self._log.append(place.names.journal, event.as_dict(), optional=True)


def _reduced(headers: dict[str, Any], ours: dict[str, Any], *, room_bytes: int) -> dict[str, Any]:
    """Return the headers of a reduced letter: those that fit, the needed and the small ones first."""
    sizes = {name: size for name, value in headers.items() if (size := _size_bytes(name, value)) is not None}
    kept: dict[str, Any] = {}
    for name in sorted(sizes, key=lambda name: (name not in _NEEDED, sizes[name])):
        if sizes[name] <= room_bytes:
            room_bytes -= sizes[name]
            kept[name] = headers[name]
    dropped = sorted(cut(name, 40) for name in headers if name not in kept and name not in ours)
    cut_ones = {
        name: cut(value, _ERROR_CHARACTERS if name == ERROR_HEADER else ID_CHARACTERS_MAX)
        for name, value in ours.items()
        if isinstance(value, str)
    }
    return {**kept, **ours, **cut_ones, DROPPED_HEADER: cut(", ".join(dropped), _ERROR_CHARACTERS)}


def _size_bytes(name: Any, value: Any) -> int | None:
    """Return what a header takes on the wire; None if it cannot be sent."""
    try:
        return len(dumps("F", [{name: value}]))
    except Exception:
        # As where the message is sent: there is no one error for it.
        return None


def _short(value: Any) -> str:
    """Return a property that AMQP calls a short string; "" if it is not short."""
    text = plain_text(value or "")
    return text if len(text.encode()) <= _SHORT_BYTES_MAX else ""
