"""What happens in a group: facts that may be forgotten, in two streams. Each event has its shape and parser here.

    journal    kept for a day    vitals (each worker, once a second), handover, failure, dead
    attempts   kept for a week   attempt, withdrawn, retry, settled: how often a message was begun

Attempts go by what is unique to the message (`shard_message_id`, see `wire`), never by the task id, which may stand on
several messages.

Nothing here holds a shard key in clear, and task arguments only where a retry changed them (`retry(args=…)`), since the
message itself is not rewritten.

`parse` returns None for another event, and for a damaged one: newer versions, and strangers, may write to the streams,
too.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from celery_sharding.rabbitmq.events import TimedEvent, read_fields
from celery_sharding.timestamps import read_moment


@dataclass(frozen=True, slots=True)
class Counted:
    """What the owner of a shard has counted since it took it.

    Attributes:
        since: When it took the shard, in seconds since the epoch by its clock.
        counters: delivered, done, failed, retried, lost, killed, dead and what `Shard.count` counts besides.
        waits: From publishing to the start of the first run, as `Histogram.to_list` gives it; empty: not said.
        runs: From the start of a run to its end, in the same way.
    """

    since: float
    counters: Mapping[str, int] = field(default_factory=dict)
    waits: Sequence[float] = ()
    runs: Sequence[float] = ()

    def as_dict(self) -> dict[str, Any]:
        times = {"waits": list(self.waits), "runs": list(self.runs)}
        return {"since": self.since, "counters": dict(self.counters)} | {
            name: each for name, each in times.items() if each
        }

    @classmethod
    def read(cls, facts: Mapping[str, Any], *, at: float) -> Self:
        """Read what an event of the moment `at` says. Raises one of `DAMAGED` if it cannot."""
        since = read_moment(facts.get("since"))
        return cls(
            since=at if since is None else since,
            counters={str(name): int(count) for name, count in facts.get("counters", {}).items()},
            waits=_parse_times(facts.get("waits")),
            runs=_parse_times(facts.get("runs")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardVitals:
    """How a shard fares, by its owner's word at the moment `at`.

    Attributes:
        held: Messages delivered and not settled, of which `running` run; at most `prefetch`.
        lag_seconds: Age of the oldest that waits in a lane; None: none waits.
        behind_seconds: Age of the newest that was delivered.
        store_waiting: Messages at the heads of their lanes that wait for the claim store, which has not answered since
            `store_away_since` (epoch seconds).
        claim_waiting: Messages at the heads of their lanes that wait for claims of other runs.
    """

    owner: str
    at: float
    counted: Counted
    index: int = 0
    held: int
    running: int
    lag_seconds: float | None = None
    prefetch: int | None = None
    behind_seconds: float | None = None
    store_waiting: int = 0
    store_away_since: float | None = None
    claim_waiting: int = 0

    @property
    def since(self) -> float:
        return self.counted.since

    @property
    def counters(self) -> Mapping[str, int]:
        return self.counted.counters

    @property
    def delivered(self) -> int:
        return self.counters.get("delivered", 0)

    @property
    def has_room(self) -> bool:
        """Whether it holds so little that nothing can have waited for it on the broker."""
        return self.prefetch is not None and 2 * self.held < self.prefetch

    def follows(self, other: ShardVitals) -> bool:
        """Tell whether `other` is an earlier word of the same worker on the same time of ownership."""
        same = (self.owner, self.since) == (other.owner, other.since)
        return same and self.at > other.at and self.delivered >= other.delivered

    def as_dict(self) -> dict[str, Any]:
        said = {
            each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("owner", "at", "counted")
        }
        optional = ("store_waiting", "store_away_since", "claim_waiting")
        return {name: value for name, value in said.items() if value or name not in optional} | self.counted.as_dict()

    @classmethod
    def read(cls, facts: Mapping[str, Any], *, owner: str, at: float) -> Self:
        """Read what `owner` said of a shard at the moment `at`. Raises one of `DAMAGED` if it cannot."""
        said = {"owner": owner, "at": at, "counted": Counted.read(facts, at=at)}
        return cls(**read_fields(cls, facts) | said)


@dataclass(frozen=True, slots=True)
class Vitals(TimedEvent, name="vitals"):
    """What the worker `by` owns and stands by for, by queue. `generation` is the live one, as this worker knows it."""

    by: str
    generation: int
    owned: Mapping[str, ShardVitals]
    standby: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        owned = {queue: shard.as_dict() for queue, shard in self.owned.items()}
        return TimedEvent.as_dict(self) | {"owned": owned}

    @classmethod
    def read(cls, event: Mapping[str, Any]) -> Self:
        by, at = str(event["by"]), read_moment(event["at"])
        if at is None:
            raise ValueError(f"at {event['at']!r}")
        owned = {queue: ShardVitals.read(facts, owner=by, at=at) for queue, facts in event["owned"].items()}
        return cls(by, event.get("generation", 0), owned, tuple(map(str, event["standby"])), at=at)


@dataclass(frozen=True, slots=True)
class Handover(TimedEvent, name="handover"):
    """`owner` took the shard `queue` ("taken"), offers it `to` another ("offered"), or gave it up ("released")."""

    queue: str
    owner: str
    change: str
    to: str = ""
    counted: Counted | None = None

    def as_dict(self) -> dict[str, Any]:
        event = TimedEvent.as_dict(self)
        del event["counted"]
        return event if self.counted is None else event | self.counted.as_dict()

    @classmethod
    def read(cls, event: Mapping[str, Any]) -> Self:
        counted = Counted.read(event, at=float(event["at"])) if "counters" in event else None
        return cls(**read_fields(cls, event), counted=counted)


@dataclass(frozen=True, slots=True)
class TaskFailed(TimedEvent, name="failure"):
    """A task failed for good. `error` is the exception's type, not its text, which may hold data."""

    queue: str
    owner: str
    task_id: str
    task: str
    error: str


@dataclass(frozen=True, slots=True)
class DeadLettered(TimedEvent, name="dead"):
    """A message went to the dead-letter queue."""

    queue: str
    owner: str
    task_id: str | None
    task: str | None
    reason: str
    attempts: int


@dataclass(frozen=True, slots=True)
class RunAnnounced(TimedEvent, name="attempt"):
    """A message is about to begin its run number `attempts` that may end in a lost process."""

    message_id: str
    attempts: int


@dataclass(frozen=True, slots=True)
class RunWithdrawn(TimedEvent, name="withdrawn"):
    """A run that was announced did not begin, since its shard was given up; `attempts` remain."""

    message_id: str
    attempts: int


@dataclass(frozen=True, slots=True)
class RetryAsked(TimedEvent, name="retry"):
    """The task of a message asked for its retry number `retries`.

    Attributes:
        wait_seconds: How long from `at` it waits before it runs.
        time_limits: Of its next runs, (hard, soft); None: no change.
        body: What to run instead of the message's own body, for `retry(args=…, kwargs=…)`; None: no change.
        content_type, content_encoding: Of `body`.
    """

    message_id: str
    retries: int
    attempts: int
    wait_seconds: float = 0.0
    time_limits: tuple[float | None, float | None] | None = None
    body: bytes | None = None
    content_type: str | None = None
    content_encoding: str | None = None

    def as_dict(self) -> dict[str, Any]:
        event = TimedEvent.as_dict(self)
        if self.time_limits is None:
            del event["time_limits"]
        if self.body is None:
            del event["body"], event["content_type"], event["content_encoding"]
        else:
            event["body"] = base64.b64encode(self.body).decode()
        return event

    @classmethod
    def read(cls, event: Mapping[str, Any]) -> Self:
        limits, body = event.get("time_limits"), event.get("body")
        return cls(
            **read_fields(cls, {"at": 0.0, **event}),
            time_limits=(limits[0], limits[1]) if isinstance(limits, list) and len(limits) == 2 else None,
            body=base64.b64decode(body, validate=True) if isinstance(body, str) else None,
        )


@dataclass(frozen=True, slots=True)
class Settled(TimedEvent, name="settled"):
    """A message with recorded attempts is done and can be forgotten."""

    message_id: str


AttemptEvent = RunAnnounced | RunWithdrawn | RetryAsked | Settled
_ATTEMPT_EVENTS: Mapping[str, type[AttemptEvent]] = {
    each.name: each for each in (RunAnnounced, RunWithdrawn, RetryAsked, Settled)
}


def parse_attempt_event(event: Mapping[str, Any]) -> AttemptEvent | None:
    """Return what an event of the stream of attempts says; None if it is none, or cannot be read."""
    kind = _ATTEMPT_EVENTS.get(str(event.get("event")))
    return None if kind is None else kind.parse(event)


def _parse_times(value: Any) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, list) else ()
