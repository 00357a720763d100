"""Which groups and shards a worker consumes: `-Q` and `-X`, and the worker's banner.

Celery gives the names of `-Q` and `-X` to `app.amqp.queues`. Names of groups (`orders`) and shards (`orders.003`,
`orders/3`) are taken out here and remembered; all other names keep Celery's meaning. Shards never become Celery queues.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from celery.app.amqp import Queues
from kombu.utils.functional import maybe_list

from celery_sharding.config import Indexes, Settings, check_shard, parse_shard, suggest, without_shards
from celery_sharding.errors import ConfigurationError

logger = logging.getLogger(__name__)

Selection = dict[str, Indexes]


class ShardedQueues(Queues):
    """Celery's queues, which also know the groups that this process consumes."""

    settings: Settings = Settings()
    _selected: Selection | None = None
    _deselected: Selection

    def attach(self, settings: Settings) -> None:
        """Learn the groups.

        Raises:
            ConfigurationError: An ordinary queue has the name of a group.
        """
        self.settings = settings
        self._deselected = {}
        for name in settings.groups:
            if name in self:
                raise ConfigurationError(
                    f"task_queues has a queue called {name!r}, which is a shard group; rename one of them"
                )

    def __missing__(self, name: str) -> Any:
        """Make an ordinary queue, unless it would have the name of a group: nobody would consume it."""
        self._refuse_group(name)
        return super().__missing__(name)

    def __setitem__(self, name: str, queue: Any) -> None:
        """Take an ordinary queue, unless it has the name of a group or shard."""
        self._refuse_group(name)
        super().__setitem__(name, queue)

    def select(self, include: Any) -> None:
        """Consume only what is named: queues, groups and shards."""
        names = maybe_list(include) or []
        if not names:
            return
        shards, queues = self._split(names)
        self._selected = shards
        for name in queues:
            near = suggest(name, self.settings.groups)
            if near and name not in self:
                logger.warning("-Q %s names no shard group and is taken for an ordinary queue%s", name, near)
        if queues:
            super().select(queues)
        else:
            super().select(list(self)[:1])
            super().deselect(list(self.consume_from))

    def deselect(self, exclude: Any) -> None:
        """Consume all but what is named."""
        shards, queues = self._split(maybe_list(exclude) or [])
        self._deselected |= shards
        super().deselect(queues)

    def selection(self) -> Selection:
        """Return group name → indexes to consume, None for all of them."""
        selected = dict.fromkeys(self.settings.groups) if self._selected is None else dict(self._selected)
        for name, without in self._deselected.items():
            if name not in selected:
                continue
            shards = self.settings.groups[name].shards
            for index in [None] if without is None else without:
                selected[name] = without_shards(selected[name], index, shards)
        return {name: indexes for name, indexes in selected.items() if indexes is None or indexes}

    def format(self, indent: int = 0, indent_first: bool = True) -> str:
        """Return the banner's lines: Celery's queues, then the groups."""
        lines = [str(super().format(indent=indent, indent_first=indent_first)).rstrip()] if self.consume_from else []
        for name, indexes in self.selection().items():
            group = self.settings.groups[name]
            which = f"all {group.shards}" if indexes is None else ", ".join(map(str, sorted(indexes)))
            line = f".> {name:<16} shards={which} ordering={group.ordering} queue_type={group.queue_type}"
            lines.append(" " * (indent if lines or indent_first else 0) + line)
        return "\n".join(lines)

    def _refuse_group(self, name: str) -> None:
        found = parse_shard(name, self.settings) if isinstance(name, str) else None
        if found is not None:
            raise ConfigurationError(
                f"{name!r} is the shard group {found[0].name!r}, not a queue; a task is sent there by its "
                "shard_group=…, or by sharding_routes"
            )

    def _split(self, names: Iterable[str]) -> tuple[Selection, list[str]]:
        shards: Selection = {}
        queues = []
        for name in names:
            found = parse_shard(name, self.settings)
            if found is None:
                queues.append(name)
                continue
            group, index = found
            if index is None:
                shards[group.name] = None
                continue
            check_shard(group.name, index, group.shards)
            known = shards.get(group.name, frozenset())
            if known is not None:
                shards[group.name] = known | {index}
        return shards, queues
