"""What a shard was delivered and has not acknowledged."""

from __future__ import annotations

from itertools import islice
from typing import Any

from celery_sharding.worker.run.ack_batch import fewest_acks
from celery_sharding.worker.run.delivery import Delivery


class Held:
    """The messages of one channel, oldest first.

    Runs of a thread pool end while others look, so what is iterated over is a copy.
    """

    def __init__(self) -> None:
        self._by_tag: dict[Any, Delivery] = {}
        self._done: list[Any] = []
        self._unnamed: set[str] = set()

    def __len__(self) -> int:
        return len(self._by_tag)

    def __contains__(self, delivery: Delivery) -> bool:
        return self._by_tag.get(delivery.tag) is delivery

    @property
    def oldest(self) -> Delivery | None:
        return next(iter(self._by_tag.values()), None)

    @property
    def keys(self) -> set[str]:
        return {delivery.key for delivery in self.to_list()}

    def to_list(self) -> list[Delivery]:
        return list(self._by_tag.values())

    def add(self, delivery: Delivery) -> None:
        self._by_tag[delivery.tag] = delivery

    def remove(self, delivery: Delivery) -> bool:
        """Remove a message that is done; False: it came over an earlier channel, and is the broker's again."""
        if self._by_tag.get(delivery.tag) is not delivery:
            return False
        del self._by_tag[delivery.tag]
        return True

    def gather(self, delivery: Delivery) -> None:
        """Leave the acknowledgement of a message that was removed to the next `take_done`."""
        self._done.append(delivery.tag)

    def take_done(self, *, unsettled: list[Any]) -> list[tuple[Any, bool]]:
        """Return the acknowledgements that tell of what was gathered, as (delivery tag, multiple).

        Args:
            unsettled: Tags of the channel that must not be acknowledged along with it.
        """
        if not self._done:
            return []
        done, self._done = self._done, []
        left = [*islice(self._by_tag, 1), *unsettled[:1]]
        return fewest_acks(done, first_left=min(left, default=None))

    def note_unnamed(self, message_id: str) -> bool:
        """Take note of a redelivered message that has no id of its own; say whether an equal one came before."""
        seen = message_id in self._unnamed
        self._unnamed.add(message_id)
        return seen

    def clear(self) -> None:
        """Forget everything: the channel was closed, or is gone."""
        self._by_tag.clear()
        self._done.clear()
        self._unnamed.clear()
