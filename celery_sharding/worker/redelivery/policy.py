"""What a redelivered message must pass before it begins: it may have killed its last worker.

    starts ──attempts of its shard known──▶ judged ──may begin──▶ its attempt is recorded ──▶ begins
                                              ├── a retry of it is not due ──▶ held until it is
                                              ├── beside a suspect, not now ─▶ held until that has ended
                                              └── begun max_attempts times ──▶ dead letter

It keeps its slot in the pool until its attempt is recorded: only what is about to begin counts as begun.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from celery_sharding.worker.redelivery.announcer import begun_before, known_attempts
from celery_sharding.worker.redelivery.suspects import Suspects
from celery_sharding.worker.run.delivery import Delivery
from celery_sharding.worker.run.lanes import Entry, State
from celery_sharding.worker.run.retry import decode_call

if TYPE_CHECKING:
    from celery_sharding.worker.executor import Runs


class Judge:
    """Judges the redelivered messages of one worker.

    Args:
        begin: Hands a run to the pool.
        hold_for: Keeps an entry in its place for some seconds, and starts it again then.
    """

    def __init__(self, runs: Runs, *, begin: Callable[[Entry], None], hold_for: Callable[[Entry, float], None]) -> None:
        self._runs = runs
        self._begin = begin
        self._hold_for = hold_for
        self._suspects = Suspects()

    def judge(self, entry: Entry) -> None:
        """Begin a redelivered message when all that speaks for it is known and recorded; bury it, or let it wait."""
        delivery: Delivery = entry.item.delivery
        if delivery.shard.knows_attempts():
            self._judge(delivery, entry)
        else:
            delivery.shard.attempts.when_complete(partial(self._judge_later, delivery, entry))

    def release(self) -> None:
        """Let the suspects go on that waited for others, which have ended."""
        for entry in self._suspects.take_ready():
            self._runs.lanes.due(entry)

    def _judge_later(self, delivery: Delivery, entry: Entry) -> None:
        """Judge a message where the lanes do not hear of an error: its key and its slot would be lost."""
        try:
            self._judge(delivery, entry)
        except Exception as exc:
            self._runs.fail_start(entry, exc)

    def _judge(self, delivery: Delivery, entry: Entry) -> None:
        if entry.state is not State.RUNNING:
            self._runs.leave_orphan(delivery)
            return
        known = known_attempts(delivery)
        if known is not None and (left_seconds := known.left_seconds(time.time())):
            # A retry that waited when its shard changed hands; it is judged when it is due.
            self._hold_for(entry, left_seconds)
            return
        begun, most = begun_before(known, delivery), delivery.shard.group.max_attempts
        if begun < most and not self._may_begin(entry, is_last_chance=begun == most - 1 and begun >= 2):
            return
        delivery.is_judged = True
        delivery.is_recorded = delivery.is_recorded or known is not None
        request = entry.item
        if known is not None and known.retries > request.request_dict.get("retries", 0):
            entry.item = request = request.rebuild(
                retries=known.retries,
                body=None if known.body is None else decode_call(request, known),
                time_limits=known.time_limits,
            )
        if begun >= most:
            delivery.attempts = begun
            reason = f"begun {begun} times and never finished"
            self._runs.bury(request, reason)
            request.store_failure(reason)
        else:
            self._runs.announcements.record(delivery, begun, partial(self._begin_judged, entry))

    def _may_begin(self, entry: Entry, *, is_last_chance: bool) -> bool:
        """Say whether a suspect may begin; if not, it waits for others to end, and is judged again then."""
        if self._suspects.begin(entry, is_last_chance=is_last_chance):
            return True
        if self._runs.lanes.hold(entry):
            self._suspects.wait(entry, is_last_chance=is_last_chance)
            self._runs.turn.end_soon()
        return False

    def _begin_judged(self, entry: Entry) -> None:
        if entry.state is not State.RUNNING:
            self._runs.leave_orphan(entry.item.delivery)
        elif self._runs.lanes.is_frozen(entry.source):
            self._runs.lanes.again(entry)
        else:
            try:
                self._begin(entry)
            except Exception as exc:
                self._runs.fail_start(entry, exc)
