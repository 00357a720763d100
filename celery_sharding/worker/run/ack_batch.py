"""When the broker is told that messages are done: of a busy worker several at a time.

An acknowledgement of its own for each message is what a short task costs the broker most: an entry in the log of a
quorum queue. So what is done is gathered, and told together, as one acknowledgement of all up to a message where
nothing older is left.

    done ──gather──▶ gathered ──tell──▶ told     before the next run of its lane starts; when the pool is not full;
                        │                        after 20 ms; before its shard is given up
                        └──forget──▶ the broker's again: the channel is gone

So the order of a key never rests on what is gathered, and a worker that is not busy tells at once. A worker that is
killed leaves what it had gathered to be delivered again, as it leaves what it was running.

Only the thread of the event loop may call `Acks`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterable
from typing import Protocol

from celery_sharding.worker.ports import Clock

WAIT_SECONDS = 0.02


class Teller(Protocol):
    """A shard, which tells the broker what of it is done."""

    def tell_done(self) -> None: ...


class Acks:
    """What a worker has done and not told the broker yet."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.forget()

    def forget(self) -> None:
        """Begin with a new connection: what was gathered is the broker's again.

        A timer of the old connection that is still to come tells what is gathered by then, which is never too early.
        """
        self._lanes: dict[Hashable, Teller] = {}
        self._waits = False

    def gather(self, lane: Hashable, shard: Teller) -> None:
        """Let a message of `lane` that is done wait for others."""
        self._lanes[lane] = shard
        if not self._waits:
            self._waits = True
            self._clock.call_after(WAIT_SECONDS, self._tell_late)

    def tell(self, lane: Hashable) -> None:
        """Tell what of `lane` is done, and with it all of its shard."""
        shard = self._lanes.pop(lane, None)
        if shard is not None:
            shard.tell_done()

    def tell_all(self) -> None:
        """Tell everything."""
        while self._lanes:
            self._lanes.popitem()[1].tell_done()

    def _tell_late(self) -> None:
        self._waits = False
        self.tell_all()


def fewest_acks(done: Iterable[int], *, first_left: int | None) -> list[tuple[int, bool]]:
    """Return the acknowledgements that tell a broker of `done` and of nothing else, as (delivery tag, multiple).

    Args:
        done: Delivery tags of one channel, none of them told before.
        first_left: The smallest tag of the channel that was delivered and is neither done nor told; None: there is
            none.
    """
    tags = sorted(done)
    together = len(tags) if first_left is None else bisect_left(tags, first_left)
    if together < 2:
        return [(tag, False) for tag in tags]
    return [(tags[together - 1], True), *((tag, False) for tag in tags[together:])]
