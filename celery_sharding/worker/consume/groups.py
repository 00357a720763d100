"""The groups of one worker: which it consumes, and whether the broker has all that they need.

    selected ──prepare, or a repair──▶ ready on the broker ──open──▶ consumed ──drop──▶ selected: the connection is lost

The selection may change while the worker runs (`cancel_shards`, `add_shards`). A group stays here when all of its
shards are cancelled; a new one is made ready by a repair, and then opened. A worker's own shards are those that it was
started with, and those that it was told by its name to add.

Every ten seconds, and when a shard is lost, a thread repairs each group: it replaces what is missing on the broker, and
the manifest tells everybody what was done. That thread opens nothing. Only the thread that reads the connection opens,
gives up and closes, and changes the selection. Other threads only ask.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import Any, Protocol

from amqp.exceptions import AMQPError

from celery_sharding.config import ShardGroup
from celery_sharding.dedup.notices import Notice
from celery_sharding.errors import (
    BrokerUnavailable,
    LockHeld,
    LockLost,
    LogError,
    OutOfReach,
    ProtocolTooOld,
    ShardingError,
    TooFewChannels,
)
from celery_sharding.layout.channels import allowed_channels, describe_shortage, needed_channels
from celery_sharding.layout.model import Layout
from celery_sharding.shard_names import Indexes, check_shard, with_shards, without_shards
from celery_sharding.worker.consume.group import GroupConsumer
from celery_sharding.worker.consume.wanted import count_wanted
from celery_sharding.worker.services import WorkerServices
from celery_sharding.worker.shard.shard import Shard

logger = logging.getLogger(__name__)


class Broker(Protocol):
    """What the groups need of the broker they live on."""

    def ensure(self, group: ShardGroup, *, owner: str, known: Layout | None = None) -> Layout:
        """Make the group ready for workers and return its layout; remove what it left behind if `known` is given."""

    def join_group(self, consumer: Any, group: ShardGroup) -> Any:
        """Make the worker of `consumer` one of the group's, and return what its shards open their channels on."""


class Worker(Protocol):
    """What the groups need of their worker."""

    @property
    def is_stopping(self) -> bool:
        """Whether nothing may be opened any more."""

    def kill_orphans(self) -> None:
        """End the runs whose messages are the broker's again."""


class Groups:
    """The groups that the worker of `consumer`, Celery's, consumes.

    Args:
        selection: Group → indexes of its shards that were chosen for this worker.
    """

    def __init__(
        self,
        consumer: Any,
        broker: Broker,
        selection: dict[str, Indexes],
        *,
        host: Worker,
        services: WorkerServices,
    ) -> None:
        self._consumer = consumer
        self._broker = broker
        self._selection = selection
        self._own = dict(selection)
        self._host = host
        self._services = services
        self._groups: list[GroupConsumer] = []
        self._layouts: list[Layout | None] = []
        self._repairing = threading.Lock()

    @property
    def is_consuming(self) -> bool:
        """Whether this worker consumes all that was selected for it and that it may act on, as owner or standby."""
        return all(group.is_complete or group.is_bystander for group in list(self._groups))

    @property
    def is_bystander(self) -> bool:
        """Whether a newer version acts on one of the groups, which this worker leaves alone."""
        return any(group.is_bystander for group in list(self._groups))

    def indexes(self) -> dict[str, list[int]]:
        """Return by group the indexes of the queues that are consumed."""
        return {
            group.group.name: sorted(shard.place.index for shard in group.shards.to_list()) for group in self._groups
        }

    def roles(self) -> dict[str, dict[str, str]]:
        """Return by group this worker's role for each queue, as `GroupConsumer.roles` names it."""
        return {group.group.name: group.roles() for group in list(self._groups)}

    def cancel_shards(self, group: str, index: int | None) -> bool:
        """Give up a shard of a group, or all of them, in order, until it is added again. False: there was none.

        Raises:
            UnknownShard: The group has no such shard.
        """
        shards = self._count_shards(group, index)
        before = self._selection.get(group, frozenset())
        self._select(group, without_shards(before, index, shards))
        return self._selection[group] != before

    def add_shards(self, group: str, index: int | None, *, by_name: bool) -> Indexes:
        """Consume a shard of a group, or all of them, from now on; return which of those asked for it consumes then.

        Args:
            by_name: This worker was named. A command to all workers lets each take back its own shards only.

        Raises:
            UnknownShard: The group has no such shard.
        """
        shards = self._count_shards(group, index)
        if by_name:
            self._own[group] = with_shards(self._own.get(group, frozenset()), index, shards)
        own = self._own.get(group, frozenset())
        asked = None if index is None else frozenset({index})
        taken = own if asked is None else asked if own is None else asked & own
        selected = self._selection.get(group, frozenset())
        for each in [None] if taken is None else sorted(taken):
            selected = with_shards(selected, each, shards)
        if taken is None or taken:
            self._select(group, selected)
        return taken

    def prepare(self) -> None:
        """At each connect: make the selected groups ready on the broker. It may take long, and reads no connection.

        Raises:
            ConnectionResetError: It failed for a passing reason; Celery connects again.
        """
        if not self._groups:
            self._groups = [self._make_group(name) for name in self._selection]
        self._layouts = [self._ensure(group) for group in self._groups]

    def check_channels(self) -> None:
        """At each connect, once the groups are ready: check that the connection may open a channel for each queue.

        Raises:
            TooFewChannels: It may not. Without this check it would be closed and opened again for ever.
        """
        connection = self._consumer.connection
        allowed = allowed_channels(connection)
        if allowed is None:
            return
        queues = [
            count_wanted(group.names, layout, self._selection[group.group.name])
            for group, layout in zip(self._groups, self._layouts, strict=True)
            if layout is not None
        ]
        needed = needed_channels(queues, others=len(connection.connection.channels) - 1)
        if needed > allowed:
            text, fix = describe_shortage(needed, allowed)
            raise TooFewChannels(f"{text}; {fix}", needed=needed, allowed=allowed)

    def open(self) -> None:
        """Consume what is ready."""
        for group, layout in zip(self._groups, self._layouts, strict=True):
            if layout is None:
                continue
            group.open(self._broker.join_group(self._consumer, group.group), layout)

    def freeze(self) -> None:
        """Start nothing more, for good: the worker stops, or its connection is gone."""
        for group in self._groups:
            group.freeze()

    def give_up_idle(self) -> None:
        """Close the frozen shards of which nothing runs."""
        for group in self._groups:
            for shard in group.shards.to_list():
                self.give_up(shard)

    def give_up(self, shard: Shard) -> None:
        """Close a frozen shard if nothing of it runs."""
        if not self._services.executor.lanes.running(shard):
            for group in self._groups:
                group.shards.close(shard)

    def withdraw(self) -> None:
        """Before shards are closed: tell the next owners which runs did not begin."""
        for group in self._groups:
            group.shards.withdraw()

    def close(self) -> None:
        """Give all shards up."""
        for group in self._groups:
            group.close()

    def drop(self) -> None:
        """Forget everything that came over a connection that is gone."""
        for group in self._groups:
            group.drop()

    def tick(self) -> None:
        """Do what is to be done once a second."""
        now = time.time()
        for group in self._groups:
            group.tick(now)

    def count(self, notice: Notice) -> None:
        """Count what a run under a claim has told, if this worker owns its shard."""
        for group in list(self._groups):
            for shard in group.shards.to_list():
                if shard.place.label == notice.shard and shard.owned:
                    shard.tally.count(notice.what)

    def kill_orphans(self) -> None:
        """End the runs whose messages are the broker's again."""
        self._host.kill_orphans()

    def repair_soon(self) -> None:
        """Replace lost rings and missing queues, in a thread; the manifest tells everybody what was done."""
        if not self._repairing.locked():
            threading.Thread(target=self._repair, name="shards-repair", daemon=True).start()

    def _repair(self) -> None:
        with self._repairing:
            for group in list(self._groups):
                if self._host.is_stopping:
                    return
                if not group.is_bystander:
                    self._repair_group(group)

    def _repair_group(self, group: GroupConsumer) -> None:
        known = group.layout if group.is_open and not group.is_behind else None
        call_main = self._services.calls.call_main
        try:
            layout = self._broker.ensure(group.group, owner=self._services.node, known=known)
        except ProtocolTooOld as exc:
            call_main(partial(group.stand_by, exc.needed))
        except (ShardingError, AMQPError, OSError) as exc:
            logger.warning("group %s could not be checked on the broker: %s", group.group.name, exc)
        else:
            if known is None:
                call_main(partial(self._open_added, group, layout))

    def _open_added(self, group: GroupConsumer, layout: Layout) -> None:
        """Open a group that was added while the worker runs; after a loss of the connection `open` does."""
        c = self._consumer
        group.relearn(layout)
        if not group.is_open and not group.is_bystander and not self._host.is_stopping and c.connection is not None:
            group.open(self._broker.join_group(c, group.group), layout)

    def _ensure(self, group: GroupConsumer) -> Layout | None:
        """Make a group ready; None: it is left alone. A passing reason is left to Celery, which connects again."""
        if group.is_bystander:
            return None
        try:
            return self._broker.ensure(group.group, owner=self._services.node)
        except ProtocolTooOld as exc:
            group.stand_by(exc.needed)
            return None
        except (BrokerUnavailable, LockHeld, LockLost, LogError, OutOfReach) as exc:
            raise ConnectionResetError(str(exc)) from exc

    def _find(self, name: str) -> GroupConsumer | None:
        return next((group for group in self._groups if group.group.name == name), None)

    def _count_shards(self, name: str, index: int | None) -> int:
        """Return how many shards a group has, having checked that `index` is one of them."""
        group = self._find(name)
        live_shards = group.layout.shards if group is not None else 0
        shards = live_shards or self._consumer.app.sharding.settings.groups[name].shards
        if index is not None:
            check_shard(name, index, shards)
        return int(shards)

    def _select(self, name: str, indexes: Indexes) -> None:
        self._selection[name] = indexes
        group = self._find(name)
        if group is not None:
            group.select(indexes)
        elif indexes is None or indexes:
            # The repair makes it ready on the broker, which takes a while, and opens it.
            self._groups.append(self._make_group(name))
            self.repair_soon()

    def _make_group(self, name: str) -> GroupConsumer:
        group = self._consumer.app.sharding.settings.groups[name]
        return GroupConsumer(group, self._selection[name], host=self, services=self._services)
