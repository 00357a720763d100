"""How a worker gives its shards up when it stops: in order, and each as soon as nothing of it runs.

What the next owners must know is recorded before a channel is closed, which returns the rest in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from celery_sharding.worker.calls import Calls
from celery_sharding.worker.consume.groups import Groups
from celery_sharding.worker.log import Log
from celery_sharding.worker.run.state_writer import StateWriter

if TYPE_CHECKING:
    from celery_sharding.worker.shard.shard import Shard

_STATES_SECONDS = 5.0
_RECORD_SECONDS = 2.0
_LAST_RECORD_SECONDS = 5.0


class Shutdown:
    """Gives up the shards of one worker."""

    def __init__(self, groups: Groups, *, log: Log, states: StateWriter, calls: Calls) -> None:
        self._groups = groups
        self._log = log
        self._states = states
        self._calls = calls

    def begin(self) -> None:
        """Freeze all shards, and close those of which nothing runs: they need not wait for the rest of the pool."""
        self._groups.freeze()
        self._record_all(_RECORD_SECONDS)
        self._groups.give_up_idle()

    def give_up(self, shard: Shard) -> None:
        """Close a frozen shard whose last run has ended."""
        self._record_all(_RECORD_SECONDS)
        self._groups.give_up(shard)

    def end(self) -> None:
        """Close what is left: every run that could end has ended."""
        self._record_all(_LAST_RECORD_SECONDS)
        self._groups.close()
        self._log.stop()
        self._states.stop(_STATES_SECONDS)

    def _record_all(self, timeout_seconds: float) -> None:
        self._log.flush(timeout_seconds)
        self._calls.deliver()
        self._groups.withdraw()
        self._log.flush(timeout_seconds)
