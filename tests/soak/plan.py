"""Which fault happens when, and to whom: a pure function of the seed, so that a seed that failed fails again.

Faults come in bursts of one to four. Who was hit is left alone until it has recovered, so that each fault is one fault
and not the tail of another; a fault of the broker or of the store of results and claims, which hits everybody, may fall
upon any other, so may one of a worker's way to that store, and a reshard, which hits nobody. Of a cluster's nodes one
at a time is missing: without most of them there is no broker.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Collection
from dataclasses import dataclass

# What the workers of a soak ask for; a pause stays below it, so that nobody may count a paused worker as gone.
HEARTBEAT_SECONDS = 5.0
GROUPS = ("keys", "serial", "ledger", "once")
# Of a cluster's nodes: after how much silence the others give one up, about.
NET_TICK_SECONDS = 12
NODES = ("n1", "n2", "n3")
SHARDS_MAX = 9
_RESHARD_STEPS = 5
_QUIET_SECONDS = 3.0
_GAP_SECONDS = (6.0, 20.0)
_BURST_MAX = 4
# Within a burst; so long after it was begun, a reshard is in the middle.
_NEXT_SECONDS_MAX = 1.0
_GUEST = "a guest"


class Kind(enum.StrEnum):
    """What can happen."""

    STOP = "stop"
    """A worker is stopped warm and started again at once."""
    LEAVE = "leave"
    """A worker is stopped warm, and comes back later."""
    JOIN = "join"
    """One more worker comes, and is stopped warm later."""
    KILL = "kill"
    """A worker is killed, with its pool."""
    KILL_PARENT = "kill-parent"
    """The main process of a worker is killed, its pool is not."""
    KILL_CHILD = "kill-child"
    """One process of a pool is killed."""
    PAUSE = "pause"
    """The main process of a worker stands still for less than a heartbeat."""
    CUT = "cut"
    """The connections of a worker are cut."""
    STALL = "stall"
    """The link of a worker passes nothing on for a while."""
    BLACKHOLE = "blackhole"
    """The link of a worker loses everything for a while."""
    CUT_PUBLISHER = "cut-publisher"
    """The connections of a publisher are cut."""
    DELETE_RING = "delete-ring"
    """An operator deletes the exchange of a group's ring."""
    RESHARD = "reshard"
    """A group gets another number of shards; in half of the cases the caller is killed in the middle."""
    RESTART_BROKER = "restart-broker"
    KILL_BROKER = "kill-broker"
    KILL_NODE = "kill-node"
    """A node of a cluster is killed, and comes back later."""
    RESTART_NODE = "restart-node"
    """A node of a cluster is stopped in order, and comes back at once."""
    PAUSE_NODE = "pause-node"
    """A node of a cluster hangs; if for long, it is given up, finds itself in the minority, and joins again."""
    CUT_BACKEND = "cut-backend"
    """A worker is cut off from the result backend, where its claims are, too, for a while."""
    BLACKHOLE_BACKEND = "blackhole-backend"
    """The link of a worker to the result backend loses everything for a while."""
    STOP_STORE = "stop-store"
    """The Redis of results and claims hangs for a while, or is stopped and comes back later with what it knew."""


NODE_KINDS = frozenset({Kind.KILL_NODE, Kind.RESTART_NODE, Kind.PAUSE_NODE})
BACKEND_KINDS = frozenset({Kind.CUT_BACKEND, Kind.BLACKHOLE_BACKEND})
STORE_KINDS = BACKEND_KINDS | {Kind.STOP_STORE}


def victim_of(kind: Kind, target: str) -> str:
    """Return what suffers one fault at a time."""
    if kind in NODE_KINDS:
        return "a node"
    if kind in BACKEND_KINDS:
        return f"the backend of {target}"
    return f"{kind} {target}" if kind is Kind.RESHARD else target


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Args:
        at_seconds: Since the beginning.
        kind: What happens.
        target: "w1", "p1", a group, "broker", "store", "n1", or for `JOIN` the name of the worker that comes.
        seconds: Until it is over: healed, started again, gone.
        draw: From 0 to below 1, for what else there is to choose: a child, a direction, a number of shards.
    """

    at_seconds: float
    kind: Kind
    target: str
    seconds: float
    draw: float

    @property
    def victim(self) -> str:
        return victim_of(self.kind, self.target)

    @property
    def hangs(self) -> bool:
        """Whether a store that is to stop hangs, or else ends and is started again."""
        return self.draw < 0.5

    @property
    def shards(self) -> int:
        """How many shards a reshard asks for."""
        return 1 + int(self.draw * SHARDS_MAX)

    @property
    def dies_after(self) -> int | None:
        """The step of a reshard after which its caller is killed; None if it is not."""
        step = 1 + int(self.draw * SHARDS_MAX % 1 * 2 * _RESHARD_STEPS)
        return step if step <= _RESHARD_STEPS else None

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.1f} s" if self.seconds else ""
        if self.kind is Kind.RESHARD:
            lasting = f" to {self.shards}" + (f", killed after step {self.dies_after}" if self.dies_after else "")
        if self.kind is Kind.STOP_STORE:
            lasting += ", hanging" if self.hangs else ", ended"
        return f"{self.kind} {self.target}{lasting}"


@dataclass(frozen=True, slots=True)
class _Habit:
    """How often a kind happens beside others, how long it lasts, and how long its victim is left alone after it."""

    weight: float
    seconds: tuple[float, float]
    rest_seconds: float


_HABITS = {
    Kind.STOP: _Habit(3, (0, 0), 8),
    Kind.LEAVE: _Habit(1, (3, 9), 5),
    Kind.JOIN: _Habit(1.5, (6, 14), 8),
    Kind.KILL: _Habit(3, (0, 4), 6),
    Kind.KILL_PARENT: _Habit(2, (0, 4), 6),
    Kind.KILL_CHILD: _Habit(4, (0, 0), 1),
    Kind.PAUSE: _Habit(2, (0.5, 0.8 * HEARTBEAT_SECONDS), 2),
    Kind.CUT: _Habit(3, (0, 0), 4),
    Kind.STALL: _Habit(2, (1, 3 * HEARTBEAT_SECONDS), 6),
    Kind.BLACKHOLE: _Habit(2, (1, 3 * HEARTBEAT_SECONDS), 6),
    Kind.CUT_PUBLISHER: _Habit(3, (0, 0), 1),
    Kind.DELETE_RING: _Habit(1.5, (0, 0), 15),
    Kind.RESHARD: _Habit(2, (0, 0), 6),
    Kind.RESTART_BROKER: _Habit(1, (0, 0), 25),
    Kind.KILL_BROKER: _Habit(1, (0, 2), 25),
    Kind.KILL_NODE: _Habit(1.5, (0, 8), 20),
    Kind.RESTART_NODE: _Habit(1, (0, 0), 25),
    Kind.PAUSE_NODE: _Habit(1.5, (2, 2.5 * NET_TICK_SECONDS), 20),
    Kind.CUT_BACKEND: _Habit(2, (1, 2 * HEARTBEAT_SECONDS), 6),
    Kind.BLACKHOLE_BACKEND: _Habit(2, (1, 3 * HEARTBEAT_SECONDS), 6),
    Kind.STOP_STORE: _Habit(2, (1, 2 * HEARTBEAT_SECONDS), 12),
}


def plan_faults(
    seed: int,
    minutes: float,
    *,
    workers: int = 3,
    publishers: int = 2,
    groups: Collection[str] = GROUPS,
    kinds: Collection[Kind] = tuple(Kind),
) -> tuple[Fault, ...]:
    """Return the faults of a soak in their order; all are over before its end."""
    rng = random.Random(seed)
    chosen = [kind for kind in Kind if kind in kinds]
    names = {
        Kind.JOIN: [_GUEST],
        Kind.CUT_PUBLISHER: [f"p{number}" for number in range(1, publishers + 1)],
        Kind.DELETE_RING: sorted(groups),
        Kind.RESHARD: sorted(groups),
        Kind.RESTART_BROKER: ["broker"],
        Kind.KILL_BROKER: ["broker"],
        Kind.STOP_STORE: ["store"],
        **{kind: list(NODES) for kind in NODE_KINDS},
    }
    stable = [f"w{number}" for number in range(1, workers + 1)]
    left_alone_until: dict[str, float] = {}
    joined = 0
    faults: list[Fault] = []
    end_seconds = minutes * 60.0
    moment = rng.uniform(_QUIET_SECONDS, 2 * _QUIET_SECONDS)
    while moment < end_seconds - _QUIET_SECONDS:
        burst = moment
        for _ in range(rng.randint(1, _BURST_MAX)):
            targets = {
                kind: [
                    name
                    for name in names.get(kind, stable)
                    if left_alone_until.get(victim_of(kind, name), 0.0) <= burst
                ]
                for kind in chosen
            }
            targets = {kind: free for kind, free in targets.items() if free}
            if not targets:
                break
            kind = rng.choices(list(targets), [_HABITS[kind].weight for kind in targets])[0]
            target = rng.choice(targets[kind])
            victim = victim_of(kind, target)
            if kind is Kind.JOIN:
                joined += 1
                target = f"w{workers + joined}"
            habit = _HABITS[kind]
            seconds = min(rng.uniform(*habit.seconds), end_seconds - burst)
            faults.append(Fault(round(burst, 2), kind, target, round(seconds, 2), round(rng.random(), 4)))
            left_alone_until[victim] = burst + seconds + habit.rest_seconds
            burst += rng.uniform(0.0, _NEXT_SECONDS_MAX)
        moment += rng.uniform(*_GAP_SECONDS)
    return tuple(sorted(faults, key=lambda fault: fault.at_seconds))
