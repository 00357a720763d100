"""What happens in a group: facts that may be forgotten, in two streams.

    journal    kept for a day    vitals (each worker, once a second), handover, failure, dead
    attempts   kept for a week   attempt, withdrawn, retry, settled: how often a message was begun

The attempts are folded into an `AttemptLog`, from which a new owner goes on counting. They go by what is unique to the
message (`shard_message_id`, see `headers`), never by the task id, which may stand on several messages.

Nothing here holds a shard key in clear, and task arguments only where a retry changed them (`retry(args=…)`), since the
message itself is not rewritten.

Only builds and folds events; `streams` appends and reads them.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from celery_sharding.rabbitmq.streams import Event

ATTEMPTS_MAX = 100_000


def vitals_event(
    by: str, generation: int, *, owned: Mapping[str, Mapping[str, Any]], standby: Iterable[str], at: float
) -> Event:
    """Return what the worker `by` owns and stands by for at the moment `at`.

    Args:
        generation: The live one, as this worker knows it.
        owned: By queue: `index`, `since` (when it became the owner), `held` (messages delivered and not settled),
            `running`, `lag_seconds` (age of the oldest that waits in a lane; None: none waits), `prefetch` (how many it
            may hold), `behind_seconds` (age of the newest that it was delivered), `store_waiting` and `claim_waiting`
            (messages that wait in their lanes for the claim store, which has not answered since `store_away_since`,
            and for claims of other runs; only if there are any), and what was counted since then: `counters`, and in
            one of several vitals `waits` and `runs`, as `Histogram.to_list` gives them.
        standby: The queues it consumes and does not own.
        at: Seconds since the epoch, by this worker's clock, as `since`.
    """
    return {
        "event": "vitals",
        "at": at,
        "by": by,
        "generation": generation,
        "owned": {queue: dict(facts) for queue, facts in owned.items()},
        "standby": list(standby),
    }


def handover_event(
    queue: str, *, owner: str, change: str, to: str = "", counted: Mapping[str, Any] | None = None
) -> Event:
    """Return that `owner` took the shard `queue` ("taken"), offers it `to` another ("offered"), or gave it up
    ("released"), with what it had `counted` since it took it.
    """
    event: Event = {"event": "handover", "at": time.time(), "queue": queue, "owner": owner, "change": change, "to": to}
    return {**event, **(counted or {})}


def failure_event(queue: str, *, owner: str, task_id: str, task: str, error: str) -> Event:
    """Return that a task failed for good; `error` is the exception's type, not its text, which may hold data."""
    return {
        "event": "failure",
        "at": time.time(),
        "queue": queue,
        "owner": owner,
        "task_id": task_id,
        "task": task,
        "error": error,
    }


def dead_event(queue: str, *, owner: str, task_id: str | None, task: str | None, reason: str, attempts: int) -> Event:
    """Return that a message went to the dead-letter queue."""
    return {
        "event": "dead",
        "at": time.time(),
        "queue": queue,
        "owner": owner,
        "task_id": task_id,
        "task": task,
        "reason": reason,
        "attempts": attempts,
    }


def attempt_event(message_id: str, attempts: int) -> Event:
    """Return that a message is about to begin its run number `attempts` that may end in a lost process."""
    return {"event": "attempt", "at": time.time(), "message_id": message_id, "attempts": attempts}


def withdrawn_event(message_id: str, attempts: int) -> Event:
    """Return that a run which was announced did not begin, since its shard was given up: `attempts` are left."""
    return {"event": "withdrawn", "at": time.time(), "message_id": message_id, "attempts": attempts}


def retry_event(
    message_id: str,
    retries: int,
    attempts: int,
    *,
    wait_seconds: float = 0.0,
    time_limits: tuple[float | None, float | None] | None = None,
    body: bytes | None = None,
    content_type: str | None = None,
    content_encoding: str | None = None,
) -> Event:
    """Return that the task of a message asked for its retry number `retries`.

    Args:
        wait_seconds: How long from now it waits before it runs.
        time_limits: Of its next runs, (hard, soft); None: no change.
        body: What to run instead of the message's own body, for `retry(args=…, kwargs=…)`; None: no change.
        content_type: Of `body`.
        content_encoding: Of `body`.
    """
    event: Event = {
        "event": "retry",
        "at": time.time(),
        "message_id": message_id,
        "retries": retries,
        "attempts": attempts,
        "wait_seconds": wait_seconds,
    }
    if time_limits is not None:
        event["time_limits"] = list(time_limits)
    if body is not None:
        event |= {
            "body": base64.b64encode(body).decode(),
            "content_type": content_type,
            "content_encoding": content_encoding,
        }
    return event


def settled_event(message_id: str) -> Event:
    """Return that a message with recorded attempts is done, and nothing of it need be known any more."""
    return {"event": "settled", "at": time.time(), "message_id": message_id}


@dataclass(frozen=True, slots=True)
class Attempt:
    """What is known of one message: runs begun, retries asked for, and the body that a retry put in its place.

    Its last retry was asked for at `retried_at` (epoch seconds) and waits for `wait_seconds` from then.
    """

    attempts: int = 0
    retries: int = 0
    retried_at: float = 0.0
    wait_seconds: float = 0.0
    time_limits: tuple[float | None, float | None] | None = None
    body: bytes | None = None
    content_type: str | None = None
    content_encoding: str | None = None

    def left_seconds(self, now: float) -> float:
        """Return how long its retry still waits at `now`: never longer than was asked for, whatever the clocks say."""
        return max(0.0, min(self.wait_seconds, self.retried_at + self.wait_seconds - now))


class AttemptLog:
    """Attempts by message, folded from the stream of attempts; bounded, the longest untouched are forgotten first.

    Events may come again: numbers only grow until the message is settled, a retry is asked for, or a run that was
    announced is withdrawn. The body is that of the highest retry.
    Not safe for threads.
    """

    def __init__(self, *, attempts_max: int = ATTEMPTS_MAX) -> None:
        self._attempts_max = attempts_max
        self._by_message: OrderedDict[str, Attempt] = OrderedDict()

    def note(self, event: Mapping[str, Any]) -> None:
        """Fold one event; names that are not of this stream, and damaged ones, change nothing."""
        message_id, attempts, retries = event.get("message_id"), event.get("attempts"), event.get("retries", 0)
        if event.get("event") == "settled":
            self._by_message.pop(str(message_id), None)
            return
        if event.get("event") not in ("attempt", "retry", "withdrawn"):
            return
        if not isinstance(message_id, str) or not isinstance(attempts, int) or not isinstance(retries, int):
            return
        known = self._by_message.pop(message_id, Attempt())
        body = _decode_body(event.get("body"))
        if body is not None and retries >= known.retries:
            known = dataclasses.replace(
                known,
                body=body,
                content_type=event.get("content_type"),
                content_encoding=event.get("content_encoding"),
            )
        if event["event"] == "retry" and retries >= known.retries:
            known = dataclasses.replace(
                known,
                retried_at=_number(event.get("at")),
                wait_seconds=_number(event.get("wait_seconds")),
                time_limits=_time_limits(event.get("time_limits")) or known.time_limits,
            )
        self._by_message[message_id] = dataclasses.replace(
            known,
            # A retry says that the runs before it came to an end.
            attempts=max(known.attempts, attempts) if event["event"] == "attempt" else attempts,
            retries=max(known.retries, retries),
        )
        while len(self._by_message) > self._attempts_max:
            self._by_message.popitem(last=False)

    def get(self, message_id: str) -> Attempt | None:
        """Return what is known of a message, None if nothing is."""
        return self._by_message.get(message_id)

    def __len__(self) -> int:
        return len(self._by_message)


def _time_limits(value: Any) -> tuple[float | None, float | None] | None:
    return (value[0], value[1]) if isinstance(value, list) and len(value) == 2 else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _decode_body(text: Any) -> bytes | None:
    if not isinstance(text, str):
        return None
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        return None
