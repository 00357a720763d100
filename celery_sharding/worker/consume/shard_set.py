"""The shards of one group that this worker consumes, opened and given up as layout and selection say."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from amqp.exceptions import NotFound

from celery_sharding.config import ShardGroup
from celery_sharding.layout.model import Layout
from celery_sharding.shard_names import Indexes
from celery_sharding.topology import Names
from celery_sharding.worker.balance.handover import Handover
from celery_sharding.worker.consume.wanted import find_blocked, find_paused, find_wanted
from celery_sharding.worker.place import Place
from celery_sharding.worker.services import WorkerServices
from celery_sharding.worker.shard.segment_gate import gate_for
from celery_sharding.worker.shard.shard import Shard, ShardHost

logger = logging.getLogger(__name__)

# The same for all workers of a group, whatever their pools: a quorum queue keeps what owners gave back apart, and puts
# what comes back next at the end of that. So an owner that holds less than the one before it leaves some there, and
# when it goes, what it held stands behind them (measured on 3.10).
PREFETCH = 200


class ShardSet:
    """What one worker consumes of a group.

    Attributes:
        by_queue: Queue → shard.
        selection: Indexes chosen for this worker; None for all.
        is_complete: All that was selected and is not paused is consumed.
    """

    def __init__(self, group: ShardGroup, selection: Indexes, *, handover: Handover, services: WorkerServices) -> None:
        self.by_queue: dict[str, Shard] = {}
        self.selection = selection
        self.is_complete = True
        self._group = group
        self._names = Names(group.name)
        self._handover = handover
        self._services = services
        self._is_gated = False
        self._blocked: list[str] = []

    @property
    def prefetch(self) -> int:
        """How many messages a shard holds at most."""
        return self._group.prefetch or PREFETCH

    @property
    def needs_apply(self) -> bool:
        """Whether `apply` may have something to do although the layout is the same."""
        return not self.is_complete or self._is_gated

    def to_list(self) -> list[Shard]:
        return list(self.by_queue.values())

    def apply(self, layout: Layout, connection: Any, host: ShardHost) -> list[Shard]:
        """Consume what the layout says, and nothing else; return the shards that were opened."""
        wanted = find_wanted(self._names, layout, self.selection)
        self._note_pauses(layout)
        open_queues = {queue for segment in layout.open_segments for queue in segment.queues(self._names)}
        for queue, shard in list(self.by_queue.items()):
            if queue in wanted:
                self._handover.take_back(shard)
            elif queue in open_queues:
                self._handover.begin(shard)
            else:
                self.close(shard)
        opened = []
        for queue, (segment, index) in wanted.items():
            if queue not in self.by_queue:
                place = Place(self._group, segment, index, queue)
                if self._open(place, layout, connection, host):
                    opened.append(self.by_queue[queue])
        self.is_complete = all(queue in self.by_queue for queue in wanted)
        self._learn(layout)
        for name, count in Counter(shard.place.segment for shard in opened).items():
            logger.info("group %s: consuming %s, %d queues", self._group.name, name, count)
        return opened

    def roles(self, layout: Layout) -> dict[str, str]:
        """Return queue → "owner", "standby", "leaving" (what runs of it may end), or "paused"."""
        paused = dict.fromkeys(find_paused(self._names, layout, self.selection), "paused")
        return paused | {queue: self._role(shard) for queue, shard in list(self.by_queue.items())}

    def remove(self, shard: Shard) -> bool:
        """Take out a shard that the caller closes; False if it is not one of these (any more)."""
        if self.by_queue.get(shard.queue) is not shard:
            return False
        del self.by_queue[shard.queue]
        return True

    def close(self, shard: Shard) -> bool:
        """Give one shard up; False if it is not one of these (any more)."""
        if not self.remove(shard):
            return False
        shard.close()
        return True

    def freeze(self) -> None:
        """Start nothing more."""
        for shard in self.to_list():
            shard.freeze()

    def withdraw(self) -> None:
        """Before shards are closed: tell the next owners which runs did not begin."""
        for shard in self.to_list():
            shard.withdraw()

    def close_all(self) -> None:
        for shard in self.to_list():
            shard.close()
        self.by_queue.clear()

    def drop(self) -> None:
        """Forget everything that came over a connection that is gone."""
        for shard in self.to_list():
            shard.drop()
        self.by_queue.clear()

    def _role(self, shard: Shard) -> str:
        return "leaving" if shard in self._handover else "owner" if shard.owned else "standby"

    def _note_pauses(self, layout: Layout) -> None:
        """Warn when the chain of segments begins to wait for a paused shard."""
        was, self._blocked = self._blocked, find_blocked(self._names, layout)
        if self._blocked and self._blocked != was:
            logger.warning(
                "group %s: what was published later waits for the paused %s to be resumed and to drain",
                self._group.name,
                ", ".join(self._blocked),
            )

    def _open(self, place: Place, layout: Layout, connection: Any, host: ShardHost) -> bool:
        gate = gate_for(place.segment, layout, self._group.name, self._services.executor.lanes)
        shard = Shard(place, host=host, services=self._services, gate=gate)
        self.by_queue[place.queue] = shard
        try:
            shard.open(connection, self.prefetch)
        except NotFound:
            # It was deleted; the next repair of the group puts that right, and the manifest says how.
            self.remove(shard)
            return False
        return True

    def _learn(self, layout: Layout) -> None:
        """Tell the shards how far segments have ended, and start what no gate holds back any more."""
        lanes = self._services.executor.lanes
        gates = {
            segment.name: gate_for(segment.name, layout, self._group.name, lanes) for segment in layout.open_segments
        }
        for shard in self.to_list():
            shard.learn(layout.segment(shard.place.segment), gates.get(shard.place.segment))
        was_gated, self._is_gated = self._is_gated, any(gate is not None for gate in gates.values())
        if was_gated or self._is_gated:
            lanes.reconsider()
