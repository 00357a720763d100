"""What a dead letter says, and how it becomes a message again for a replay. No broker.

A worker wrote the letter (its headers say why it died), or the broker did (`x-death` says why: expired, delivered too
often, rejected), or somebody else, who may have said nothing at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import amqp
from kombu.compression import decompress
from kombu.exceptions import ContentDisallowed
from kombu.serialization import loads, prepare_accept_content

from celery_sharding.errors import ShardKeyError
from celery_sharding.keys import key_text
from celery_sharding.texts import cut, plain_text
from celery_sharding.timestamps import format_moment, read_moment
from celery_sharding.topology import Names
from celery_sharding.wire import (
    ATTEMPTS_HEADER,
    DEAD_AT_HEADER,
    DEATH_HEADERS,
    ERROR_HEADER,
    GROUP_HEADER,
    KEY_HEADER,
    MESSAGE_ID_HEADER,
    QUEUE_HEADER,
    REASON_HEADER,
    SENT_AT_HEADER,
    new_message_id,
)

# The broker's, by how they begin.
_BROKERS = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count")
_BROKER_REASONS = {
    "delivery_limit": "delivered too often, by the queue's delivery limit",
    "expired": "expired in its queue",
    "maxlen": "its queue was full",
    "rejected": "rejected by a consumer",
}
_NO_REASON = "unknown: put here by neither a worker nor the broker"
# Celery's words for the arguments, in clear.
_ARGUMENTS = ("argsrepr", "kwargsrepr")
# Properties that would change where, whether or in which order the message is delivered; the id is the log writer's.
_DROPPED = frozenset({"application_headers", "expiration", "priority", "message_id", "delivery_mode"})
_ID_CHARACTERS = 10
# Serializations that run no code when they are read.
_SAFE = prepare_accept_content(["json", "msgpack", "yaml"])


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message of a group that will not run again by itself.

    Attributes:
        id: What operators call it: short, and the same at each listing. Identical letters are numbered.
        key: Its shard key; None if it has none that can be published under, so it cannot be replayed.
        queue: The queue it came from; None: not known.
        attempts: How often it was begun, if its processes were lost; else 0.
        dead_at: Seconds since the epoch; in whole seconds, by the broker's clock, if the broker moved it.
        headers, body, properties: Of the message, as they are in the queue.
        tag: Its delivery tag on the channel that took it.
    """

    id: str
    task_id: str | None
    task: str | None
    key: str | None
    queue: str | None
    reason: str
    error: str
    attempts: int
    dead_at: float | None
    headers: Mapping[str, Any]
    body: bytes
    properties: Mapping[str, Any]
    tag: int = 0

    @property
    def why(self) -> str:
        """Why it died, in a line: the reason, and the error if there is one."""
        return " ".join(f"{self.reason}: {self.error}".split()) if self.error else self.reason


def read_letter(message: amqp.Message, names: Names) -> DeadLetter:
    """Return what `message`, from the dead-letter queue of a group, says."""
    headers: dict[str, Any] = {plain_text(name): value for name, value in (message.headers or {}).items()}
    properties = {name: value for name, value in message.properties.items() if name != "application_headers"}
    body = message.body if isinstance(message.body, bytes) else str(message.body).encode()
    by_broker = _read_death(headers, names)
    facts: dict[str, Any] = {
        "task_id": _text(headers.get("id") or properties.get("correlation_id")),
        "task": _text(headers.get("task")),
        "key": _key(headers.get(KEY_HEADER)) or _key(by_broker.get("key")),
        "queue": _text(headers.get(QUEUE_HEADER)) or by_broker.get("queue"),
        "reason": _text(headers.get(REASON_HEADER)) or by_broker.get("reason") or _NO_REASON,
        "error": _text(headers.get(ERROR_HEADER)) or "",
        "attempts": headers[ATTEMPTS_HEADER] if type(headers.get(ATTEMPTS_HEADER)) is int else 0,
        "dead_at": _moment(headers.get(DEAD_AT_HEADER)) or by_broker.get("dead_at"),
    }
    # Not of all headers: the broker counts deliveries there, including those of listings.
    marks = (_text(headers.get(name)) for name in (SENT_AT_HEADER, MESSAGE_ID_HEADER))
    told = json.dumps([*facts.values(), *marks]).encode()
    digest = hashlib.sha256(told + b"\0" + body).hexdigest()[:_ID_CHARACTERS]
    tag = (message.delivery_info or {}).get("delivery_tag", 0)
    return DeadLetter(id=digest, **facts, headers=headers, body=body, properties=properties, tag=tag)


def revive(letter: DeadLetter, group: str, *, at: float) -> amqp.Message:
    """Return the message to publish for a replay at `at`: the original one, sent anew.

    What workers and the broker wrote when it died is removed. So is its expiry: who replays it wants it to run. It is a
    publish of its own, whose attempts are counted anew.
    """
    headers = {
        name: value
        for name, value in letter.headers.items()
        if name not in DEATH_HEADERS and not name.startswith(_BROKERS)
    }
    if headers.get("expires") is not None:
        headers["expires"] = None
    headers |= {
        GROUP_HEADER: group,
        KEY_HEADER: letter.key,
        SENT_AT_HEADER: at,
        MESSAGE_ID_HEADER: new_message_id(),
    }
    kept = {name: value for name, value in letter.properties.items() if name not in _DROPPED}
    return amqp.Message(letter.body, delivery_mode=2, application_headers=headers, **kept)


def letter_to_json(letter: DeadLetter, *, details: bool = False, body: bool = False) -> dict[str, Any]:
    """Return a letter in the shape that programs are promised; moments are ISO 8601 in UTC.

    Args:
        details: With headers and properties.
        body: With the body, and the headers that hold arguments; both may be secret.
    """
    names = ("id", "task_id", "task", "key", "queue", "reason", "error", "attempts")
    shown = {name: getattr(letter, name) for name in names}
    shown["dead_at"] = None if letter.dead_at is None else format_moment(letter.dead_at)
    if details:
        hidden = () if body else _ARGUMENTS
        shown["headers"] = {name: _plain(value) for name, value in letter.headers.items() if name not in hidden}
        shown["properties"] = {name: _plain(value) for name, value in letter.properties.items()}
        shown["body_bytes"] = len(letter.body)
    if body:
        shown |= _body_to_json(letter)
    return shown


def _body_to_json(letter: DeadLetter) -> dict[str, Any]:
    """Return `body`, decoded if it can be without running code in it, else `body_base64` and why."""
    kind = letter.properties.get("content_type")
    try:
        payload = letter.body
        if letter.headers.get("compression"):
            payload = decompress(payload, letter.headers["compression"])
        decoded = loads(payload, kind, letter.properties.get("content_encoding"), accept=_SAFE)
        return {"body": _plain(decoded)}
    except ContentDisallowed:
        why = f"{kind} may run code when it is read, so it was not"
    except Exception as exc:
        # Each decompressor has errors of its own (zlib.error, lzma.LZMAError), and a body may be anything.
        why = f"cannot be decoded: {cut(exc)}"
    return {"body": None, "body_base64": base64.b64encode(letter.body).decode(), "body_problem": why}


def _read_death(headers: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Return what the broker says of a death, nothing if it moved no message."""
    deaths = headers.get("x-death")
    if not isinstance(deaths, list) or not deaths or not isinstance(deaths[0], Mapping):
        return {}
    last = deaths[0]
    keys = last.get("routing-keys")
    # Published past the group's exchange, the routing key is the name of a queue.
    is_key = last.get("exchange") == names.publish and isinstance(keys, list) and bool(keys)
    reason = str(last.get("reason"))
    return {
        "key": _text(keys[0]) if is_key and isinstance(keys, list) else None,
        "queue": _text(last.get("queue")),
        "reason": _BROKER_REASONS.get(reason, f"dead-lettered by the broker: {reason}"),
        "dead_at": _moment(last.get("time")),
    }


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else plain_text(value)


def _key(value: Any) -> str | None:
    """Return a key that can be published under; None if it cannot."""
    try:
        return key_text(value if isinstance(value, str) else _text(value), task="dead letter")
    except ShardKeyError:
        return None


def _moment(value: Any) -> float | None:
    if isinstance(value, datetime):  # py-amqp's are in UTC and do not say so
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return read_moment(value)


def _plain(value: Any) -> Any:
    """Return `value` as JSON can hold it."""
    if isinstance(value, Mapping):
        return {plain_text(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, datetime):
        return format_moment(_moment(value) or 0.0)
    if isinstance(value, bytes | memoryview):
        return plain_text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no word for it
    return value if isinstance(value, int | float | bool | None) else plain_text(value)
