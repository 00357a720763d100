"""Which message a publish is about, and the errors that it may end in; `publisher` says when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from celery_sharding.errors import (
    BrokerBlocked,
    BrokerUnavailable,
    Nacked,
    OutcomeUnknown,
    PublishError,
    Unroutable,
)
from celery_sharding.link import Answer, Fate
from celery_sharding.topology import Names

_E = TypeVar("_E", bound=PublishError)


@dataclass(frozen=True, slots=True)
class Call:
    """Which message it is about, and the errors that its publish may end in."""

    group: str
    label: str
    task_id: str | None

    @property
    def exchange(self) -> str:
        return Names(self.group).publish

    def blocked(self) -> BrokerBlocked:
        return self._error(
            BrokerBlocked, "was not sent: the broker blocks publishers (memory or disk alarm, see its log)"
        )

    def unavailable(self, cause: object) -> BrokerUnavailable:
        return self._error(BrokerUnavailable, f"was not sent: {cause}; check that the broker is up")

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
                f"is not stored: the exchange {self.exchange!r} is gone again and again; does someone delete it?",
            )
        if answer.is_unsent:
            return self.unavailable(answer.cause)
        if answer.fate is Fate.BLOCKED:
            return self.blocked()
        return self._error(PublishError, f"was refused and is not stored: {answer.cause}")

    def _error(self, cls: type[_E], text: str) -> _E:
        return cls(f"{self.label} {text}", task_id=self.task_id, group=self.group)
