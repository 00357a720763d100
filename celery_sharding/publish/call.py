"""The errors of a publish; `publisher` says what each means."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from celery_sharding.errors import (
    BrokerBlocked,
    BrokerUnavailable,
    Nacked,
    OutcomeUnknown,
    PublishError,
    PublishRefused,
    Unroutable,
)
from celery_sharding.publish.connection import Answer, Fate
from celery_sharding.publish.message import Outgoing
from celery_sharding.rabbitmq.refusals import explain_publish
from celery_sharding.topology import Names

_E = TypeVar("_E", bound=PublishError)


@dataclass(frozen=True, slots=True)
class Call:
    """One try to publish a message, and the errors it may end in."""

    message: Outgoing
    took_seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, doing: str) -> Iterator[None]:
        """Note how long the `with` block takes; a later error says so."""
        began_at = time.monotonic()
        try:
            yield
        finally:
            self.took_seconds[doing] = self.took_seconds.get(doing, 0.0) + time.monotonic() - began_at

    @property
    def exchange(self) -> str:
        return Names(self.message.group).publish

    def blocked(self) -> BrokerBlocked:
        return self._error(
            BrokerBlocked, "was not sent: the broker blocks publishers (memory or disk alarm, see its log)"
        )

    def unavailable(self, cause: object) -> BrokerUnavailable:
        text = str(cause) or type(cause).__name__
        slow = [f"{doing} took {seconds:.1f} s" for doing, seconds in self.took_seconds.items() if seconds >= 0.1]
        if slow:
            text += f" ({', '.join(slow)})"
        return self._error(
            BrokerUnavailable,
            f"was not sent: {text}; check that the broker is up, that broker_url and broker_use_ssl fit its port, and "
            "how far away it is (sharding_publish_timeout_seconds)",
        )

    def refused(self, cause: object) -> PublishRefused:
        return self._error(PublishRefused, f"was not sent, and is not stored: {cause}")

    def failed(self, answer: Answer) -> PublishError:
        if answer.fate is Fate.UNKNOWN:
            return self._error(
                OutcomeUnknown,
                f"was sent, but not confirmed ({answer.cause}); it may have arrived. Sending it again with the same "
                "task id is safe only for a task under @deduplicate, and may then arrive behind later tasks",
            )
        if answer.fate is Fate.RETURNED:
            return self._error(
                Unroutable,
                f"was returned by the broker: nothing behind the exchange {self.exchange!r} takes it; run `celery "
                "shards declare`",
            )
        if answer.fate is Fate.NACKED:
            return self._error(
                Nacked,
                "was refused by the broker again and again, and is not stored; a queue of the group may be full (a "
                "policy with max-length) or without a leader, see the broker's log",
            )
        if answer.is_gone:
            return self._error(
                Unroutable,
                f"is not stored: the exchange {self.exchange!r} is missing again and again; either someone deletes it, "
                "or the broker's user may neither see nor declare it: run `celery shards declare` as a user who may",
            )
        if answer.is_unsent:
            return self.unavailable(answer.cause)
        if answer.fate is Fate.BLOCKED:
            return self.blocked()
        if answer.fate is Fate.UNSENDABLE:
            return self.refused(answer.cause)
        return self._error(
            PublishRefused, f"was refused and is not stored: {explain_publish(answer.cause, self.exchange)}"
        )

    def _error(self, cls: type[_E], text: str) -> _E:
        message = self.message
        return cls(f"{message.label} {text}", task_id=message.task_id, group=message.group)
