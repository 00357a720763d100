"""The headers that travel with messages: their names, and how they are read.

    task             shard_group, shard_key, shard_sent_at, shard_message_id, beside Celery's
    dead letter      those, and which queue it came from, why and when it died, and how often it was begun
    control message  shard_control: it is no task

Celery shows a task the headers of its message, and tasks hand them on to what they call. So headers of ours on a call
mean nothing, unless a message is sent again: every other call leaves without them.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

# The key, for readers that cannot see the routing key it was published with.
KEY_HEADER = "shard_key"
GROUP_HEADER = "shard_group"
# Seconds since the epoch.
SENT_AT_HEADER = "shard_sent_at"
# Unique to the publish. Attempts are counted by it, since several messages may have the same task id.
MESSAGE_ID_HEADER = "shard_message_id"

QUEUE_HEADER = "shard_queue"
REASON_HEADER = "shard_dead_reason"
ERROR_HEADER = "shard_dead_error"
ATTEMPTS_HEADER = "shard_dead_attempts"
DEAD_AT_HEADER = "shard_dead_at"
# On a reduced letter: which headers were too large.
DROPPED_HEADER = "shard_dead_dropped"
# What a worker adds to the headers of a message when it becomes a dead letter.
DEATH_HEADERS = (QUEUE_HEADER, REASON_HEADER, ERROR_HEADER, ATTEMPTS_HEADER, DEAD_AT_HEADER, DROPPED_HEADER)

# In place of headers and properties that could not be decoded: the error.
UNREADABLE_HEADER = "shard_unreadable"

CONTROL_HEADER = "shard_control"
# Its values: nothing of the segment comes behind an end; a seal belongs to one consumer; the active consumer
# acknowledges a probe. Newer versions may add others.
END, SEAL, PROBE = "end", "seal", "probe"

# What a worker tells a sharded run in its request; Celery shows it to the task among the headers. On a message these
# mean nothing: anybody may have handed them on. First the shard: `orders/3`.
SHARD_ATTRIBUTE = "shard_label"
# This run tries whether the claim store answers again, while the others wait.
ASKS_STORE = "shard_asks_store"
# Its last try may have claimed although the answer never came, so it claims under the same token.
RUN_ID = "shard_run_id"
# Its body has ended: (result, whether its effects are committed), to be committed under `RUN_ID`.
COMMIT = "shard_commit"
RUN_ATTRIBUTES = (SHARD_ATTRIBUTE, ASKS_STORE, RUN_ID, COMMIT)

MARKS = frozenset(
    {KEY_HEADER, GROUP_HEADER, SENT_AT_HEADER, MESSAGE_ID_HEADER, CONTROL_HEADER, *DEATH_HEADERS, *RUN_ATTRIBUTES}
)
MESSAGE_ID_CHARACTERS_MAX = 128


def new_message_id() -> str:
    """Return an id that no other publish has."""
    return uuid.uuid4().hex


def message_id_of(headers: Mapping[str, Any]) -> str | None:
    """Return the id that is unique to a message's publish; None if its publisher set none."""
    value = headers.get(MESSAGE_ID_HEADER)
    return value if isinstance(value, str) and 0 < len(value) <= MESSAGE_ID_CHARACTERS_MAX else None


def control_headers(control: str, **facts: Any) -> dict[str, Any]:
    """Return the headers of a control message: `segment` of an end or a seal, `nonce` of a seal or a probe, `by`."""
    return {CONTROL_HEADER: control, **facts}


def control_of(headers: Mapping[str, Any]) -> str | None:
    """Return which control message it is; None if it is a task, which may have a header of that name, too."""
    control = headers.get(CONTROL_HEADER)
    return control if isinstance(control, str) and "task" not in headers else None


def without_marks(headers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a call's headers without ours, which can only have been handed on from another message."""
    return {name: value for name, value in (headers or {}).items() if name not in MARKS}


def without_handed_on(headers: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an ordinary task's headers without ours, which were handed on from a sharded message.

    A `shard_key` alone is the application's own: a message of ours has other headers beside it.
    """
    return headers if MARKS.intersection(headers) <= {KEY_HEADER} else without_marks(headers)
