"""One group in this worker: it consumes what the manifest says.

A group is a chain of segments. The worker consumes the queues of the open segments that were selected for it (`-Q`),
all of their limbo queues, and nothing else. It tails the manifest. When a segment is passed, it opens the queues of the
next; when one is drained, it closes its queues. Every worker does the same from the same log. `segment_gate` decides
what may start while several segments are open, and `balancer` who owns which queue.

The selection may change while the worker runs (`select`), and operators pause and resume shards. What is no longer to
be consumed is given up in order (`handover`).

If the manifest, or a control message in a queue, asks for a protocol that this version does not know, the worker gives
the whole group up and becomes a bystander of it for as long as it runs.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Any, Protocol

from celery_sharding.config import ShardGroup
from celery_sharding.layout.model import Layout
from celery_sharding.layout.protocol import describe_need, is_known
from celery_sharding.shard_names import Indexes
from celery_sharding.topology import Names
from celery_sharding.worker.balance.balancer import Balancer
from celery_sharding.worker.balance.handover import Handover
from celery_sharding.worker.consume.manifest_reader import Heard, ManifestReader
from celery_sharding.worker.consume.shard_set import ShardSet
from celery_sharding.worker.consume.wanted import find_wanted
from celery_sharding.worker.log import Tailing
from celery_sharding.worker.redelivery.attempts import Attempts
from celery_sharding.worker.services import WorkerServices
from celery_sharding.worker.shard.shard import Shard

logger = logging.getLogger(__name__)

_FREEZE_POLL_SECONDS = 0.05


class GroupHost(Protocol):
    """What a group needs of its worker."""

    def repair_soon(self) -> None:
        """Replace what is missing on the broker, in another thread; the layout is read anew if it may be an old one."""

    def kill_orphans(self) -> None:
        """End the runs whose messages are the broker's again."""


class GroupConsumer:
    """Consumes one group on the worker's connection.

    Attributes:
        needed_protocol: What the group asks for and this version does not know; None: nothing.
    """

    def __init__(self, group: ShardGroup, selection: Indexes, *, host: GroupHost, services: WorkerServices) -> None:
        self.group = group
        self.needed_protocol: int | None = None
        self.attempts = Attempts(self.names.attempts if services.log.keeps_events else None, services.log)
        self._host = host
        self._services = services
        self._manifest = ManifestReader(self.names)
        self._handover = Handover(self.attempts, services)
        self.shards = shards = ShardSet(group, selection, handover=self._handover, services=services)
        self._balancer = Balancer(self.names, shards.by_queue, self._handover, services, prefetch=shards.prefetch)
        self._connection: Any = None
        self._tails: list[Tailing] = []
        self._is_stopping = False

    @property
    def names(self) -> Names:
        return Names(self.group.name)

    @property
    def layout(self) -> Layout:
        return self._manifest.layout

    @property
    def is_open(self) -> bool:
        """Whether it is following its group on a connection."""
        return self._connection is not None

    @property
    def is_behind(self) -> bool:
        """Whether its layout may be out of date: records of the manifest are gone that it has not read."""
        return self._manifest.is_behind

    @property
    def is_bystander(self) -> bool:
        """Whether a newer version acts on the group, and this worker leaves it alone; see `needed_protocol`."""
        return self.needed_protocol is not None

    @property
    def _is_leaving(self) -> bool:
        return self._is_stopping or self.is_bystander

    @property
    def is_complete(self) -> bool:
        """Whether it consumes all queues that were selected and are not paused."""
        return self.is_open and self.shards.is_complete and bool(self.layout.open_segments)

    def select(self, selection: Indexes) -> None:
        """Consume these shards from now on, and give others up as soon as nothing of them runs."""
        self.shards.selection = selection
        self._services.calls.call_soon(self._apply_layout)

    def roles(self) -> dict[str, str]:
        """Return queue → "owner", "standby", "leaving" (what runs of it may end), "paused", or "bystander, …" and why.

        A bystander since its start knows no queues, and says so of the group's exchange.
        """
        roles = self.shards.roles(self.layout)
        if not self.is_bystander:
            return roles
        wanted = find_wanted(self.names, self.layout, self.shards.selection) or [self.names.publish]
        left = {queue: role for queue, role in roles.items() if role != "paused"}
        return dict.fromkeys(wanted, f"bystander, needs protocol {self.needed_protocol}") | left

    def open(self, connection: Any, layout: Layout) -> None:
        """Begin to consume what the layout says, and to tail the group's streams."""
        self._connection = connection
        self._is_stopping = False
        self._manifest.begin(layout)
        tail = partial(self._services.log.tail, connection)
        self._tails = [
            self._tail_manifest(),
            tail(self.names.attempts, "first", self.attempts),
            tail(self.names.journal, "next", self._balancer),
        ]
        self._apply_layout()

    def relearn(self, layout: Layout) -> None:
        """Go on from a layout that was just read, if records that were to be tailed are gone."""
        if self._connection is None or self._is_leaving or not self.is_behind or not self._tails:
            return
        self._tails[0].close()
        self._manifest.begin(layout)
        self._tails[0] = self._tail_manifest()
        self._apply_layout()

    def stand_by(self, protocol: int) -> None:
        """Become a bystander: give all shards up in order, and write nothing more of the group.

        May be called from a message handler.
        """
        if self.is_bystander:
            return
        self.needed_protocol = protocol
        need = describe_need(protocol)
        logger.error("group %s %s. This worker gives it up, and leaves it alone until then", self.group.name, need)
        self._balancer.forget()
        self.shards.freeze()
        for shard in self.shards.to_list():
            shard.end.stop()
        # Closing channels reads the socket, which a message handler must not do.
        self._services.calls.call_soon(self._give_all_up)

    def freeze(self) -> None:
        """Start nothing more, for good: the worker stops, or its connection is gone."""
        self._is_stopping = True
        self._balancer.forget()
        self._handover.forget()
        self.shards.freeze()

    def close(self) -> None:
        """Give all shards up."""
        self.freeze()
        self._connection = None
        self.shards.close_all()
        self._tails.clear()

    def drop(self) -> None:
        """Forget everything that came over a connection that is gone."""
        self._connection = None
        self._balancer.forget()
        self._handover.forget()
        self.shards.drop()
        self._tails.clear()

    def tick(self, now: float) -> None:
        """Once a second: open what is missing, write the vitals, and balance. `now` is the wall clock."""
        if self._connection is None or self.is_bystander:
            return
        if self.shards.needs_apply:
            self._services.calls.call_soon(self._apply_layout)
        for shard in self.shards.to_list():
            shard.check_waiting()
        self._balancer.tell(now, generation=self.layout.generation, stands_by=not self._is_stopping)
        self._services.calls.call_soon(self._balance)

    def on_message(self, body: bytes, offset: int) -> None:
        """Take one record of the manifest."""
        heard = self._manifest.note(body, offset)
        if heard is Heard.MISSED:
            self._host.repair_soon()
        if self.is_behind:
            return
        # Neither appending, nor opening and closing channels, is for a message handler: both may read the socket.
        if self._manifest.is_snapshot_due:
            self._services.calls.call_soon(self._append_snapshot)
        if not is_known(self.layout.protocol):
            self.stand_by(self.layout.protocol)
        elif heard is Heard.CHANGED:
            self._services.calls.call_soon(self._apply_layout)

    def close_shard(self, shard: Shard) -> None:
        """Close a shard that this worker gives up, and open it anew if it is still wanted."""
        if not self._is_stopping and self.shards.close(shard):
            self._stop_tailing_if_gone()
            self._services.calls.call_soon(self._apply_layout)

    def note_lost(self, shard: Shard) -> None:
        """Forget a shard whose consumer the broker has ended; the next tick opens it anew, if its queue exists."""
        logger.warning("%s: the broker has ended this worker's consumer", shard.queue)
        self.shards.is_complete = False
        self.shards.remove(shard)
        self._host.repair_soon()
        shard.freeze()
        # Closing reads the socket, which a message handler must not do.
        self._services.calls.call_soon(partial(self._close_lost, shard))

    def _close_lost(self, shard: Shard) -> None:
        shard.close()
        self._host.kill_orphans()

    def _give_all_up(self) -> None:
        if self._connection is None or self._is_stopping:
            return
        for shard in self.shards.to_list():
            self._handover.begin(shard)
        self._stop_tailing_if_gone()

    def _stop_tailing_if_gone(self) -> None:
        if self.is_bystander and not self.shards.by_queue:
            tails, self._tails = self._tails, []
            for tail in tails:
                tail.close()

    def _tail_manifest(self) -> Tailing:
        return self._services.log.tail(self._connection, self.names.manifest, self.layout.through + 1, self)

    def _append_snapshot(self) -> None:
        if self._manifest.is_snapshot_due and not self._is_leaving:
            snapshot = self._manifest.make_snapshot(by=self._services.node)
            self._services.log.append(self.names.manifest, snapshot, optional=True)

    def _apply_layout(self) -> None:
        """Consume what the layout says, and nothing else, unless the group is being left."""
        if self._connection is None or not self.layout.open_segments or self._is_leaving:
            return
        opened = self.shards.apply(self.layout, self._connection, self)
        for shard in opened:
            self._balancer.probe(shard, time.time())

    def _balance(self) -> None:
        if self._connection is None or not self.shards.is_complete or self._is_leaving:
            return
        self._balancer.balance(self._connection)
        if self._balancer.is_moving:
            again = partial(self._services.calls.call_soon, self._balance)
            self._services.calls.call_after(_FREEZE_POLL_SECONDS, again)
