"""Shards that this worker gives up while it runs: an operator told it to, or another worker is to have them.

    leaving ──nothing of it runs──▶ recording ──confirmed──▶ closed
       └──take_back──▶ consumed as before

    leaving     frozen: no further task of the shard starts, what runs may end. However long it takes: nobody but the
                operator who asked for it waits, and a task that is cut off would run twice. One that is to be
                balanced comes here when nothing of it runs
    recording   what the next owner must know (retries, runs that were announced and did not begin) is on its way to
                the broker; nothing may start any more
    closed      the channel is closed, which returns the rest in order to the next in line; it is opened anew, as a
                standby, if it is still wanted

A retry that waits does not hold the shard: its record is with the broker, and the next owner goes on waiting.

Only the thread that reads the worker's connection may call `Departures`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery_sharding.worker.shard.shard import Shard

_POLL_SECONDS = 0.05


class Departures:
    """What a group gives up at the moment.

    Args:
        is_running: Says whether a run of a shard has not ended yet.
        record: Calls a function when all that was written of the group so far is confirmed.
        close: Closes a shard, which is not wanted any more or is to be opened anew.
        call_later: Calls a function after some seconds, in the thread that reads the connection.
    """

    def __init__(
        self,
        *,
        is_running: Callable[[Shard], bool],
        record: Callable[[Callable[[], None]], None],
        close: Callable[[Shard], None],
        call_later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self._is_running = is_running
        self._record = record
        self._close = close
        self._call_later = call_later
        self._leaving: set[Shard] = set()
        self._recording: set[Shard] = set()

    def __contains__(self, shard: Shard) -> bool:
        return shard in self._leaving or shard in self._recording

    def begin(self, shard: Shard) -> None:
        """Give `shard` up as soon as nothing of it runs; at once if this worker only stands by for it."""
        if shard in self:
            return
        if not shard.owned:
            self._close(shard)
            return
        shard.freeze()
        self._leaving.add(shard)
        self._look_at(shard)

    def take_back(self, shard: Shard) -> None:
        """Consume `shard` as before; one whose end is being recorded is closed all the same."""
        if shard in self._leaving:
            self._leaving.discard(shard)
            shard.thaw()

    def forget(self) -> None:
        """The connection is gone, or all is being given up."""
        self._leaving.clear()
        self._recording.clear()

    def _look_at(self, shard: Shard) -> None:
        if shard not in self._leaving:
            return
        if self._is_running(shard):
            self._call_later(_POLL_SECONDS, lambda: self._look_at(shard))
            return
        self._leaving.discard(shard)
        self._recording.add(shard)
        shard.withdraw()
        self._record(lambda: self._end(shard))

    def _end(self, shard: Shard) -> None:
        if shard in self._recording:
            self._recording.discard(shard)
            self._close(shard)
