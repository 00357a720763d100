"""What is known of each message's runs, folded from the stream of attempts: from it a new owner goes on counting."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from celery_sharding.journal.events import RetryAsked, RunAnnounced, Settled, parse_attempt_event

ATTEMPTS_MAX = 100_000


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
    """Attempts by message; bounded, the longest untouched are forgotten first.

    Events may come again: numbers only grow until the message is settled, a retry is asked for, or a run that was
    announced is withdrawn. The body is that of the highest retry.
    Not safe for threads.
    """

    def __init__(self, *, attempts_max: int = ATTEMPTS_MAX) -> None:
        self._attempts_max = attempts_max
        self._by_message: OrderedDict[str, Attempt] = OrderedDict()

    def note(self, event: Mapping[str, Any]) -> None:
        """Fold one event; others, and damaged ones, change nothing."""
        said = parse_attempt_event(event)
        if said is None:
            return
        known = self._by_message.pop(said.message_id, Attempt())
        if isinstance(said, Settled):
            return
        attempts = said.attempts
        if isinstance(said, RunAnnounced):
            attempts = max(known.attempts, attempts)
        elif isinstance(said, RetryAsked):
            known = _note_retry(known, said)
        # A retry says that the runs before it came to an end.
        self._by_message[said.message_id] = dataclasses.replace(known, attempts=attempts)
        while len(self._by_message) > self._attempts_max:
            self._by_message.popitem(last=False)

    def get(self, message_id: str) -> Attempt | None:
        """Return what is known of a message, None if nothing is."""
        return self._by_message.get(message_id)

    def __len__(self) -> int:
        return len(self._by_message)


def _note_retry(known: Attempt, retry: RetryAsked) -> Attempt:
    if retry.retries < known.retries:
        return known
    if retry.body is not None:
        known = dataclasses.replace(
            known, body=retry.body, content_type=retry.content_type, content_encoding=retry.content_encoding
        )
    return dataclasses.replace(
        known,
        retries=retry.retries,
        retried_at=retry.at,
        wait_seconds=retry.wait_seconds,
        time_limits=retry.time_limits or known.time_limits,
    )
