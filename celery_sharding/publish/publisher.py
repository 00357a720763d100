"""Confirmed, mandatory publishes to groups on RabbitMQ.

How a publish may end, and what is stored then:

    confirmed           stored; the call returns
    PublishRefused      not stored: the broker refuses the user or the message, or AMQP cannot carry it; the error names
                        the cause and the fix
    Unroutable          not stored: returned by the broker
    Nacked              not stored: refused by the broker, on new channels too
    OutcomeUnknown      stored or not: sent, and no answer within the time-out, or before the connection died. It is
                        never sent again from here: bytes on an old connection may still be processed, and a second copy
                        would arrive behind its successors
    BrokerBlocked       nothing was sent: an alarm blocks publishers
    BrokerUnavailable   not stored: no connection, or it died before all of the message had left
    a TopologyError     nothing was sent: the group is missing and could not be declared

All of it happens within the time-out. A publish for a run is patient (`patience`): while nothing is stored and the
cause may pass, it is tried again.

A publisher keeps connections of its own (`Link`), each used by one thread at a time. While the broker blocks
publishers, only a connection that was told so is watched. No other is tried: what is sent on it would wait, too, and
arrive in an unknown order. A forked child never touches its parent's connections: it closes their file descriptors
without a word to the broker, and opens its own.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

from amqp.exceptions import AccessRefused, AMQPError

from celery_sharding.errors import (
    BrokerBlocked,
    BrokerUnavailable,
    LockHeld,
    Nacked,
    PublishRefused,
    ShardingError,
    TopologyError,
    Unroutable,
)
from celery_sharding.layout.ensure import ensure_fixed, passes_by_itself
from celery_sharding.publish.call import Call
from celery_sharding.publish.connection import Answer, Fate, Link
from celery_sharding.publish.message import Application, Outgoing
from celery_sharding.rabbitmq.connect import process_name
from celery_sharding.rabbitmq.refusals import explained
from celery_sharding.topology import Names, fixed_exists

logger = logging.getLogger(__name__)

IDLE_LINKS_MAX = 10
NACK_PAUSES_SECONDS = (0.05, 0.1, 0.2, 0.4, 0.8)
UNSENT_TRIES_MAX = 3
_PATIENT_PAUSE_SECONDS, _PATIENT_PAUSE_SECONDS_MAX = 0.2, 1.0


class Publisher:
    """Publishes to the groups of one app, from any thread and after any fork."""

    def __init__(self, application: Application) -> None:
        self._application = application
        policy = application.app.conf.task_publish_retry_policy or {}
        self._policy = {name: value for name, value in policy.items() if name in _CONNECT_OPTIONS}
        self._first_node = 0
        self._start_anew()
        os.register_at_fork(after_in_child=_forget_in_child(weakref.ref(self)))

    def publish(self, message: Outgoing) -> None:
        """Publish a message and return when the broker has confirmed it.

        A patient publish takes up to one time-out longer than its patience.

        Raises:
            PublishError: As the module says; `task_id` and `group` tell which message.
            TopologyError: The group's exchanges are missing and could not be declared. Nothing was sent.
        """
        began_at = time.monotonic()
        timeout_seconds = message.timeout_seconds or self._application.settings.publish_timeout_seconds
        pause = _PATIENT_PAUSE_SECONDS
        while True:
            try:
                self._publish_once(Call(message), deadline=time.monotonic() + timeout_seconds)
                return
            except ShardingError as exc:
                left = began_at + message.patience_seconds(self._application) - time.monotonic()
                if left <= 0 or not _may_pass(exc):
                    raise
                logger.warning("%s; trying again for %.0f s", exc, left)
            time.sleep(min(pause, left))
            pause = min(2 * pause, _PATIENT_PAUSE_SECONDS_MAX)

    def _publish_once(self, call: Call, *, deadline: float) -> None:
        refused = unsent = 0
        while True:
            link = self._take(call, deadline, fresh=bool(refused or unsent))
            try:
                is_known = call.message.group in link.groups
                answer = None if is_known else self._ensure_group(link, call, deadline)
                answer = answer or link.send(call.message, deadline=deadline)
            except BaseException:
                self._discard(link)
                raise
            self._give_back(link)
            if answer.fate is Fate.CONFIRMED:
                return
            if answer.is_unsent:
                unsent += 1
                if unsent < UNSENT_TRIES_MAX and time.monotonic() < deadline:
                    continue
            elif answer.is_refusal and refused < len(NACK_PAUSES_SECONDS):
                pause = NACK_PAUSES_SECONDS[refused]
                refused += 1
                if time.monotonic() + pause < deadline:
                    time.sleep(pause)
                    continue
            raise call.failed(answer) from answer.cause

    def _take(self, call: Call, deadline: float, *, fresh: bool) -> Link:
        """Take a live link for this thread alone: an idle one, or a new one if none is idle or it must be `fresh`.

        While the broker blocks publishers, take a link that was told so, or wait for another thread to give one back,
        and watch it until the broker unblocks or the time is over.
        """
        while True:
            with self._changed:
                told: set[Link] = set()
                while self._blocked and not (told := self._blocked.intersection(self._idle)):
                    if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                        raise call.blocked()
                if told:
                    link = told.pop()
                    self._idle.remove(link)
                elif self._idle and not fresh:
                    link = self._idle.pop()
                else:
                    break
            was_blocked = link.blocked
            try:
                alive = link.refresh(deadline=deadline)
            except BaseException:
                self._discard(link)
                raise
            if not alive:
                self._discard(link)
            elif not was_blocked and not link.blocked:
                return link
            else:
                still_blocked = link.blocked
                self._give_back(link)
                if still_blocked:
                    raise call.blocked()
        return self._open(call, deadline)

    def _open(self, call: Call, deadline: float) -> Link:
        try:
            with call.timed("connecting"):
                link = Link(
                    self._application.connect(),
                    policy=self._policy,
                    deadline=deadline,
                    first_node=self._first_node,
                    pool=self,
                )
        except BrokerUnavailable as exc:
            raise call.unavailable(exc) from exc
        except PublishRefused as exc:
            raise call.refused(exc) from exc
        self._first_node = link.node
        self._links.add(link)
        return link

    def _ensure_group(self, link: Link, call: Call, deadline: float) -> Answer | None:
        """Look once on every link whether the group can be published to, and declare it if not.

        Returns:
            The answer to a publish on a link that turned out to be dead; None if all is well.
        """
        group = call.message.group
        names = Names(group)
        try:
            with call.timed("looking for the group's exchange"), link.within(deadline) as connection:
                try:
                    exists = fixed_exists(connection, names)
                except AccessRefused:
                    # RabbitMQ 4.3 wants the right to configure for a look; a user who only publishes lacks it.
                    exists = True
            if not exists:
                # Declaring writes to the manifest, and would wait long while the broker blocks publishers, which it
                # tells only those that publish. The probe goes to no queue. It has a body because RabbitMQ blocks at
                # the frame before the body.
                answer = link.probe(f"{names.publish}.probe", deadline=deadline)
                if answer.fate is Fate.UNKNOWN and link.blocked:
                    return Answer(Fate.BLOCKED, answer.cause)
                if answer.fate is Fate.REFUSED and isinstance(answer.cause, AccessRefused):
                    # A user who may write to the group only cannot declare it: the manifest needs the same right.
                    with explained(group, names.publish):
                        raise answer.cause
                if answer.fate is not Fate.RETURNED:
                    return Answer(Fate.UNSENT, answer.cause)
                with call.timed("declaring the group's exchanges"), explained(group, names.publish):
                    ensure_fixed(
                        self._application.connect,
                        self._application.settings.group(group, needed_by="a published task"),
                        owner=f"publisher {process_name()}",
                        wait_seconds=max(0.0, deadline - time.monotonic()),
                    )
        except BrokerUnavailable as exc:
            raise call.unavailable(exc) from exc
        except TopologyError as exc:
            if time.monotonic() < deadline or not passes_by_itself(exc):
                raise
            raise call.unavailable(f"the group's exchanges are missing, and were not declared in time: {exc}") from exc
        except (OSError, AMQPError) as exc:
            link.usable = False
            return Answer(Fate.UNSENT, exc)
        link.groups.add(group)
        return None

    def _give_back(self, link: Link) -> None:
        """Keep a link for the next publish, or close it."""
        with self._changed:
            kept = link.usable and (link.blocked or len(self._idle) < IDLE_LINKS_MAX)
            if kept:
                self._idle.append(link)
                self._changed.notify_all()
        if not kept:
            self._discard(link)

    def _discard(self, link: Link) -> None:
        # Its node may hang; the next node is as good.
        self._first_node = link.node + 1
        self._links.discard(link)
        with self._changed:
            self._blocked.discard(link)
            self._changed.notify_all()
        link.close()

    def note_blocked(self, link: Link) -> None:
        with self._changed:
            if link.blocked:
                self._blocked.add(link)
            else:
                self._blocked.discard(link)
            self._changed.notify_all()

    def _start_anew(self) -> None:
        self._changed = threading.Condition()
        self._links: set[Link] = set()
        self._idle: deque[Link] = deque()
        self._blocked: set[Link] = set()

    def _forget_links(self) -> None:
        links = self._links
        self._start_anew()
        for link in links:
            link.forget()


_CONNECT_OPTIONS = frozenset({"max_retries", "interval_start", "interval_step", "interval_max"})


def _may_pass(error: ShardingError) -> bool:
    """Say whether a publish that stored nothing may succeed later without anybody's help."""
    if isinstance(error, TopologyError):
        return isinstance(error, LockHeld) or passes_by_itself(error)
    return isinstance(error, BrokerUnavailable | BrokerBlocked | Nacked | Unroutable)


def _forget_in_child(publisher: weakref.ref[Publisher]) -> Callable[[], None]:
    def forget() -> None:
        alive = publisher()
        if alive is not None:
            alive._forget_links()

    return forget
