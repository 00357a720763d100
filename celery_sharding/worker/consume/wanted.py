"""What a worker is to consume: the queues of the open segments that were selected for it and are not paused."""

from __future__ import annotations

from collections.abc import Iterator

from celery_sharding.layout.model import Layout, Segment
from celery_sharding.shard_names import Indexes
from celery_sharding.topology import Names


def find_wanted(names: Names, layout: Layout, selection: Indexes) -> dict[str, tuple[str, int]]:
    """Return queue → (segment, index) of what a worker consumes.

    Args:
        selection: Indexes chosen for this worker; None for all, none for nothing at all.
    """
    return {
        queue: (segment.name, index)
        for segment, index, queue in _selected(names, layout, selection)
        if not layout.pauses(segment, index)
    }


def count_wanted(names: Names, layout: Layout, selection: Indexes) -> int:
    """Return how many queues a worker will consume at most, if the layout stays: those of the live generation, too."""
    wanted = len(find_wanted(names, layout, selection))
    if any(segment.name == f"g{layout.generation:03d}" for segment in layout.open_segments):
        return wanted
    return wanted + (layout.shards if selection is None else len(selection))


def find_paused(names: Names, layout: Layout, selection: Indexes) -> dict[str, tuple[str, int]]:
    """Return queue → (segment, index) of what a worker would consume if it were not paused."""
    return {
        queue: (segment.name, index)
        for segment, index, queue in _selected(names, layout, selection)
        if layout.pauses(segment, index) and queue not in segment.drained
    }


def find_blocked(names: Names, layout: Layout) -> list[str]:
    """Return the paused queues whose end a later segment waits for; nobody sees it until they are resumed."""
    return [
        queue
        for segment in layout.open_segments
        if segment is not layout.segments[-1]  # which never ends
        for index, queue in enumerate(segment.queues(names))
        if layout.pauses(segment, index) and queue not in segment.drained | segment.reached
    ]


def _selected(names: Names, layout: Layout, selection: Indexes) -> Iterator[tuple[Segment, int, str]]:
    """Iterate over the queues of the open segments that were selected.

    The selection is made in terms of the live generation. An older one may have more shards; its surplus goes to the
    workers of index modulo the live number. Limbos are selected with any shard.
    """
    if selection is not None and not selection:
        return
    for segment in layout.open_segments:
        for index, queue in enumerate(segment.queues(names)):
            if selection is None or segment.kind == "limbo" or index % max(1, layout.shards) in selection:
                yield segment, index, queue
