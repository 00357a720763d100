"""Publisher confirms: what the broker made of each message that was published on a channel.

    pending ──ack────────────▶ confirmed
       ├──return──▶ ──ack────▶ returned: no queue took it
       └──nack───────────────▶ nacked: not stored, on this channel or for now

The broker answers in any order, for one message or for all up to a number. A return names no number, so it is matched
by what it brings back: exchange, routing key and ids.

Nothing here opens a channel anew or sends a message again. Not safe for threads.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, Generic, TypeVar

import amqp
from amqp import exceptions as amqp_errors

from celery_sharding.celery_hooks.client import begin_confirms, publish_unwaited
from celery_sharding.errors import TopologyError

T = TypeVar("T")

_PATIENCE_SECONDS = 30.0


class Outcome(enum.Enum):
    CONFIRMED = enum.auto()
    RETURNED = enum.auto()
    NACKED = enum.auto()


@dataclass(slots=True, eq=False)
class _Pending(Generic[T]):
    item: T
    sent: tuple[str, str, amqp.Message]
    is_returned: bool = False


class Confirms(Generic[T]):
    """Publishes, mandatory, as the only publisher of a channel, and keeps what the broker has not answered for.

    Args:
        mark: Name of a header that tells messages with the same ids from each other.
    """

    def __init__(self, channel: Any, *, mark: str | None = None) -> None:
        self.channel = channel
        self._mark = mark
        self._tag = 0
        self._pending: dict[int, _Pending[T]] = {}  # by tag, in ascending order
        self._settled: list[tuple[T, Outcome]] = []
        channel.events["basic_ack"].add(partial(self._settle, Outcome.CONFIRMED))
        channel.events["basic_nack"].add(partial(self._settle, Outcome.NACKED))
        channel.events["basic_return"].add(self._on_return)

    @classmethod
    def of(cls, channel: Any) -> Confirms[T]:
        """Return the confirms of a channel, made at the first call."""
        known: Confirms[T] | None = vars(channel).get("confirms")
        if known is None:
            known = channel.confirms = cls(channel)
        return known

    @property
    def next_tag(self) -> int:
        """The number of the message that is published next."""
        return self._tag + 1

    @property
    def pending(self) -> list[T]:
        """What the broker has not answered for, in the order of publishing."""
        return [pending.item for pending in self._pending.values()]

    def publish(self, item: T, message: amqp.Message, exchange: str, key: str, *, timeout: float | None = None) -> None:
        """Publish the message of `item`; answers that come meanwhile are taken, too.

        Args:
            timeout: Of the write to the socket, in seconds.
        """
        channel = self.channel
        if begin_confirms(channel):
            self._tag = 0
            self._pending.clear()
        self._tag += 1
        self._pending[self._tag] = _Pending(item, (exchange, key, message))
        publish_unwaited(channel, message, exchange, key, timeout=timeout)

    def wait(self, deadline: float) -> None:
        """Read until everything is answered for.

        Raises:
            TimeoutError: It was not by `deadline` (monotonic).
            OSError, amqp errors: The connection or the channel is lost.
        """
        while self._pending:
            self.read(deadline)

    def read(self, deadline: float) -> None:
        """Read one event of the connection; errors as for `wait`."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("no confirm in time")
        self.channel.connection.drain_events(timeout=remaining)

    def take_settled(self) -> list[tuple[T, Outcome]]:
        """Take what was answered since the last call, in the order of the answers."""
        settled, self._settled = self._settled, []
        return settled

    def forget(self) -> None:
        """Expect no answers any more; those that come late change nothing."""
        self._pending.clear()
        self._settled.clear()

    def _settle(self, outcome: Outcome, tag: int, multiple: bool) -> None:
        tags = list(takewhile(lambda known: known <= tag, self._pending)) if multiple else [tag]
        for known in tags:
            pending = self._pending.pop(known, None)
            if pending is not None:
                was_returned = pending.is_returned and outcome is Outcome.CONFIRMED
                self._settled.append((pending.item, Outcome.RETURNED if was_returned else outcome))

    def _on_return(self, error: Exception, exchange: str, key: str, message: Any) -> None:
        # Only noted: its ack follows. Raising here would leave that ack unread.
        identity = self._identify(exchange, key, message)
        for pending in self._pending.values():
            if not pending.is_returned and self._identify(*pending.sent) == identity:
                pending.is_returned = True
                return

    def _identify(self, exchange: str, key: str, message: Any) -> tuple[Any, ...]:
        properties = message.properties
        mark = None if self._mark is None else (message.headers or {}).get(self._mark)
        return exchange, key, properties.get("message_id"), properties.get("correlation_id"), mark


def publish_batch(confirms: Confirms[int], batch: Sequence[tuple[amqp.Message, str, str]]) -> set[int]:
    """Publish messages, each to an exchange under a routing key, and return the positions of those not stored.

    Raises:
        TopologyError: An exchange is gone, or it is unknown which were stored, since the broker did not answer.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    try:
        for position, (message, exchange, key) in enumerate(batch):
            confirms.publish(position, message, exchange, key)
        confirms.wait(deadline)
    except TimeoutError as exc:
        raise TopologyError(
            f"the broker did not confirm in {_PATIENCE_SECONDS:.0f} s; it is not known what it has stored of the "
            "last messages sent"
        ) from exc
    except amqp_errors.ChannelError as exc:
        raise TopologyError(f"the broker refused ({exc.reply_text}); run `celery shards declare`") from exc
    return {position for position, outcome in confirms.take_settled() if outcome is not Outcome.CONFIRMED}
