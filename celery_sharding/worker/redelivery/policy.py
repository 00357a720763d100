"""Whether a redelivered message may begin: it may have killed its last worker. Pure: values in, a decision out.

    a retry of it is not due ──────────────▶ Wait, for so long
    begun max_attempts times ──────────────▶ DeadLetter
    beside a suspect, not now ─────────────▶ Wait, until that has ended
    else ──────────────────────────────────▶ Begin, once its attempt is recorded

A message that is redelivered may have killed its last worker, or only have run beside the one that did: nobody can tell
from outside. So that no innocent dies for a poison, a message that has one run left makes it without other suspects
beside it. If it kills the worker, it dies alone; if it was innocent, it comes to its end.

    suspect       redelivered; runs beside others
    last chance   begun one time less than allowed, and at least twice; runs when no suspect does, and none starts
                  beside it. Messages that are delivered for the first time always may

Groups that allow two runs or less have no such run: there the second is the last one of every redelivered message, and
all of them would have to run one by one after each restart.
"""

from __future__ import annotations

from dataclasses import dataclass

from celery_sharding.journal.attempts import Attempt
from celery_sharding.worker.run.delivery import Delivery, Phase


@dataclass(frozen=True, slots=True)
class History:
    """What is known of a redelivered message.

    Attributes:
        begun: How often it was begun; an announced run not counted.
        max_attempts: How often it may be.
        retry_in_seconds: How long a retry of it still waits, which an earlier owner was asked for.
    """

    begun: int
    max_attempts: int
    retry_in_seconds: float = 0.0

    @property
    def is_last_run(self) -> bool:
        return self.begun + 1 >= self.max_attempts

    @property
    def is_last_chance(self) -> bool:
        return self.begun == self.max_attempts - 1 and self.begun >= 2


@dataclass(frozen=True, slots=True)
class Company:
    """Which other suspects there are.

    Attributes:
        is_any: Some run, or were let in.
        is_last_chance: One of them is on its last chance, or waits for that.
    """

    is_any: bool = False
    is_last_chance: bool = False


ALONE = Company()


@dataclass(frozen=True, slots=True)
class Begin:
    """It begins, after `begun` runs, once that is recorded."""

    begun: int


@dataclass(frozen=True, slots=True)
class Wait:
    """It waits in its place for `seconds`; None: for other suspects to end."""

    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """It was begun too often."""

    begun: int

    @property
    def reason(self) -> str:
        return f"begun {self.begun} times and never finished"


Decision = Begin | Wait | DeadLetter


def decide(history: History, company: Company = ALONE) -> Decision:
    """Decide what becomes of a redelivered message whose turn it is."""
    if history.retry_in_seconds > 0:
        return Wait(history.retry_in_seconds)
    if history.begun >= history.max_attempts:
        return DeadLetter(history.begun)
    if company.is_last_chance or (history.is_last_chance and company.is_any):
        return Wait()
    return Begin(history.begun)


def may_be_announced_ahead(history: History) -> bool:
    """Say whether a run may be announced before it has a slot; never a message's last one."""
    return isinstance(decide(history), Begin) and not history.is_last_run


def known_attempts(delivery: Delivery) -> Attempt | None:
    """Return what earlier owners have recorded of a redelivered message, None if nothing is known."""
    is_repeat = delivery.record is not None and delivery.record.is_repeat
    return None if is_repeat else delivery.shard.attempts.get(delivery.message_id)


def history_of(delivery: Delivery, known: Attempt | None, *, now: float) -> History:
    """Return what is known of a redelivered message.

    One that nobody recorded may have begun once or only waited in its last owner's lanes; only recorded attempts can
    make it a dead letter.

    Args:
        known: What earlier owners have recorded.
        now: The wall clock.
    """
    record, most = delivery.record, delivery.place.group.max_attempts
    if record is not None and record.is_announced:
        begun = (record.attempts or 1) - 1
    elif record is not None and record.phase is Phase.TAKEN_BACK:
        begun = record.attempts  # what was recorded may not have been read yet
    else:
        begun = known.attempts if known is not None else min(1, most - 1)
    return History(begun, most, 0.0 if known is None else known.left_seconds(now))
