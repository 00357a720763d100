"""Stand-ins for what surrounds the worker's core: a clock, a log, a pool, a connection, a shard, the host of lanes."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

from amqp.exceptions import NotFound
from kombu.message import Message

from celery_sharding.config import ShardGroup
from celery_sharding.journal.attempts import Attempt
from celery_sharding.rabbitmq.streams import encode
from celery_sharding.wire import MESSAGE_ID_HEADER
from celery_sharding.worker.executor import Executor
from celery_sharding.worker.log import Follower, Write
from celery_sharding.worker.log import Log as WorkerLog
from celery_sharding.worker.place import Place
from celery_sharding.worker.redelivery.attempts import Attempts as StreamedAttempts
from celery_sharding.worker.run.delivery import Delivery, Entry
from celery_sharding.worker.run.lanes import Lanes
from celery_sharding.worker.services import WorkerServices
from celery_sharding.worker.shard.shard import Shard as OpenShard
from celery_sharding.worker.tally import Tally


class Clock:
    """Timers that go off when they are told."""

    def __init__(self) -> None:
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def call_after(self, seconds: float, call: Callable[[], None]) -> None:
        self.timers.append((seconds, call))

    def fire(self) -> list[float]:
        """Let all go off that were set so far; returns their seconds."""
        timers, self.timers = self.timers, []
        for _, call in timers:
            call()
        return [seconds for seconds, _ in timers]


class Calls(Clock):
    """Calls and timers that happen when they are told."""

    def __init__(self) -> None:
        super().__init__()
        self._soon: list[Callable[[], None]] = []

    def post(self, call: Callable[[], None]) -> None:
        self._soon.append(call)

    call_main = call_soon = post

    def deliver(self) -> None:
        """Let all happen that was to be called soon, and what follows from it."""
        while self._soon:
            self._soon.pop(0)()


class Tail:
    """A stream that is read as far as the test tells."""

    def __init__(self, follower: Follower) -> None:
        self.is_open = True
        self._follower = follower

    def tell(self, event: dict[str, Any], offset: int = 0) -> None:
        self._follower.on_message(encode(event), offset)

    def close(self) -> None:
        self.is_open = False


class Log(WorkerLog):
    """Confirms at once, or when it is told to."""

    def __init__(self) -> None:
        self.tails: dict[str, Tail] = {}
        self.written: list[tuple[str, Any]] = []
        self.is_up = True
        self._waiting: list[Callable[[], None]] = []

    def write(self, writes: list[Write]) -> None:
        for write in writes:
            self.written.append((write.queue, json.loads(write.body) if write.is_event else write.properties))
            if write.then is not None:
                self._confirm(write.then)

    def flush(self, timeout_seconds: float) -> bool:
        return True

    def stop(self) -> None: ...

    def confirm(self) -> None:
        waiting, self._waiting = self._waiting, []
        for then in waiting:
            then()

    def tail(self, connection: Any, stream: str, offset: Any, follower: Follower) -> Tail:
        tail = self.tails[stream] = Tail(follower)
        return tail

    def to(self, queue: str) -> list[Any]:
        return [what for name, what in self.written if name == queue]

    def _confirm(self, then: Callable[[], None]) -> None:
        if self.is_up:
            then()
        else:
            self._waiting.append(then)


class Pool:
    """Takes runs, and runs none; a test ends them."""

    def __init__(self, slots: int = 4, *, is_green: bool = False) -> None:
        self.is_green = is_green
        self.begun: list[Any] = []
        self.bucket: Any = None
        self.is_cut_off = False
        self.error: Exception | None = None
        self._slots = slots

    def slots(self) -> int:
        return self._slots

    def submit(self, request: Any) -> None:
        if self.error is not None:
            raise self.error
        self.begun.append(request)

    def spawn(self, call: Callable[..., object], *args: Any) -> None:
        """Call as in a greenlet, of whose errors nobody hears."""
        with suppress(Exception):
            call(*args)

    def bucket_for(self, task_name: str) -> Any:
        return self.bucket

    def hears_broker(self) -> bool:
        return not self.is_cut_off


class Mailbox:
    """Runs what is posted at once."""

    def post(self, call: Callable[[], None]) -> None:
        call()


class States:
    """Takes note of what is to be told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def tell(self, what: str, call: Callable[[], object], then: Callable[[bool], None] | None = None) -> None:
        self.told.append(what)


class Host:
    """Starts what lanes make ready by a function, and pumps at once."""

    def __init__(
        self,
        start: Callable[[Any], None],
        slots: Callable[[], int],
        fail_start: Callable[[Any, Exception], None] | None,
    ) -> None:
        self.start, self.slots = start, slots
        self._fail_start = fail_start
        self.lanes: Lanes[Entry] = Lanes(self, self, self)

    def fail_start(self, entry: Entry, error: Exception) -> None:
        if self._fail_start is None:
            raise error
        self._fail_start(entry, error)

    def end_soon(self) -> None:
        self.lanes.pump()

    end = end_soon


class GatedEntry(Entry):
    """An entry that may start when a function says so."""

    def __init__(self, lane: Hashable, shard: Any, request: Any, *, gate: Callable[[Entry], bool]) -> None:
        super().__init__(lane, shard, request)
        self._gate = gate

    def may_start(self) -> bool:
        return self._gate(self)


def make_lanes(
    start: Callable[[Any], None],
    slots: Callable[[], int] = lambda: 100,
    *,
    fail_start: Callable[[Any, Exception], None] | None = None,
) -> Lanes[Entry]:
    """Return lanes that start by `start`."""
    return Host(start, slots, fail_start).lanes


def admit(
    lanes: Lanes[Entry], lane: Hashable, shard: Hashable, request: Any, *, gate: Callable[[Entry], bool] | None = None
) -> Entry:
    entry = Entry(lane, shard, request) if gate is None else GatedEntry(lane, shard, request, gate=gate)
    lanes.admit(entry)
    return entry


class Attempts:
    """What earlier owners have recorded, by message id; complete, or when `complete` is called."""

    def __init__(self) -> None:
        self.known: dict[str, Attempt] = {}
        self.is_complete = True
        self._waiting: list[Callable[[], None]] = []

    def get(self, message_id: str) -> Attempt | None:
        return self.known.get(message_id)

    def when_complete(self, call: Callable[[], None]) -> None:
        self._waiting.append(call)

    def complete(self) -> None:
        self.is_complete = True
        for call in self._waiting:
            call()


class Shard:
    """A shard of `orders`, which takes acknowledgements and counts."""

    def __init__(self, **options: Any) -> None:
        self.place = Place(ShardGroup("orders", shards=1, **options), "g001", 0, "shards.orders.g001.000")
        self.tally = Tally()
        self.gate = None
        self.attempts = Attempts()
        self.acknowledged: list[str] = []
        self._held: set[Any] = set()

    def deliver(self, task_id: str, *, key: str = "key", redelivered: bool = False) -> Delivery:
        """Deliver a message whose id is `m-` and its task's."""
        message = Message(
            body=b"",
            channel=SimpleNamespace(decode_body=lambda body, encoding: body),
            delivery_tag=task_id,
            headers={"task": "shop.step", "id": task_id, MESSAGE_ID_HEADER: f"m-{task_id}"},
            properties={"correlation_id": task_id},
            delivery_info={"exchange": "shards.orders", "routing_key": key, "redelivered": redelivered},
        )
        message._raw = {"body": b""}
        delivery = Delivery(message, self, raw=message)
        self._held.add(delivery)
        return delivery

    def catch_up(self) -> bool:
        return self.attempts.is_complete

    def note_unnamed(self, message_id: str) -> bool:
        return False

    def holds(self, delivery: Delivery) -> bool:
        return delivery in self._held

    def acknowledge(self, delivery: Delivery, *, gather: bool) -> None:
        if delivery in self._held:
            self._held.discard(delivery)
            self.acknowledged.append(delivery.tag)

    def tell_done(self) -> None: ...


class Request:
    """A request of Celery's, as far as the executor needs it."""

    def __init__(self, delivery: Delivery, **changes: Any) -> None:
        self.delivery = delivery
        self.id = self.name = delivery.tag
        self.task = SimpleNamespace(name="shop.step", run=None)
        self.request_dict: dict[str, Any] = {"retries": 0, **changes}
        self.killed_pid = self.time_start = None
        self.has_left, self.failed_starts = False, 0
        self.failures: list[str] = []

    def rebuild(self, **changes: Any) -> Request:
        return Request(self.delivery, **changes)

    def leave_by(self, report: Callable[..., object], *args: Any) -> None:
        report(self, *args)
        self.has_left = True

    def mark_reserved(self) -> None: ...

    def mark_ready(self) -> None: ...

    def store_failure(self, reason: str) -> None:
        self.failures.append(reason)


class Worker:
    """An executor, of a pool whose runs end in any thread, and what surrounds it."""

    def __init__(self, slots: int = 4, **options: Any) -> None:
        self.pool, self.clock, self.log, self.states = Pool(slots), Clock(), Log(), States()
        self.shard = Shard(**options)
        self.executor = Executor(self.pool, self.clock, self.log, self.states, node="w@test")  # type: ignore[arg-type]

    def admit(self, task_id: str, *, key: str = "key", redelivered: bool = False) -> Request:
        request = Request(self.shard.deliver(task_id, key=key, redelivered=redelivered))
        self.executor.admit(request)
        return request

    @property
    def begun(self) -> list[str]:
        """The task ids of the runs that the pool was handed."""
        return [request.id for request in self.pool.begun]


class Channel:
    """A channel that consumes one queue: takes note of what it is told, and delivers what the test wants."""

    def __init__(self, connection: Connection) -> None:
        self.acknowledged: list[int] = []
        self.is_open = True
        self._connection = connection
        self._delivered = 0

    def basic_qos(self, *_: Any) -> None:
        if not self._connection.answers:
            raise TimeoutError

    def basic_consume(
        self, queue: str, *, callback: Callable[[Any], None], on_cancel: Callable[[str], None], **_: Any
    ) -> None:
        if queue in self._connection.missing:
            raise NotFound(f"no queue {queue!r}")
        self._connection.channels[queue] = self
        self.cancel = partial(on_cancel, "w@test")
        self._callback = callback

    def basic_ack(self, tag: int, multiple: bool) -> None:
        if self._connection.is_lost:
            raise ConnectionResetError
        self.acknowledged.append(tag)

    def close(self) -> None:
        self.is_open = False

    def deliver(self, headers: dict[str, Any], key: str = "") -> None:
        """Deliver a message."""
        self._delivered += 1
        info = {"exchange": "shards.orders", "routing_key": key}
        message = Message(body=b"", channel=self, delivery_tag=self._delivered, headers=headers, delivery_info=info)
        message._raw = {"body": b""}
        self._callback(message)

    def deliver_task(self, task_id: str, key: str) -> None:
        self.deliver({"task": "shop.step", "id": task_id, MESSAGE_ID_HEADER: f"m-{task_id}"}, key)

    def decode_body(self, body: Any, encoding: Any) -> Any:
        return body


class Connection:
    """A worker's connection: opens channels, by the queue they consume."""

    def __init__(self, version: str = "4.0.5") -> None:
        self.connection = SimpleNamespace(server_properties={"version": version})
        self.channels: dict[str, Channel] = {}
        self.missing: set[str] = set()
        self.answers = True
        self.is_lost = False

    def channel(self) -> Channel:
        return Channel(self)

    @property
    def consumed(self) -> list[str]:
        """The queues that are consumed, without what all their names begin with."""
        names = (queue for queue, channel in self.channels.items() if channel.is_open)
        return sorted(name.removeprefix("shards.orders.") for name in names)


class Receiver:
    """Admits what shards are delivered."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def receive(self, delivery: Delivery) -> None:
        self._executor.admit(Request(delivery))


class Services:
    """What a worker consumes shards with: a log, calls, and an executor of a pool that runs nothing."""

    def __init__(self, *, hold_seconds: float = 900.0) -> None:
        self.log, self.calls, self.pool = Log(), Calls(), Pool()
        self.executor = Executor(self.pool, self.calls, self.log, States(), node="w@test")
        self.values = WorkerServices(
            node="w@test",
            log=self.log,
            calls=self.calls,
            executor=self.executor,
            receiver=Receiver(self.executor),
            hold_seconds=hold_seconds,
        )

    @property
    def begun(self) -> list[str]:
        """The task ids of what runs."""
        return [request.delivery.task_id for request in self.pool.begun]

    def finish(self) -> None:
        """Let the run end that was begun first, and what follows from it happen."""
        self.executor.finish(self.pool.begun.pop(0))
        self.calls.deliver()


class Owner:
    """The group of one shard, which is consumed."""

    def __init__(self) -> None:
        self.services, self.connection = Services(), Connection()
        self.attempts = StreamedAttempts("shards.orders.attempts", self.services.log)
        self.lost: list[OpenShard] = []
        self.needed_protocol: int | None = None
        place = Place(ShardGroup("orders", 1), "g001", 0, "shards.orders.g001.000")
        self.shard = OpenShard(place, host=self, services=self.services.values)
        self.shard.open(self.connection, 10)
        self.channel = self.connection.channels[place.queue]

    def close_shard(self, shard: OpenShard) -> None:
        shard.close()

    def note_lost(self, shard: OpenShard) -> None:
        self.lost.append(shard)

    def stand_by(self, protocol: int) -> None:
        self.needed_protocol = protocol
