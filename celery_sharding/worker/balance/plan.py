"""Who owns what: shards spread evenly over the workers that consume them, moved only when needed.

Every worker hears the vitals of all others from the journal, once a second, and plans from them alone. The plan is the
same in every worker that has heard the same, and each carries out only what it must give up itself:

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

from collections.abc import Callable, Mapping
from dataclasses import dataclass

MEMBER_SILENT_SECONDS = 4.0
STEADY_SECONDS = 2.0
OFFER_SECONDS = 1.5
FREEZE_SECONDS = 2.0
BACK_OFF_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Member:
    """A worker as it last described itself: the queues it owns, and those it stands by for."""

    owned: frozenset[str]
    standby: frozenset[str]


def plan_moves(members: Mapping[str, Member]) -> dict[str, str]:
    """Return queue → new owner, the fewest moves after which no worker owns two shards more than another could take.

    Nothing is moved while a queue that somebody consumes has no owner, or two: somebody is about to take or to notice.
    """
    owner_of: dict[str, str] = {}
    for name, member in members.items():
        for queue in member.owned:
            if queue in owner_of:
                return {}
            owner_of[queue] = name
    if any(queue not in owner_of for member in members.values() for queue in member.standby):
        return {}
    load = {name: len(member.owned) for name, member in members.items()}
    moves: dict[str, str] = {}
    while True:
        best: tuple[int, str, str, str] | None = None
        for queue in sorted(owner_of):
            donor = moves.get(queue, owner_of[queue])
            if queue in moves:
                continue
            for name in sorted(members):
                gain = load[donor] - load[name]
                if name != donor and gain > 1 and queue in members[name].standby and (best is None or gain > best[0]):
                    best = (gain, queue, donor, name)
        if best is None:
            return moves
        _, queue, donor, name = best
        moves[queue] = name
        load[donor] -= 1
        load[name] += 1


class Balancer:
    """Carries out this worker's part of the plan for one group.

    Args:
        node: This worker's name.
        offer: Announces that a queue goes to a worker.
        freeze: Starts nothing more of a queue.
        thaw: Takes that back.
        is_idle: Says whether nothing of a queue runs or waits for a retry.
        release: Closes a queue's channel and stands by again.
    """

    def __init__(
        self,
        node: str,
        *,
        offer: Callable[[str, str], None],
        freeze: Callable[[str], None],
        thaw: Callable[[str], None],
        is_idle: Callable[[str], bool],
        release: Callable[[str], None],
    ) -> None:
        self._node = node
        self._offer = offer
        self._freeze = freeze
        self._thaw = thaw
        self._is_idle = is_idle
        self._release = release
        self._heard: dict[str, tuple[float, Member]] = {}
        self._planned_for: dict[str, Member] = {}
        self._plan: dict[str, str] = {}
        self._steady_since = 0.0
        self._offered: dict[str, float] = {}
        self._frozen: dict[str, float] = {}
        self._not_before: dict[str, float] = {}

    def hear(self, name: str, member: Member, now: float) -> None:
        """Take note of a worker's vitals. `now` is monotonic."""
        self._heard[name] = (now, member)

    def owner_of(self, queue: str, now: float) -> str | None:
        """Return who says that it owns `queue`."""
        return next((name for name, member in self._members(now).items() if queue in member.owned), None)

    def tick(self, me: Member, now: float) -> None:
        """Go on with moves, and begin those the plan asks of this worker. Call it once a second or more often."""
        self.hear(self._node, me, now)
        self._go_on(me, now)
        members = self._members(now)
        if members != self._planned_for:
            plan = plan_moves(members)
            if plan != self._plan:
                self._plan, self._steady_since = plan, now
            self._planned_for = members
        if now - self._steady_since < STEADY_SECONDS or self._offered or self._frozen:
            return
        for queue, target in self._plan.items():
            if queue in me.owned and now >= self._not_before.get(queue, 0.0):
                self._offered[queue] = now
                self._offer(queue, target)

    def give_up(self, queue: str, now: float) -> None:
        """Release a queue as soon as it is idle, to whoever is next: this worker has held a message of it for long."""
        if queue in self._frozen or now < self._not_before.get(queue, 0.0):
            return
        self._offered.pop(queue, None)
        self._frozen[queue] = now
        self._freeze(queue)

    def reset(self) -> None:
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
                self._freeze(queue)
        for queue, since in list(self._frozen.items()):
            if queue not in me.owned:
                del self._frozen[queue]
            elif self._is_idle(queue):
                del self._frozen[queue]
                self._release(queue)
            elif now - since >= FREEZE_SECONDS:
                del self._frozen[queue]
                self._not_before[queue] = now + BACK_OFF_SECONDS
                self._thaw(queue)

    @property
    def is_freezing(self) -> bool:
        """Whether a shard is frozen and should be looked at often."""
        return bool(self._frozen)

    def _members(self, now: float) -> dict[str, Member]:
        self._heard = {
            name: (at, member) for name, (at, member) in self._heard.items() if now - at < MEMBER_SILENT_SECONDS
        }
        return {name: member for name, (_, member) in self._heard.items()}
