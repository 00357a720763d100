"""The moves that a worker makes: of the plan, it carries out what it must give up itself.

    owner ──plan says so, view steady──▶ offered ──others stepped back──▶ frozen ──idle──▶ released
                                                                             │
                                                                             └─not idle in time─▶ owner, tries later

    offered    written to the journal: this shard goes to that worker. The other standbys of the shard step back: they
               close and open their channels, so that they stand behind it in the broker's line
    frozen     no further task of the shard starts; what runs may end, for at most two seconds
    released   the channel is closed, which makes the next in line the owner, and opened again as a standby

Brokers make the consumer that has waited longest the next active one, on 3.x and, among equals, on 4.x; so the line
decides, and no priorities are needed, which would stop deliveries while they wait. A worker that got a shard it should
not have gives it up again. None of this is needed for the order of a key: it only decides who works.
"""

from __future__ import annotations

from typing import Protocol

from celery_sharding.worker.balance.plan import Member, View

OFFER_SECONDS = 1.5
FREEZE_SECONDS = 2.0
BACK_OFF_SECONDS = 5.0


class Hands(Protocol):
    """What is done to this worker's shards, by queue."""

    def offer(self, queue: str, target: str) -> None:
        """Announce that a queue goes to the worker `target`."""

    def freeze(self, queue: str) -> None:
        """Start nothing more of a queue."""

    def thaw(self, queue: str) -> None:
        """Take that back."""

    def is_idle(self, queue: str) -> bool:
        """Say whether nothing of a queue runs, or is held in the middle of its work."""

    def release(self, queue: str) -> None:
        """Close a queue's channel, and stand by again."""


class Moves:
    """Carries out this worker's part of the plan for one group. `now` is monotonic."""

    def __init__(self, node: str, view: View, hands: Hands) -> None:
        self._node = node
        self._view = view
        self._hands = hands
        self._offered: dict[str, float] = {}
        self._frozen: dict[str, float] = {}
        self._not_before: dict[str, float] = {}

    @property
    def is_freezing(self) -> bool:
        """Whether a shard is frozen, so that `tick` should come again soon."""
        return bool(self._frozen)

    def tick(self, me: Member, now: float) -> None:
        """Go on with moves, and begin those the plan asks of this worker. Call it once a second or more often."""
        self._view.hear(self._node, me, now)
        self._go_on(me, now)
        plan = self._view.plan(now)
        if self._offered or self._frozen:
            return
        for queue, target in plan.items():
            if queue in me.owned and now >= self._not_before.get(queue, 0.0):
                self._offered[queue] = now
                self._hands.offer(queue, target)

    def give_up(self, queue: str, now: float) -> None:
        """Release a queue as soon as it is idle, to whoever is next: this worker has held a message of it for long."""
        if queue in self._frozen or now < self._not_before.get(queue, 0.0):
            return
        self._offered.pop(queue, None)
        self._frozen[queue] = now
        self._hands.freeze(queue)

    def forget(self) -> None:
        """Forget moves under way: the connection is gone, or all is being given up."""
        self._offered.clear()
        self._frozen.clear()

    def _go_on(self, me: Member, now: float) -> None:
        for queue, since in list(self._offered.items()):
            if queue not in me.owned:
                del self._offered[queue]
            elif now - since >= OFFER_SECONDS:
                del self._offered[queue]
                self._frozen[queue] = now
                self._hands.freeze(queue)
        for queue, since in list(self._frozen.items()):
            if queue not in me.owned:
                del self._frozen[queue]
            elif self._hands.is_idle(queue):
                del self._frozen[queue]
                self._hands.release(queue)
            elif now - since >= FREEZE_SECONDS:
                del self._frozen[queue]
                self._not_before[queue] = now + BACK_OFF_SECONDS
                self._hands.thaw(queue)
