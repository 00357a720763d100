"""A broker that confirms as a test says, behind what stands in for kombu's and py-amqp's objects."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import amqp
from amqp.exceptions import NotFound

from celery_sharding.worker.log import Refusal, Write


class Node:
    """A broker behind kombu's and py-amqp's objects: `answer` says what becomes of each message, by its queue."""

    def __init__(self) -> None:
        self.answer: Callable[[Channel, int, str], None] = lambda channel, tag, queue: channel.ack(tag)
        self.connections = 0
        self.received: list[tuple[str, str]] = []

    def connect(self) -> Connection:
        self.connections += 1
        return Connection(self)


class Connection:
    alt: tuple[str, ...] = ()
    connect_timeout = None
    _connection_factory = None

    def __init__(self, node: Node) -> None:
        self._node = node
        self.connected = True

    @property
    def connection(self) -> Connection:
        return self

    def ensure_connection(self, *_: Any, **__: Any) -> None: ...

    def channel(self) -> Channel:
        return Channel(self._node)

    def collect(self, **_: Any) -> None:
        self.connected = False


class Channel:
    frame_max = 131_072

    def __init__(self, node: Node) -> None:
        self.node = node
        self.events: dict[str, set[Callable[..., None]]] = defaultdict(set)
        self._confirm_selected = False
        self._answers: deque[tuple[int, str, amqp.Message]] = deque()
        self._tag = 0

    @property
    def connection(self) -> Channel:
        return self

    def confirm_select(self, *, nowait: bool) -> None: ...

    def _basic_publish(self, message: amqp.Message, *, routing_key: str, **_: Any) -> None:
        self._tag += 1
        self.node.received.append((routing_key, message.body.decode()))
        self._answers.append((self._tag, routing_key, message))

    def drain_events(self, timeout: float) -> None:
        if not self._answers:
            raise TimeoutError
        tag, queue, self.message = self._answers.popleft()
        self.node.answer(self, tag, queue)

    def ack(self, tag: int) -> None:
        self._tell("basic_ack", tag, False)

    def nack(self, tag: int) -> None:
        self._tell("basic_nack", tag, False)

    def give_back(self, tag: int, queue: str) -> None:
        self._tell("basic_return", NotFound("NO_ROUTE"), "", queue, self.message)
        self.ack(tag)

    def _tell(self, event: str, *facts: Any) -> None:
        for handler in self.events[event]:
            handler(*facts)


class Told:
    """Makes calls at once, and keeps what they said."""

    def __init__(self) -> None:
        self.stored: list[str] = []
        self.refused: list[tuple[str, Refusal]] = []

    def post(self, call: Callable[[], None]) -> None:
        call()

    def write(self, queue: str, body: str = "", **options: Any) -> Write:
        return Write(
            queue,
            body.encode(),
            {},
            lambda: self.stored.append(queue),
            lambda refusal: self.refused.append((queue, refusal)),
            **options,
        )
