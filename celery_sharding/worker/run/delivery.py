"""One message as the broker delivered it to this worker: what it says, and where it is.

Its place, which only `Lanes` changes:

    NEW ──admit──▶ WAITING ──make_ready──▶ READY ──start──▶ RUNNING ──settle──▶ SETTLED
                                             ▲ ▲               │ │
                                             │ └──make_ready───┘ │ the run was lost
                                             └─make_ready─ HELD ◀┘ hold: a retry waits, a rate limit, a record to be
                                                                   written. Resting: nothing of it has begun
    RUNNING ──orphan──▶ ORPHAN ──settle──▶ SETTLED     its shard was given up; its run goes on, and its lane is locked
    any other ──drop──▶ DROPPED                        its shard was given up

What is on record of its runs, in the group's attempts stream. A first delivery has no record. One that was redelivered,
lost or retried has, changed by `redelivery` and the executor:

    NONE ──announce──▶ ANNOUNCED ──confirm──▶ CONFIRMED ──begin──▶ BEGUN: the run counts as an attempt
     ▲                     │                     │ ▲ └──put_back──────┤ the pool did not take it
     ├──────withdraw───────┴─────────────────────┘                   ├──take_back──▶ TAKEN_BACK: it waits instead, and
     └──────retry: it has come to an end──────────────────────────────┘               its next run is judged anew

Anybody may publish to a group, so nothing here raises whatever a message says: its key and its id are text that can be
encoded, its moments are numbers of this calendar.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable, Hashable, Mapping
from hashlib import sha256
from typing import Any

from celery_sharding.celery_hooks.requests import DELIVERY
from celery_sharding.keys import key_of_message
from celery_sharding.texts import describe, plain_text
from celery_sharding.timestamps import read_moment
from celery_sharding.wire import SENT_AT_HEADER, message_id_of
from celery_sharding.worker.place import Place
from celery_sharding.worker.ports import Source

logger = logging.getLogger(__name__)


class State(enum.Enum):
    NEW = "new"
    WAITING = "waiting"
    READY = "ready"
    RUNNING = "running"
    HELD = "held"
    ORPHAN = "orphan"
    SETTLED = "settled"
    DROPPED = "dropped"


IN_POOL = (State.RUNNING, State.ORPHAN)
GONE = (State.SETTLED, State.DROPPED)


class Entry:
    """The place of one message in its lane.

    Attributes:
        shard: Where it came from.
        request: Of its next or present run; None once it has left its lane.
        rank: Of its shard's messages, the lowest starts first.
        is_resting: It is held, and nothing of it has begun.
    """

    __slots__ = ("is_resting", "lane", "rank", "request", "shard", "state")

    def __init__(self, lane: Hashable, shard: Any, request: Any = None) -> None:
        self.lane = lane
        self.shard = shard
        self.request = request
        self.state = State.NEW
        self.is_resting = False
        self.rank = 0

    def __lt__(self, other: Entry) -> bool:
        return self.rank < other.rank

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.lane!r} of {self.shard!r}: {self.state.value}>"

    def may_start(self) -> bool:
        """Say whether nothing outside its lane keeps it waiting."""
        return True

    def admit(self, rank: int) -> None:
        """It stands at the end of its lane."""
        self.state = State.WAITING
        self.rank = rank

    def make_ready(self) -> None:
        """It is the head of its lane, and may start."""
        self.state = State.READY

    def start(self) -> None:
        """A run of it begins."""
        self.state = State.RUNNING

    def hold(self, *, is_resting: bool = False) -> None:
        """It keeps its place without a slot."""
        self.state = State.HELD
        self.is_resting = is_resting

    def settle(self) -> None:
        """It leaves its lane."""
        self.state = State.SETTLED
        # What knows each other is freed by the garbage collector alone: that costs a busy worker a tenth of its time.
        self.request = None

    def orphan(self) -> None:
        """The broker has it again while it runs."""
        self.state = State.ORPHAN

    def drop(self) -> None:
        """The broker has it again, and nothing of it runs."""
        self.state = State.DROPPED


class Phase(enum.Enum):
    NONE = "none"
    ANNOUNCED = "announced"
    CONFIRMED = "confirmed"
    BEGUN = "begun"
    TAKEN_BACK = "taken back"


class Record:
    """What is on record of the runs of a message. Not safe for threads.

    Attributes:
        attempts: Runs that were begun or are announced, as far as is known.
        is_known: The attempts stream knows of the message, or is about to, or may do so.
        is_judged: Its next run may begin, after what is known of earlier ones.
        is_repeat: Not named, redelivered, and the same to the byte as one that this owner was redelivered before. What
            is recorded under its id is about that one, which stands before it in its lane.
        on_confirmed: Called when the broker has confirmed what was recorded last.
    """

    __slots__ = ("attempts", "is_judged", "is_known", "is_repeat", "on_confirmed", "phase")

    def __init__(self, *, is_judged: bool, is_known: bool = False, is_repeat: bool = False) -> None:
        self.phase = Phase.NONE
        self.attempts = 0
        self.is_judged = is_judged
        self.is_known = is_known
        self.is_repeat = is_repeat
        self.on_confirmed: Callable[[], None] | None = None

    @property
    def is_announced(self) -> bool:
        """Say whether it says that a run begins which has not begun yet."""
        return self.phase in (Phase.ANNOUNCED, Phase.CONFIRMED)

    def judge(self, *, begun: int, is_known: bool) -> None:
        """It is decided what becomes of it, after `begun` runs."""
        self.is_judged = True
        self.is_known = self.is_known or is_known
        if not self.is_announced:
            self.attempts = begun

    def announce(self, begun: int) -> None:
        """A run is about to begin, after `begun` others: that is on its way to the broker."""
        self.phase = Phase.ANNOUNCED
        self.attempts = begun + 1
        self.is_known = True

    def confirm(self) -> Callable[[], None] | None:
        """The broker has it; return who is to be called."""
        if self.phase is Phase.ANNOUNCED:
            self.phase = Phase.CONFIRMED
        then, self.on_confirmed = self.on_confirmed, None
        return then

    def begin(self) -> None:
        """A run begins: it counts if it was announced."""
        self.phase = Phase.BEGUN if self.is_announced else Phase.NONE

    def put_back(self) -> None:
        """The run did not begin after all, and is tried again."""
        if self.phase is Phase.BEGUN:
            self.phase = Phase.CONFIRMED

    def take_back(self) -> bool:
        """The run that has begun waits instead; False: it does not count."""
        if self.phase is not Phase.BEGUN or not self.attempts:
            return False
        self.phase = Phase.TAKEN_BACK
        self.is_judged = False
        self.attempts -= 1
        return True

    def withdraw(self) -> bool:
        """The run will not begin here; False: none was announced."""
        if not self.is_announced or not self.attempts:
            return False
        self.phase = Phase.NONE
        self.attempts -= 1
        return True

    def lose(self) -> None:
        """The process of its run died: that was an attempt, on record or not."""
        self.attempts = self.attempts or 1

    def retry(self) -> None:
        """The run has come to an end, and another is wanted."""
        self.phase = Phase.NONE
        self.attempts = 0
        self.is_known = True


class Delivery(Entry):
    """A message from a shard queue.

    Attributes:
        begun_at: When its last run was handed to the pool, in seconds since the epoch; 0: none was.
        key: The routing key it was published with; a message put into the queue by hand may name it in a header.
        key_problem: Why that is no key that a task could be published under; None: it is one.
        message_id: What its attempts are counted by; `is_named`: its publisher said it, so no other message has it.
        record: Of its runs; None: this is its first delivery, and it was neither lost nor retried.
        untold_runs: Runs of which nothing says how they ended, since the result backend failed them.
    """

    __slots__ = (
        "begun_at",
        "is_named",
        "key",
        "key_problem",
        "message",
        "message_id",
        "place",
        "raw",
        "received_at",
        "record",
        "tag",
        "untold_runs",
    )
    shard: Source

    def __init__(self, message: Any, shard: Source, *, raw: Any) -> None:
        self.place: Place = shard.place
        group = self.place.group
        self.key, self.key_problem = key_of_message(message, exchange=self.place.names.publish)
        # Segments wait for each other by the gates of their shards.
        lane = self.key if group.ordering == "key" else f"/{self.place.queue}"
        super().__init__((group.name, self.place.segment, lane), shard)
        self.message = message
        self.raw = raw
        self.tag = message.delivery_tag
        self.received_at = time.time()
        self.begun_at = 0.0
        self.untold_runs = 0
        named = message_id_of(self.headers)
        self.is_named = named is not None
        # Now, since Celery writes to the headers when it makes the request.
        self.message_id = named or _digest(message, self.place.queue)
        self.record: Record | None = None
        if (message.delivery_info or {}).get("redelivered"):
            is_repeat = named is None and shard.note_unnamed(self.message_id)
            self.record = Record(is_judged=False, is_known=named is None, is_repeat=is_repeat)

    @property
    def attempts(self) -> int:
        return 0 if self.record is None else self.record.attempts

    @property
    def is_orphan(self) -> bool:
        return self.state is State.ORPHAN

    @property
    def is_in_lane(self) -> bool:
        return self.state not in (State.NEW, State.SETTLED)

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
    def sent_at(self) -> float:
        """Seconds since the epoch: when it was published, or received if its publisher did not say."""
        return read_moment(self.headers.get(SENT_AT_HEADER)) or self.received_at

    @property
    def keeps_failures(self) -> bool:
        return self.place.group.on_failure == "dead-letter"

    def may_start(self) -> bool:
        """Say whether the segments before its own let it start."""
        gate = self.shard.gate
        return gate is None or gate.is_open_for(self)

    def ensure_record(self) -> Record:
        """Return its record; a first delivery has one from now on."""
        self.record = self.record or Record(is_judged=True)
        return self.record

    def note_start(self) -> None:
        """Note when a run begins, and how long the message waited if it is the first here."""
        now = time.time()
        if not self.begun_at:
            self.shard.tally.note_wait(now - self.sent_at)
        self.begun_at = now

    def note_end(self) -> None:
        """Note how long the run took that has ended, if there was one."""
        if self.begun_at:
            self.shard.tally.note_run(time.time() - self.begun_at)

    def settle(self) -> None:
        super().settle()
        self.message.delivery_info.pop(DELIVERY, None)


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
