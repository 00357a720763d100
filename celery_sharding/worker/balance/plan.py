"""Who should own what: shards spread evenly over the workers that consume them, moved only when needed.

Every worker hears the vitals of all others from the journal, once a second, and plans from them alone. The plan is the
same in every worker that has heard the same; each carries out only what it must give up itself (`moves`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MEMBER_SILENT_SECONDS = 4.0
STEADY_SECONDS = 2.0


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


class View:
    """The workers of one group as they last described themselves, and the plan that follows. `now` is monotonic."""

    def __init__(self) -> None:
        self._heard: dict[str, tuple[float, Member]] = {}
        self._planned_for: dict[str, Member] = {}
        self._plan: dict[str, str] = {}
        self._steady_since = 0.0

    def hear(self, name: str, member: Member, now: float) -> None:
        """Take note of a worker's vitals."""
        self._heard[name] = (now, member)

    def owner_of(self, queue: str, now: float) -> str | None:
        """Return who says that it owns `queue`."""
        return next((name for name, member in self._members(now).items() if queue in member.owned), None)

    def plan(self, now: float) -> Mapping[str, str]:
        """Return queue → new owner; nothing while the plan is not steady."""
        members = self._members(now)
        if members != self._planned_for:
            plan = plan_moves(members)
            if plan != self._plan:
                self._plan, self._steady_since = plan, now
            self._planned_for = members
        return self._plan if now - self._steady_since >= STEADY_SECONDS else {}

    def _members(self, now: float) -> dict[str, Member]:
        self._heard = {
            name: (at, member) for name, (at, member) in self._heard.items() if now - at < MEMBER_SILENT_SECONDS
        }
        return {name: member for name, (_, member) in self._heard.items()}
