"""Shards that this worker gives up while it runs: an operator wants it, or another worker is to own them.

    leaving ──nothing of it runs──▶ recording ──confirmed──▶ closed
       └──take_back──▶ consumed as before

    leaving     frozen: no further task of the shard starts, and what runs may end, however long it takes. Only the
                operator waits for it, and a task that is cut off would run twice. The balancer hands over shards of
                which nothing runs
    recording   what the next owner must know (retries, and announced runs that did not begin) is on its way to the
                broker; nothing may start any more
    closed      the channel is closed, which returns the rest in order to the next in line. The shard is opened anew, as
                a standby, if it is still wanted

A waiting retry does not hold the shard: its record is on the broker, and the next owner goes on waiting.

Only the thread that reads the worker's connection may call `Handover`.
"""

from __future__ import annotations

import logging
from functools import partial

from celery_sharding.worker.redelivery.attempts import Attempts
from celery_sharding.worker.services import WorkerServices
from celery_sharding.worker.shard.shard import Shard

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05


class Handover:
    """The shards of one group that are being given up."""

    def __init__(self, attempts: Attempts, services: WorkerServices) -> None:
        self._attempts = attempts
        self._calls = services.calls
        self._lanes = services.executor.lanes
        self._leaving: set[Shard] = set()
        self._recording: set[Shard] = set()

    def __contains__(self, shard: Shard) -> bool:
        return shard in self._leaving or shard in self._recording

    def begin(self, shard: Shard) -> None:
        """Give `shard` up as soon as nothing of it runs; at once if this worker only stands by for it."""
        if shard in self:
            return
        if not shard.owned:
            _close(shard)
            return
        shard.freeze()
        self._leaving.add(shard)
        self._record_when_idle(shard)

    def take_back(self, shard: Shard) -> None:
        """Consume `shard` as before; one whose end is being recorded is closed all the same."""
        if shard in self._leaving:
            self._leaving.discard(shard)
            shard.thaw()

    def forget(self) -> None:
        """The connection is gone, or all is being given up."""
        self._leaving.clear()
        self._recording.clear()

    def _record_when_idle(self, shard: Shard) -> None:
        if shard not in self._leaving:
            return
        if self._lanes.running(shard):
            again = partial(self._calls.call_soon, partial(self._record_when_idle, shard))
            self._calls.call_after(_POLL_SECONDS, again)
            return
        self._leaving.discard(shard)
        self._recording.add(shard)
        shard.withdraw()
        # A worker of greenlets is told in the one that writes the log, where no channel may be closed.
        self._attempts.when_written(partial(self._calls.call_soon, partial(self._end, shard)))

    def _end(self, shard: Shard) -> None:
        if shard in self._recording:
            self._recording.discard(shard)
            _close(shard)


def _close(shard: Shard) -> None:
    shard.depart()
    logger.info("group %s: given up %s", shard.place.group.name, shard.queue)
