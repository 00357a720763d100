"""Which fault happens when, and to whom: a pure function of the seed, so that a seed that failed fails again.

Faults come in bursts of one to four. Who was hit is left alone until it has recovered, so that each fault is one fault
and not the tail of another; a fault of the broker, which hits everybody, may fall upon any other.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Collection
from dataclasses import dataclass

# What the workers of a soak ask for; a pause stays below it, so that nobody may count a paused worker as gone.
HEARTBEAT_SECONDS = 5.0
GROUPS = ("keys", "serial", "ledger")
_QUIET_SECONDS = 3.0
_GAP_SECONDS = (6.0, 20.0)
_BURST_MAX = 4


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
    RESTART_BROKER = "restart-broker"
    KILL_BROKER = "kill-broker"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Args:
        at_seconds: Since the beginning.
        kind: What happens.
        target: "w1", "p1", a group, "broker", or for `JOIN` the name of the worker that comes.
        seconds: Until it is over: healed, started again, gone.
        draw: From 0 to below 1, for what else there is to choose: a child, a direction.
    """

    at_seconds: float
    kind: Kind
    target: str
    seconds: float
    draw: float

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.1f} s" if self.seconds else ""
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
    Kind.RESTART_BROKER: _Habit(1, (0, 0), 25),
    Kind.KILL_BROKER: _Habit(1, (0, 2), 25),
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
        Kind.CUT_PUBLISHER: [f"p{number}" for number in range(1, publishers + 1)],
        Kind.DELETE_RING: sorted(groups),
        Kind.RESTART_BROKER: ["broker"],
        Kind.KILL_BROKER: ["broker"],
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
                kind: ["a guest"]
                if kind is Kind.JOIN
                else [name for name in names.get(kind, stable) if left_alone_until.get(name, 0.0) <= burst]
                for kind in chosen
            }
            targets = {
                kind: free for kind, free in targets.items() if free and left_alone_until.get(kind, 0.0) <= burst
            }
            if not targets:
                break
            kind = rng.choices(list(targets), [_HABITS[kind].weight for kind in targets])[0]
            target = rng.choice(targets[kind])
            if kind is Kind.JOIN:
                joined += 1
                target = f"w{workers + joined}"
            habit = _HABITS[kind]
            seconds = min(rng.uniform(*habit.seconds), end_seconds - burst)
            faults.append(Fault(round(burst, 2), kind, target, round(seconds, 2), round(rng.random(), 4)))
            left_alone_until[kind if kind is Kind.JOIN else target] = burst + seconds + habit.rest_seconds
            burst += rng.uniform(0.0, 0.5)
        moment += rng.uniform(*_GAP_SECONDS)
    return tuple(sorted(faults, key=lambda fault: fault.at_seconds))
