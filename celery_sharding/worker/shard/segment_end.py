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
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Protocol

from celery_sharding.keys import key_digest
from celery_sharding.layout.events import Drained, Fact, Finished, Reached
from celery_sharding.layout.model import Segment
from celery_sharding.topology import Names
from celery_sharding.wire import CONTROL_HEADER

logger = logging.getLogger(__name__)

# A segment is passed with few unfinished keys or not at all: every worker keeps them in mind.
UNFINISHED_KEYS_MAX = 100
# Looks, one a second, at which what is left only waits: a retry in less time is not worth an entry in the manifest.
_WAITING_LOOKS = 2


class Left(Protocol):
    """What the end of a queue needs of its shard."""

    names: Names
    queue: str
    segment: str

    @property
    def keys_left(self) -> Collection[str]:
        """The keys of what was delivered and is not acknowledged."""

    def only_waits(self) -> bool:
        """Say whether all of that waits for something that may take long."""

    def confirm_acknowledged(self) -> bool:
        """Wait until the broker has taken all acknowledgements; False if the channel is gone."""

    def acknowledge_tag(self, tag: Any) -> None: ...


class Ending:
    """How far the end of one queue is."""

    def __init__(self, shard: Left, *, log: Any, node: str, call_soon: Callable[[Callable[[], None]], Any]) -> None:
        self._shard = shard
        self._log = log
        self._node = node
        self._call_soon = call_soon
        self._is_stopped = False
        self.reset()

    def reset(self) -> None:
        """Forget what came over a channel that is gone."""
        self.markers: list[Any] = []
        self._seal: str | None = None
        self._was_idle = False
        self._waiting_looks = 0
        self._reached = False
        self._unfinished: frozenset[str] = frozenset()
        self._told: set[str] = set()

    def stop(self) -> None:
        """Say nothing more of the queue's end; its marker is left to whoever consumes it next."""
        self.reset()
        self._is_stopped = True

    def on_control(self, control: str, message: Any) -> None:
        """Take a message that is no task."""
        if self._is_stopped:
            return
        if control == "end" and not self.markers:
            self.markers.append(message.delivery_tag)
            self.look()
        elif control == "seal" and message.headers.get("nonce") == self._seal:
            self._seal = None
            self._on_seal(message.delivery_tag)
        else:
            self._shard.acknowledge_tag(message.delivery_tag)

    def learn(self, segment: Segment | None) -> None:
        """Take note of what the manifest says of the queue."""
        if segment is None or self._shard.queue not in segment.reached:
            return
        self._reached = True
        self._unfinished = frozenset(digest for queue, digest in segment.unfinished if queue == self._shard.queue)
        self.look()

    def look(self) -> None:
        """See what follows from the marker, after something was acknowledged."""
        if not self.markers or self._seal is not None:
            return
        keys = self._shard.keys_left
        if not keys:
            self._put_seal(was_idle=True)
        elif self._reached:
            for digest in self._unfinished - {key_digest(key) for key in keys} - self._told:
                self._told.add(digest)
                self._write(partial(Finished, *self._place, digest, by=self._node))

    def look_at_waiting(self) -> None:
        """See, once a second, whether what is left has only waited."""
        if not self.markers or self._seal is not None or self._reached or not self._shard.keys_left:
            return
        self._waiting_looks = self._waiting_looks + 1 if self._shard.only_waits() else 0
        if self._waiting_looks >= _WAITING_LOOKS:
            self._put_seal(was_idle=False)

    @property
    def _place(self) -> tuple[str, str]:
        return self._shard.segment, self._shard.queue

    def _put_seal(self, *, was_idle: bool) -> None:
        self._seal = uuid.uuid4().hex
        self._was_idle = was_idle
        self._waiting_looks = 0
        headers = {CONTROL_HEADER: "seal", "segment": self._shard.segment, "nonce": self._seal}
        self._log.put(self._shard.queue, b"", application_headers=headers)

    def _on_seal(self, tag: Any) -> None:
        keys = self._shard.keys_left
        if not keys:
            self.markers.append(tag)
            markers = self.markers
            self._write(
                lambda: Drained(*self._place, by=self._node, reason="idle"),
                lambda: self._acknowledge(markers),
            )
            return
        if self._was_idle:
            logger.warning(
                "%s: messages of %d keys came behind the end of %s", self._shard.queue, len(keys), self._shard.segment
            )
        self._shard.acknowledge_tag(tag)
        if self._shard.only_waits() and len(keys) <= UNFINISHED_KEYS_MAX:
            self._write(self._reached_event)

    def _reached_event(self) -> Reached | None:
        # What has come meanwhile is unfinished, too.
        digests = tuple(sorted({key_digest(key) for key in self._shard.keys_left}))
        return None if not digests else Reached(*self._place, digests, by=self._node)

    def _acknowledge(self, markers: list[Any]) -> None:
        if self.markers is markers:
            tags = markers.copy()
            markers.clear()
            for tag in tags:
                self._shard.acknowledge_tag(tag)

    def _write(self, make: Callable[[], Fact | None], then: Callable[[], None] | None = None) -> None:
        """Write a fact as soon as the broker has taken the acknowledgements that it builds on."""
        markers = self.markers

        def write() -> None:
            if self.markers is not markers or not self._shard.confirm_acknowledged():
                return  # the channel is gone; the next owner sees the same
            event = make()
            if event is not None:
                self._log.append(self._shard.names.manifest, event.as_dict(), then)

        self._call_soon(write)  # it reads the socket, which a message handler must not do
