"""One message as the broker delivered it to this worker, and its one acknowledgement."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery_sharding.keys import KEY_HEADER, SENT_AT_HEADER
from celery_sharding.worker.request import DELIVERY

if TYPE_CHECKING:
    from celery_sharding.worker.lanes import Entry
    from celery_sharding.worker.runs import Runs
    from celery_sharding.worker.shard import Shard


class Delivery:
    """A message from a shard queue, not yet acknowledged.

    Attributes:
        attempts: Runs of it that were begun or are announced, as far as is known; None: nothing is known yet.
        begun_at: When its last run was handed to the pool, in seconds since the epoch; 0: none was.
        entry: Its place in a lane; None before it is admitted and for messages that never run.
        is_judged: It was redelivered, and may run here, after what is known of earlier attempts.
        is_recorded: The attempts stream knows of it, or is about to.
        is_announced: It says that a run begins which has not begun yet; `announcements` moves what follows.
        is_counted: The run that goes on was recorded as an attempt.
        was_taken_back: A recorded run did not begin after all, so its next one is to be recorded, too.
        untold_runs: Runs of which nothing says how they ended, since the result backend failed them.
        is_confirmed: The broker has confirmed what was recorded last.
        on_confirmed: Called then.
    """

    __slots__ = (
        "attempts",
        "begun_at",
        "entry",
        "is_announced",
        "is_confirmed",
        "is_counted",
        "is_judged",
        "is_recorded",
        "message",
        "on_confirmed",
        "received_at",
        "runs",
        "shard",
        "tag",
        "untold_runs",
        "was_taken_back",
    )

    def __init__(self, message: Any, shard: Shard, runs: Runs) -> None:
        self.message = message
        self.shard = shard
        self.runs = runs
        self.tag = message.delivery_tag
        self.entry: Entry | None = None
        self.attempts: int | None = None
        self.begun_at = 0.0
        self.is_judged = False
        self.is_recorded = False
        self.is_announced = False
        self.is_confirmed = False
        self.is_counted = False
        self.was_taken_back = False
        self.untold_runs = 0
        self.on_confirmed: Callable[[], None] | None = None
        self.received_at = time.time()

    @property
    def key(self) -> str:
        """The routing key it was published with; a message put into the queue by hand may name it in a header."""
        info = self.message.delivery_info or {}
        return str(self.headers.get(KEY_HEADER) or info.get("routing_key") or "")

    @property
    def lane(self) -> tuple[str, str, str]:
        """Its lane: the key's in its segment, or the shard's. Segments wait for each other by `gates`."""
        shard = self.shard
        return shard.group.name, shard.segment, self.key if shard.group.ordering == "key" else f"/{shard.queue}"

    @property
    def label(self) -> str:
        return f"{self.shard.group.name}/{self.shard.index}"

    @property
    def headers(self) -> dict[str, Any]:
        return self.message.headers or {}

    @property
    def task_id(self) -> str | None:
        return self.headers.get("id") or (self.message.properties or {}).get("correlation_id")

    @property
    def redelivered(self) -> bool:
        return bool((self.message.delivery_info or {}).get("redelivered"))

    @property
    def sent_at(self) -> float:
        """Seconds since the epoch: when it was published, or received if its publisher did not say."""
        value = self.headers.get(SENT_AT_HEADER)
        return float(value) if isinstance(value, int | float) else self.received_at

    @property
    def keeps_failures(self) -> bool:
        return self.shard.group.on_failure == "dead-letter"

    def note_start(self) -> None:
        """Note when a run begins, and how long the message waited if it is the first here."""
        now = time.time()
        if not self.begun_at:
            self.shard.note_wait(now - self.sent_at)
        self.begun_at = now

    def note_end(self) -> None:
        """Note how long the run took that has ended, if there was one."""
        if self.begun_at:
            self.shard.note_run(time.time() - self.begun_at)

    def acknowledge(self, *, gather: bool) -> None:
        """Tell the broker that the message is done, now or with others; without effect if its channel is gone."""
        # The request has been made long ago. Without this way back, and `Runs` dropping the entry, both go when they
        # are done: what only the garbage collector frees costs a busy worker a tenth of its time.
        self.message.delivery_info.pop(DELIVERY, None)
        self.shard.acknowledge(self, gather=gather)
