"""Which groups and shards a worker consumes: `-Q` and `-X`, and the worker's banner.

Celery gives the names of `-Q` and `-X` to `app.amqp.queues`. Names of groups (`orders`) and shards (`orders.003`,
`orders/3`) are taken out and kept here; all other names keep Celery's meaning. Shards never become Celery queues.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from celery.app.amqp import Queues
from kombu.utils.functional import maybe_list

from celery_sharding.config import Settings
from celery_sharding.errors import ConfigurationError
from celery_sharding.shard_names import Indexes, check_shard, describe_near_miss, parse_shard, without_shards

Selection = dict[str, Indexes]


class ShardedQueues(Queues):
    """Celery's queues, which also know the groups that this process consumes.

    Attributes:
        warnings: What may be a mistake in `-Q` and `-X`. A worker reads them before it has a log, so others log it.
    """

    settings: Settings = Settings()
    warnings: list[str]
    _selected: Selection | None = None
    _deselected: Selection

    def attach(self, settings: Settings) -> None:
        """Learn the groups.

        Raises:
            ConfigurationError: An ordinary queue has the name of a group.
        """
        self.settings = settings
        self._deselected = {}
        self.warnings = []
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
        warnings = self._find_warnings("-Q", queues)
        if queues:
            try:
                super().select(queues)
            except KeyError as exc:
                # Celery shows it in an error of its own.
                raise KeyError("; ".join([str(exc), *warnings])) from exc
        else:
            super().select(list(self)[:1])
            super().deselect(list(self.consume_from))

    def deselect(self, exclude: Any) -> None:
        """Consume all but what is named."""
        shards, queues = self._split(maybe_list(exclude) or [])
        self._deselected |= shards
        self._find_warnings("-X", queues)
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

    def _find_warnings(self, option: str, queues: Iterable[str]) -> list[str]:
        """Keep, and return, a warning for each name that is nearly that of a group."""
        near = [describe_near_miss(name, self.settings) for name in queues if name not in self]
        warnings = [f"{option} {each}" for each in near if each]
        self.warnings += warnings
        return warnings

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
