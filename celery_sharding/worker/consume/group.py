"""One group in this worker: which queues it consumes now, following the manifest.

A group consumes a chain of segments in order. This worker consumes the queues of the open segments that were selected
for it (`-Q`), all of their limbo queues, and nothing else. When the manifest, which it tails, says that a segment is
passed or drained, it opens the queues of the next, and closes those of the drained: every worker does the same from the
same log. What may start while several are open is said by `gates`, and who owns what by `balancing`.

The selection may change while it runs (`select`), and so may, by the manifest, what is paused; what is not to be
consumed any more is given up in order (`departures`).

So is the whole group when its manifest, or a control message in one of its queues, asks for a protocol that this
version does not know: then the worker is a bystander of it, for as long as it runs.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from amqp.exceptions import NotFound

from celery_sharding.config import ShardGroup
from celery_sharding.layout.model import Layout
from celery_sharding.layout.protocol import describe_need, is_known
from celery_sharding.layout.retention import Reading
from celery_sharding.rabbitmq.streams import decode
from celery_sharding.rabbitmq.tail import Tail
from celery_sharding.topology import Names
from celery_sharding.worker.balance.balancer import Balancing
from celery_sharding.worker.balance.handover import Departures
from celery_sharding.worker.calls import Calls
from celery_sharding.worker.consume.wanted import find_blocked, find_paused, find_wanted
from celery_sharding.worker.executor import Executor
from celery_sharding.worker.log import Log
from celery_sharding.worker.redelivery.attempts import Attempts
from celery_sharding.worker.run.delivery import Delivery
from celery_sharding.worker.shard.segment_gate import Gate, gate_for
from celery_sharding.worker.shard.shard import Shard

logger = logging.getLogger(__name__)


class GroupConsumer:
    """Consumes one group on the worker's connection."""

    def __init__(
        self,
        group: ShardGroup,
        selection: frozenset[int] | None,
        *,
        runs: Executor,
        log: Log,
        receive: Callable[[Delivery], None],
        calls: Calls,
        look: Callable[[], None],
        release_orphans: Callable[[], None],
        hold_seconds: float,
        node: str,
        prefetch: int,
        has_logs: bool,
    ) -> None:
        self.group = group
        self.names = Names(group.name)
        self.layout = Layout()
        self._reading = Reading()
        self.shards: dict[str, Shard] = {}
        self._selection = selection
        self._runs = runs
        self._log = log
        self._receive = receive
        self._calls = calls
        self._look = look
        self._release_orphans = release_orphans
        self._complete = True
        self._is_gated = False
        self._node = node
        self._prefetch = prefetch
        self._has_logs = has_logs
        self._attempts = Attempts(self.names.attempts if has_logs else None, log)
        self._connection: Any = None
        self._tails: list[Tail] = []
        self._blocked: list[str] = []
        self._stopping = False
        self.needed_protocol: int | None = None
        self._departures = Departures(
            is_running=lambda shard: runs.lanes.running(shard) > 0,
            record=lambda then: self._attempts.when_written(then, call_soon=calls.call_soon),
            close=self._close_departed,
            call_later=lambda seconds, call: calls.call_after(seconds, lambda: calls.call_soon(call)),
        )
        self._balancing = Balancing(
            self.names,
            self.shards,
            self._departures,
            lanes=runs.lanes,
            waits=runs.waits,
            log=log,
            calls=calls,
            node=node,
            hold_seconds=hold_seconds,
            prefetch=prefetch,
            connection=lambda: self._connection if self._complete and not self._is_leaving else None,
            step_back=self._step_back,
        )

    @property
    def is_open(self) -> bool:
        """Whether it is following its group on a connection."""
        return self._connection is not None

    @property
    def is_behind(self) -> bool:
        """Whether its layout may be an old one, because records of the manifest are gone that it has not read."""
        return self._reading.misses is not None

    @property
    def is_bystander(self) -> bool:
        """Whether a newer version acts on the group, and this worker leaves it alone; see `needed_protocol`."""
        return self.needed_protocol is not None

    @property
    def _is_leaving(self) -> bool:
        return self._stopping or self.is_bystander

    @property
    def is_complete(self) -> bool:
        """Whether it consumes all queues that were selected and are not paused."""
        return self.is_open and self._complete and bool(self.layout.open_segments)

    def select(self, selection: frozenset[int] | None) -> None:
        """Consume these shards from now on; others are given up as soon as nothing of them runs."""
        self._selection = selection
        self._calls.call_soon(self._apply_layout)

    def roles(self) -> dict[str, str]:
        """Return queue → "owner", "standby", "leaving" (what runs of it may end), "paused", or "bystander, …" and why.

        A bystander since its start knows no queues, and says so of the group's exchange.
        """

        def role(shard: Shard) -> str:
            return "leaving" if shard in self._departures else "owner" if shard.owned else "standby"

        if self.is_bystander:
            wanted = find_wanted(self.names, self.layout, self._selection) or [self.names.publish]
            left = {queue: role(shard) for queue, shard in list(self.shards.items())}
            return dict.fromkeys(wanted, f"bystander, needs protocol {self.needed_protocol}") | left
        paused = dict.fromkeys(find_paused(self.names, self.layout, self._selection), "paused")
        return paused | {queue: role(shard) for queue, shard in list(self.shards.items())}

    def open(self, connection: Any, layout: Layout) -> None:
        """Start consuming what the layout says, and following it."""
        self._connection = connection
        self._stopping = False
        self.layout = layout
        if self._has_logs:
            self._tails = [
                self._tail_manifest(),
                Tail(connection, self.names.attempts, "first", self._attempts.on_message),
                Tail(connection, self.names.journal, "next", self._balancing.on_message),
            ]
        self._apply_layout()

    def relearn(self, layout: Layout) -> None:
        """Go on from a layout that was just read, since records that were to be tailed are gone."""
        if self._connection is None or self._is_leaving or not self.is_behind or not self._tails:
            return
        self._tails[0].close()
        self.layout = layout
        self._tails[0] = self._tail_manifest()
        self._apply_layout()

    def _append_snapshot(self) -> None:
        if self._reading.is_snapshot_due and not self._is_leaving:
            self._log.append(self.names.manifest, self._reading.make_snapshot(by=self._node), optional=True)

    def _tail_manifest(self) -> Tail:
        self._reading = Reading(self.layout)
        return Tail(self._connection, self.names.manifest, self.layout.through + 1, self._on_manifest)

    def stand_by(self, protocol: int) -> None:
        """Become a bystander: give all shards up in order, and write nothing more of the group.

        May be called from a message handler.
        """
        if self.is_bystander:
            return
        self.needed_protocol = protocol
        need = describe_need(protocol)
        logger.error("group %s %s. This worker gives it up, and leaves it alone until then", self.group.name, need)
        self._balancing.reset()
        for shard in self.shards.values():
            shard.freeze()
            shard.ending.stop()
        # Closing channels reads the socket, which a message handler must not do.
        self._calls.call_soon(self._depart)

    def _depart(self) -> None:
        if self._connection is None or self._stopping:
            return
        for shard in list(self.shards.values()):
            self._departures.begin(shard)
        self._stop_tailing_if_gone()

    def _stop_tailing_if_gone(self) -> None:
        if self.is_bystander and not self.shards:
            tails, self._tails = self._tails, []
            for tail in tails:
                tail.close()

    def freeze(self) -> None:
        """Start nothing more, for good: the worker stops, or its connection is gone."""
        self._stopping = True
        self._balancing.reset()
        self._departures.forget()
        for shard in self.shards.values():
            shard.freeze()

    def give_up(self, shard: Shard) -> None:
        """Close one frozen shard of this group, if it is that, while the worker stops."""
        if self.shards.get(shard.queue) is shard:
            del self.shards[shard.queue]
            shard.close()

    def withdraw(self) -> None:
        """Before `close` or `give_up`: tell the next owners which runs did not begin."""
        for shard in self.shards.values():
            shard.withdraw()

    def close(self) -> None:
        """Give all shards up."""
        self.freeze()
        self._connection = None
        for shard in list(self.shards.values()):
            shard.close()
        self.shards.clear()
        self._tails.clear()

    def drop(self) -> None:
        """Forget everything that came over a connection that is gone."""
        self._connection = None
        self._balancing.reset()
        self._departures.forget()
        for shard in list(self.shards.values()):
            shard.drop()
        self.shards.clear()
        self._tails.clear()

    def tick(self, now: float) -> None:
        """Once a second: write the vitals, probe shards whose owner is silent, and balance. `now` is the wall clock."""
        if self._connection is None or not self._has_logs or self.is_bystander:
            return
        if not self._complete or self._is_gated:
            self._calls.call_soon(self._apply_layout)
        for shard in list(self.shards.values()):
            shard.ending.look_at_waiting()
        self._balancing.tick(now, generation=self.layout.generation, stands_by=not self._stopping)

    def _close_departed(self, shard: Shard) -> None:
        if self._stopping or self.shards.get(shard.queue) is not shard:
            return
        del self.shards[shard.queue]
        shard.close()
        logger.info("group %s: given up %s", self.group.name, shard.queue)
        self._stop_tailing_if_gone()
        self._calls.call_soon(self._apply_layout)  # it may be wanted again meanwhile

    def _on_manifest(self, body: bytes, offset: int) -> None:
        event = decode(body, stream=self.names.manifest, offset=offset)
        was_behind, before = self.is_behind, self.layout
        self._reading.note(offset, event)
        if self.is_behind:
            if not was_behind:
                logger.warning("group %s: records of its manifest are gone before they were read", self.group.name)
                self._look()  # it reads what there is, and `relearn`s
            return
        self.layout = self._reading.layout
        if self._reading.is_snapshot_due:
            self._calls.call_soon(self._append_snapshot)
        if not is_known(self.layout.protocol):
            self.stand_by(self.layout.protocol)
        elif self.layout != before:
            # Opening and closing channels reads the socket, which a message handler must not do.
            self._calls.call_soon(self._apply_layout)

    def _step_back(self, queue: str) -> None:
        """Leave the line of a shard's standbys and join its end, so that the worker it is offered to is next."""
        shard = self.shards.get(queue)
        if shard is not None and not shard.owned and self._connection is not None and not self._is_leaving:
            del self.shards[queue]
            shard.close()
            self._apply_layout()

    def _on_cancel(self, shard: Shard) -> None:
        """Forget a shard whose consumer the broker has ended; the next tick consumes it again, if it still exists."""
        logger.warning("%s: the broker has ended this worker's consumer", shard.queue)
        self._complete = False
        if self.shards.get(shard.queue) is shard:
            del self.shards[shard.queue]
        self._look()

        def give_up() -> None:
            shard.close()
            self._release_orphans()

        shard.freeze()
        self._calls.call_soon(give_up)  # closing reads the socket, which a message handler must not do

    def _apply_layout(self) -> None:
        """Consume what the layout says, and nothing else."""
        segments = self.layout.open_segments
        if self._connection is None or not segments or self._is_leaving:
            return
        wanted = find_wanted(self.names, self.layout, self._selection)
        self._note_pauses()
        in_turn = {queue for segment in segments for queue in segment.queues(self.names)}
        for queue, shard in list(self.shards.items()):
            if queue in wanted:
                self._departures.take_back(shard)
            elif queue in in_turn:
                self._departures.begin(shard)
            else:
                del self.shards[queue]
                shard.close()
        opened = {queue: place for queue, place in wanted.items() if queue not in self.shards}
        for queue, (segment, index) in opened.items():
            self._open_shard(queue, segment, index)
        self._complete = all(queue in self.shards for queue in wanted)
        self._learn_endings()
        consumed = (segment for queue, (segment, _) in opened.items() if queue in self.shards)
        for name, count in Counter(consumed).items():
            logger.info("group %s: consuming %s, %d queues", self.group.name, name, count)

    def _note_pauses(self) -> None:
        """Say so when the chain begins to wait for what is paused."""
        was, self._blocked = self._blocked, find_blocked(self.names, self.layout)
        if self._blocked and self._blocked != was:
            logger.warning(
                "group %s: what was published later waits for the paused %s to be resumed and to drain",
                self.group.name,
                ", ".join(self._blocked),
            )

    def _open_shard(self, queue: str, segment: str, index: int) -> None:
        self.shards[queue] = shard = Shard(
            self.group,
            segment,
            index,
            queue,
            runs=self._runs,
            log=self._log,
            attempts=self._attempts,
            receive=self._receive,
            on_cancel=self._on_cancel,
            on_protocol=self.stand_by,
            call_soon=self._calls.call_soon,
            node=self._node,
        )
        shard.gate = self._gate_for(segment)
        try:
            shard.open(self._connection, self._prefetch)
        except NotFound:
            # It was deleted; a look at the group puts that right, and the manifest says how.
            del self.shards[queue]
            return
        if self._has_logs:
            self._balancing.probe(shard, time.time())

    def _learn_endings(self) -> None:
        """Hand on what the manifest says of the ends of the shards' segments, and let go of what nothing holds back."""
        gates = {segment.name: self._gate_for(segment.name) for segment in self.layout.open_segments}
        for shard in list(self.shards.values()):
            shard.gate = gates.get(shard.segment)
            shard.ending.learn(self.layout.segment(shard.segment))
        was_gated, self._is_gated = self._is_gated, any(gate is not None for gate in gates.values())
        if was_gated or self._is_gated:
            self._runs.lanes.reconsider()

    def _gate_for(self, segment: str) -> Gate | None:
        return gate_for(segment, self.layout, self.group.name, self._runs.lanes)
