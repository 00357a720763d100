"""One message as the broker delivered it to this worker, and its one acknowledgement.

Anybody may publish to a group, so nothing here raises whatever a message says: its key and its id are text that can be
encoded, its moments are numbers of this calendar.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from celery_sharding.celery_hooks.requests import DELIVERY
from celery_sharding.keys import key_of_message
from celery_sharding.texts import describe, plain_text
from celery_sharding.timestamps import read_moment
from celery_sharding.wire import SENT_AT_HEADER, message_id_of

if TYPE_CHECKING:
    from celery_sharding.worker.executor import Runs
    from celery_sharding.worker.run.lanes import Entry
    from celery_sharding.worker.shard.shard import Shard

logger = logging.getLogger(__name__)


class Delivery:
    """A message from a shard queue, not yet acknowledged.

    Attributes:
        attempts: Runs of it that were begun or are announced, as far as is known; None: nothing is known yet.
        begun_at: When its last run was handed to the pool, in seconds since the epoch; 0: none was.
        entry: Its place in a lane; None before it is admitted and for messages that never run.
        message_id: What its attempts are counted by; `is_named`: its publisher said it, so no other message has it.
        is_repeat: Not named, redelivered, and the same to the byte as one that this owner was redelivered before. What
            is recorded under its id is about that one, which stands before it in its lane.
        is_judged: It was redelivered, and may run here, after what is known of earlier attempts.
        is_recorded: The attempts stream knows of it, or is about to, or may do so.
        is_announced: It says that a run begins which has not begun yet; `announcements` moves what follows.
        is_counted: The run that goes on was recorded as an attempt.
        was_taken_back: A recorded run did not begin after all, so its next one is to be recorded, too.
        untold_runs: Runs of which nothing says how they ended, since the result backend failed them.
        is_confirmed: The broker has confirmed what was recorded last.
        key: The routing key it was published with; a message put into the queue by hand may name it in a header.
        key_problem: Why that is no key that a task could be published under; None: it is one.
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
        "is_named",
        "is_recorded",
        "is_repeat",
        "key",
        "key_problem",
        "message",
        "message_id",
        "on_confirmed",
        "raw",
        "received_at",
        "runs",
        "shard",
        "tag",
        "untold_runs",
        "was_taken_back",
    )

    def __init__(self, message: Any, shard: Shard, runs: Runs, *, raw: Any) -> None:
        self.message = message
        self.raw = raw
        self.shard = shard
        self.runs = runs
        self.tag = message.delivery_tag
        self.entry: Entry | None = None
        self.attempts: int | None = None
        self.begun_at = 0.0
        self.is_judged = False
        named = message_id_of(self.headers)
        self.is_named = named is not None
        # Now, since Celery writes to the headers when it makes the request.
        self.message_id = named or _digest(message, shard.queue)
        is_unnamed_again = named is None and self.redelivered
        self.is_repeat = is_unnamed_again and shard.saw_before(self.message_id)
        self.is_recorded = is_unnamed_again
        self.is_announced = False
        self.is_confirmed = False
        self.is_counted = False
        self.was_taken_back = False
        self.untold_runs = 0
        self.on_confirmed: Callable[[], None] | None = None
        self.received_at = time.time()
        self.key, self.key_problem = key_of_message(message, exchange=shard.names.publish)

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
        found = self.headers.get("id") or (self.message.properties or {}).get("correlation_id")
        found = found or _id_in_body(self.message)
        return plain_text(found) if found else None

    @property
    def body(self) -> bytes:
        """The body as it was published, byte for byte; a compressed one is compressed still."""
        raw = self.raw
        if raw is self.message:  # of a virtual transport, which has decompressed it
            body = raw.channel.decode_body(raw._raw.get("body") or b"", raw.properties.get("body_encoding"))
        else:
            body = raw.body
        return body.encode(errors="surrogatepass") if isinstance(body, str) else bytes(body)

    @property
    def redelivered(self) -> bool:
        return bool((self.message.delivery_info or {}).get("redelivered"))

    @property
    def is_here(self) -> bool:
        """Say whether it is neither acknowledged nor the broker's again."""
        return self.shard.held.get(self.tag) is self

    @property
    def sent_at(self) -> float:
        """Seconds since the epoch: when it was published, or received if its publisher did not say."""
        return read_moment(self.headers.get(SENT_AT_HEADER)) or self.received_at

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


def _id_in_body(message: Any) -> Any:
    """Return the task id that a body of protocol 1 names, None if it names none, or cannot be read."""
    try:
        payload = message.payload
    except Exception as exc:  # whatever a serializer raises
        logger.debug("the body of a message cannot be read: %s", describe(exc))
        return None
    return payload.get("id") if isinstance(payload, Mapping) else None


def _digest(message: Any, queue: str) -> str:
    """Return what is equal for messages that are the same to the byte; what the broker writes to one is left out."""
    info = message.delivery_info or {}
    headers = {name: value for name, value in (message.headers or {}).items() if not name.startswith("x-")}
    properties = {name: value for name, value in (message.properties or {}).items() if name != "application_headers"}
    told = (queue, info.get("exchange"), info.get("routing_key"), sorted(properties.items()), sorted(headers.items()))
    body = message.body if isinstance(message.body, bytes) else str(message.body).encode(errors="surrogateescape")
    return sha256(repr(told).encode(errors="surrogateescape") + b"\0" + body).hexdigest()
