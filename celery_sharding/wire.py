"""The headers of this library that travel with messages: their names, and which of them say something.

    of a task            shard_group, shard_key, shard_sent_at, shard_message_id, beside Celery's
    of a dead letter     those, and the queue it came from, why it died, how often it was begun, and when
    of a control message shard_control: it is no task

Celery shows a task the headers of its message, and tasks hand them on to what they call. So on a call they say nothing:
they count only on a message that is sent again, and every other call leaves without them.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

# Its key, for whoever cannot see the routing key it was published with.
KEY_HEADER = "shard_key"
GROUP_HEADER = "shard_group"
# Seconds since the epoch.
SENT_AT_HEADER = "shard_sent_at"
# Unique to the publish. Attempts are counted by it: a task id may stand on several messages.
MESSAGE_ID_HEADER = "shard_message_id"

QUEUE_HEADER = "shard_queue"
REASON_HEADER = "shard_dead_reason"
ERROR_HEADER = "shard_dead_error"
ATTEMPTS_HEADER = "shard_dead_attempts"
DEAD_AT_HEADER = "shard_dead_at"
# Of a letter that was reduced: what was too large.
DROPPED_HEADER = "shard_dead_dropped"
# What a worker puts on a dead letter, beside the headers of its message.
DEATH_HEADERS = (QUEUE_HEADER, REASON_HEADER, ERROR_HEADER, ATTEMPTS_HEADER, DEAD_AT_HEADER, DROPPED_HEADER)

CONTROL_HEADER = "shard_control"
# What it may say. Nothing of the segment comes behind an end; a seal is one consumer's own; a probe is acknowledged by
# whoever is active. A newer version may say more.
END, SEAL, PROBE = "end", "seal", "probe"

# What a worker tells a sharded run in its request; Celery shows it to the task among the headers. On a message it says
# nothing: anybody may have handed it on. First its shard: `orders/3`.
SHARD_ATTRIBUTE = "shard_label"
# It is the one run that tries whether the claim store answers again, while the others wait for its word.
ASKS_STORE = "shard_asks_store"
# Its last try may have claimed, though the answer never came: it claims under the same token.
RUN_ID = "shard_run_id"
# Its body has ended: (result, whether its effects are committed), to be committed under `RUN_ID`.
COMMIT = "shard_commit"
RUN_ATTRIBUTES = (SHARD_ATTRIBUTE, ASKS_STORE, RUN_ID, COMMIT)

MARKS = frozenset(
    {KEY_HEADER, GROUP_HEADER, SENT_AT_HEADER, MESSAGE_ID_HEADER, CONTROL_HEADER, *DEATH_HEADERS, *RUN_ATTRIBUTES}
)
MESSAGE_ID_CHARACTERS_MAX = 128


def new_message_id() -> str:
    """Return what no other publish has."""
    return uuid.uuid4().hex


def message_id_of(headers: Mapping[str, Any]) -> str | None:
    """Return what is unique to the publish of a message; None if its publisher did not say."""
    value = headers.get(MESSAGE_ID_HEADER)
    return value if isinstance(value, str) and 0 < len(value) <= MESSAGE_ID_CHARACTERS_MAX else None


def control_headers(control: str, **facts: Any) -> dict[str, Any]:
    """Return the headers of a control message: `segment` of an end or a seal, `nonce` of a seal or a probe, `by`."""
    return {CONTROL_HEADER: control, **facts}


def control_of(headers: Mapping[str, Any]) -> str | None:
    """Return what a control message says; None if the message is a task, which may have a header of that name, too."""
    control = headers.get(CONTROL_HEADER)
    return control if isinstance(control, str) and "task" not in headers else None


def without_marks(headers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the headers of a call without ours, which it can only have from the message of another."""
    return {name: value for name, value in (headers or {}).items() if name not in MARKS}


def without_handed_on(headers: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the headers of a call of an ordinary task without those of the message that they were handed on from.

    A `shard_key` alone is the application's own: beside it, a message of ours has others.
    """
    return headers if MARKS.intersection(headers) <= {KEY_HEADER} else without_marks(headers)
