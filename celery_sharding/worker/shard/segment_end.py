"""The end of a segment in one of its queues: an end marker stands behind the last message that was routed there.

    open    ──the marker is delivered──▶ ending
    ending  ──nothing else is left, or what is left has only waited for a while──▶ sealing: a seal of this consumer's
                                                                own is put into the queue
    sealing ──it comes back, nothing is left──▶ drained: written to the manifest; then marker and seal are acknowledged
    sealing ──it comes back, what is left only waits──▶ reached: written to the manifest, with the keys of what is left
    sealing ──it comes back, something came in between──▶ ending: it is run first, then sealed anew
    reached ──nothing of a key is left──▶ reached: the key is finished, written to the manifest
    reached ──nothing is left──▶ sealing

The seal that comes back proves that this consumer is still the owner and that nothing is left behind. Before a fact is
written, the broker has answered on the shard's channel, so that it has taken all acknowledgements which the fact builds
on. Whoever loses the queue before it acknowledges the marker leaves it to the next owner, who does the same again;
facts may be written twice. A foreign seal is acknowledged and ignored.

What waits is a retry, a rate limit, or a key that an earlier segment holds back; other keys of the group do not wait
for it (`manifest`). Everything here runs where lanes may be moved.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Collection
from functools import partial
from typing import Any, Protocol

from celery_sharding.keys import key_digest
from celery_sharding.layout.events import Drained, Fact, Finished, Reached
from celery_sharding.layout.model import Segment
from celery_sharding.wire import END, SEAL, control_headers
from celery_sharding.worker.place import Place
from celery_sharding.worker.services import WorkerServices

logger = logging.getLogger(__name__)

# A segment is passed with few unfinished keys or not at all: every worker keeps them in mind.
UNFINISHED_KEYS_MAX = 100
# Checks, one a second, at which what is left only waits: a retry in less time is not worth an entry in the manifest.
_WAITING_CHECKS = 2


class Left(Protocol):
    """The shard whose end this is, which hands itself in."""

    @property
    def keys_left(self) -> Collection[str]:
        """The keys of what was delivered and is not acknowledged."""

    def only_waits(self) -> bool:
        """Say whether all of that waits for something that may take long."""

    def confirm_acknowledged(self) -> bool:
        """Wait until the broker has taken all acknowledgements; False if the channel is gone."""

    def acknowledge_tag(self, tag: Any) -> None: ...


class SegmentEnd:
    """How far the end of one queue is.

    Attributes:
        markers: Delivery tags of its end marker and of the last seal; empty: nothing has ended.
    """

    def __init__(self, place: Place, services: WorkerServices) -> None:
        self._place = place
        self._log = services.log
        self._calls = services.calls
        self._node = services.node
        self._is_stopped = False
        self.reset()

    def reset(self) -> None:
        """Forget what came over a channel that is gone."""
        self.markers: list[Any] = []
        self._seal: str | None = None
        self._was_idle = False
        self._waiting_checks = 0
        self._reached = False
        self._unfinished: frozenset[str] = frozenset()
        self._told: set[str] = set()

    def stop(self) -> None:
        """Say nothing more of the queue's end; its marker is left to whoever consumes it next."""
        self.reset()
        self._is_stopped = True

    def on_control(self, control: str, message: Any, left: Left) -> None:
        """Take a message that is no task."""
        if self._is_stopped:
            return
        if control == END and not self.markers:
            self.markers.append(message.delivery_tag)
            self.advance(left)
        elif control == SEAL and message.headers.get("nonce") == self._seal:
            self._seal = None
            self._on_seal(message.delivery_tag, left)
        else:
            left.acknowledge_tag(message.delivery_tag)

    def learn(self, segment: Segment | None, left: Left) -> None:
        """Take note of what the manifest says of the queue."""
        queue = self._place.queue
        if segment is None or queue not in segment.reached:
            return
        self._reached = True
        self._unfinished = frozenset(digest for ended, digest in segment.unfinished if ended == queue)
        self.advance(left)

    def advance(self, left: Left) -> None:
        """Do what follows from the marker, after something was acknowledged."""
        if not self.markers or self._seal is not None:
            return
        keys = left.keys_left
        if not keys:
            self._put_seal(was_idle=True)
        elif self._reached:
            for digest in self._unfinished - {key_digest(key) for key in keys} - self._told:
                self._told.add(digest)
                self._calls.call_soon(partial(self._write_finished, left, self.markers, digest))

    def check_waiting(self, left: Left) -> None:
        """Seal the queue, checked once a second, once what is left has only waited for a while."""
        if not self.markers or self._seal is not None or self._reached or not left.keys_left:
            return
        self._waiting_checks = self._waiting_checks + 1 if left.only_waits() else 0
        if self._waiting_checks >= _WAITING_CHECKS:
            self._put_seal(was_idle=False)

    def _put_seal(self, *, was_idle: bool) -> None:
        self._seal = uuid.uuid4().hex
        self._was_idle = was_idle
        self._waiting_checks = 0
        headers = control_headers(SEAL, segment=self._place.segment, nonce=self._seal)
        self._log.put(self._place.queue, b"", application_headers=headers)

    def _on_seal(self, tag: Any, left: Left) -> None:
        keys = left.keys_left
        if not keys:
            self.markers.append(tag)
            self._calls.call_soon(partial(self._write_drained, left, self.markers))
            return
        if self._was_idle:
            logger.warning(
                "%s: messages of %d keys came behind the end of %s", self._place.queue, len(keys), self._place.segment
            )
        left.acknowledge_tag(tag)
        if left.only_waits() and len(keys) <= UNFINISHED_KEYS_MAX:
            self._calls.call_soon(partial(self._write_reached, left, self.markers))

    # What follows is called soon and not at once: it reads the socket, which a message handler must not do.

    def _write_finished(self, left: Left, markers: list[Any], digest: str) -> None:
        if self._may_write(left, markers):
            self._append(Finished(*self._where, digest, by=self._node))

    def _write_reached(self, left: Left, markers: list[Any]) -> None:
        if not self._may_write(left, markers):
            return
        # What has come meanwhile is unfinished, too.
        digests = tuple(sorted({key_digest(key) for key in left.keys_left}))
        if digests:
            self._append(Reached(*self._where, digests, by=self._node))

    def _write_drained(self, left: Left, markers: list[Any]) -> None:
        if self._may_write(left, markers):
            event = Drained(*self._where, by=self._node, reason="idle")
            acknowledge = partial(self._acknowledge, left, markers)
            self._log.append(self._place.names.manifest, event.as_dict(), acknowledge)

    def _may_write(self, left: Left, markers: list[Any]) -> bool:
        """Say whether a fact may be written, after the broker has taken the acknowledgements that it builds on.

        If the channel is gone, the next owner sees the same.
        """
        return self.markers is markers and left.confirm_acknowledged()

    def _acknowledge(self, left: Left, markers: list[Any]) -> None:
        if self.markers is markers:
            tags = markers.copy()
            markers.clear()
            for tag in tags:
                left.acknowledge_tag(tag)

    def _append(self, fact: Fact) -> None:
        self._log.append(self._place.names.manifest, fact.as_dict())

    @property
    def _where(self) -> tuple[str, str]:
        return self._place.segment, self._place.queue
