"""Which tasks are sharded, and how a call becomes an exchange and a key.

Celery asks its router once for every message that leaves: from `apply_async`, signatures, chains, groups, chords,
links, beat and `send_task`. `ShardRouter` answers for sharded tasks, before `task_routes`, so no catch-all there can
lead one away. Celery's own rules route every other task. A sharded task leaves for its group, or the call raises.

Eager mode (`task_always_eager`) publishes nothing; `celery_hooks.eager` asks the router for the same refusals.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from celery.app.routes import Router
from celery.app.task import Task as CeleryTask
from celery.local import maybe_evaluate

from celery_sharding.config import KeyRule, ShardGroup, suggest
from celery_sharding.errors import ConfigurationError, ShardKeyError, UnsupportedOption
from celery_sharding.keys import KeyReader, key_text
from celery_sharding.publish.message import Application
from celery_sharding.topology import Names
from celery_sharding.wire import GROUP_HEADER, KEY_HEADER, without_handed_on, without_marks


@dataclass(frozen=True, slots=True)
class TaskRule:
    """How one task is sharded."""

    group: ShardGroup
    exchange: str
    reader: KeyReader


class TaskRules:
    """The rule of every task, found once for each task."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self._known: dict[str, tuple[Any, TaskRule | None]] = {}

    def rule_for(self, name: str, task: Any | None) -> TaskRule | None:
        """Return the rule of the task called `name`, None if it is not sharded.

        Args:
            task: The registered task; None in a process that does not have it.

        Raises:
            ConfigurationError: Its options contradict each other or name an unknown group.
        """
        known = self._known.get(name)
        if known is not None and known[0] is task:
            return known[1]
        rule = self._find(name, task)
        self._known[name] = (task, rule)
        return rule

    def groups_of(self, tasks: Mapping[str, Any]) -> dict[str, str]:
        """Return task name → group name, of those that are sharded.

        Raises:
            ConfigurationError: As for `rule_for`.
        """
        rules = {name: self.rule_for(name, task) for name, task in tasks.items()}
        return {name: rule.group.name for name, rule in rules.items() if rule is not None}

    def _find(self, name: str, task: Any | None) -> TaskRule | None:
        task = maybe_evaluate(task)  # a task that was not made yet is a proxy
        settings = self._application.settings
        _refuse_misspelt(name, task)
        route = settings.route_for(name)
        group_name = getattr(task, "shard_group", None) or (route.group if route else None)
        key = task_key_rule(task)
        if key is not None and not isinstance(key, str) and not callable(key):
            raise ConfigurationError(
                f"task {name!r}: shard_key is the name of an argument or a callable on the arguments, not {key!r}"
            )
        if group_name is None:
            if key is not None:
                raise ConfigurationError(
                    f"task {name!r} has a shard_key but no shard_group; set shard_group=… beside it"
                )
            return None
        group = settings.group(group_name, needed_by=f"task {name!r}")
        if task is not None and explicit_option(task, "acks_late") is False:
            raise ConfigurationError(
                f"task {name!r} sets acks_late=False, but a sharded task is acknowledged when it is done, so that it "
                "survives its worker; remove acks_late=False"
            )
        if key is None and route is not None:
            key = route.key
        signature = None if task is None else inspect.signature(task.run)
        return TaskRule(group, Names(group.name).publish, KeyReader(name, key, signature))


class ShardRouter(Router):
    """Celery's router, asked for sharded tasks first."""

    def __init__(self, rules: TaskRules, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rules = rules

    def route(
        self, options: dict[str, Any], name: str, args: Any = (), kwargs: Any = None, task_type: Any = None
    ) -> dict[str, Any]:
        """Return the publish options of one call."""
        rule = self._rules.rule_for(name, task_type)
        for option in options:
            if option.startswith("shard") and option not in _CALL_OPTIONS:
                _refuse_call_option(option, options, name, is_sharded=rule is not None)
        stamps = frozenset(options.get("stamped_headers") or ())
        if rule is not None:
            _refuse_stamps(stamps, name)
        # Celery hands stamps on as options; an ordinary task's stamp may have any name.
        given_key = options.pop("shard_key") if "shard_key" in options and "shard_key" not in stamps else _ABSENT
        if rule is None:
            if given_key is not _ABSENT:
                raise ShardKeyError(
                    f"task {name!r} is called with shard_key=… but is not sharded; set shard_group on the task or "
                    "name it in sharding_routes",
                    task=name,
                )
            return self._route_ordinary(options, name, args, kwargs, task_type)
        if _is_ordinary_retry.get():
            return self._route_ordinary(options, name, args, kwargs, task_type)
        headers = options.get("headers") or {}
        is_resent = _is_resent(options, rule)
        if not is_resent:
            _refuse_place(options, name, rule)
            self._refuse_priority(options, name, task_type)
        if given_key is not _ABSENT:
            key = key_text(given_key, task=name)
        elif is_resent and headers.get(GROUP_HEADER) == rule.group.name and KEY_HEADER in headers:
            key = key_text(headers[KEY_HEADER], task=name)
        else:
            key = rule.reader.read(args or (), kwargs or {})
        routed = {option: value for option, value in options.items() if option not in _REPLACED}
        routed["exchange"] = rule.exchange
        routed["exchange_type"] = "fanout"
        routed["routing_key"] = key
        routed["headers"] = {**without_marks(headers), GROUP_HEADER: rule.group.name, KEY_HEADER: key}
        return routed

    def _route_ordinary(self, options: dict[str, Any], *call: Any) -> dict[str, Any]:
        stock: dict[str, Any] = super().route(_without_marks(options), *call)
        return stock

    def _refuse_priority(self, options: dict[str, Any], name: str, task: Any | None) -> None:
        """Refuse a priority that the application asks for; the hook drops one of Celery's defaults."""
        priority = options.get("priority")
        if priority is None or self._is_inherited(priority):
            return
        if task is not None and priority == task.priority and explicit_option(task, "priority") is None:
            return  # task_default_priority
        raise UnsupportedOption(
            f"task {name!r} is sharded and called with priority={priority!r}, which would let it overtake its key; "
            "remove priority",
            task=name,
            option="priority",
        )

    def _is_inherited(self, priority: Any) -> bool:
        """Say whether Celery hands the running task's priority on, to links and to the rest of its chain."""
        if not self.app.conf.task_inherit_parent_priority:
            return False
        parent = self.app.current_worker_task
        return parent is not None and priority == (parent.request.delivery_info or {}).get("priority")


_ABSENT = object()
_TASK_OPTIONS = ("shard_group", "shard_key")
_CALL_OPTIONS = ("shard_key",)
_CELERYS = frozenset(dir(CeleryTask))
# How similar to one of our options a name must be to count as misspelt.
_MISSPELT = 0.8
_is_ordinary_retry: ContextVar[bool] = ContextVar("is_ordinary_retry", default=False)
_REPLACED = frozenset({"queue", "exchange", "exchange_type", "routing_key", "declare", "redelivered"})
_PLACES = _REPLACED | {"shard_key", "priority", "headers"}


def _refuse_misspelt(name: str, task: Any | None) -> None:
    """Refuse a task option that looks like one of ours: Celery takes any name, and the task would not be sharded.

    An attribute of the application's own class, or one that the decorator overrides, may be meant: there only a near
    miss is refused, and never a method.
    """
    for cls in type(task).__mro__ if task is not None else ():
        if cls.__module__ == "celery.app.task":
            return
        is_decorated = "_decorated" in vars(cls)  # made by Celery of the options of the decorator
        for option, value in vars(cls).items():
            if option in _TASK_OPTIONS or option in _CELERYS:
                continue
            near = _nearest(option.lower())
            if near and not is_decorated and (callable(value) or hasattr(value, "__get__")):
                continue
            is_own = any(option in vars(base) for base in cls.__mro__[1:])
            if near or (is_decorated and not is_own and option.lower().startswith("shard")):
                raise ConfigurationError(
                    f"task {name!r} has the option {option!r}, which is unknown and has no effect"
                    f"{suggest(option.lower(), _TASK_OPTIONS)}; a task takes shard_group and shard_key"
                )


def _nearest(option: str) -> str | None:
    """Return which of our options this is a misspelling of, None if it is a word of its own.

    `card_group`, `smart_group` and `share_key` are as similar as a typing error, which rarely hits the beginning.
    """
    if not option.startswith("sh") or option.startswith("share"):
        return None
    return next(iter(difflib.get_close_matches(option, _TASK_OPTIONS, n=1, cutoff=_MISSPELT)), None)


def _refuse_call_option(option: str, options: dict[str, Any], name: str, *, is_sharded: bool) -> None:
    """Refuse a call's option that looks like one of ours: Celery would take it for a property of the message.

    On an ordinary task only a near miss is refused: `shard="eu"` may be meant for a router of the application.
    """
    if option in (options.get("stamped_headers") or ()) or not (is_sharded or _nearest(option)):
        return
    raise UnsupportedOption(
        f"task {name!r} is called with {option}=…, which is unknown and has no effect"
        f"{suggest(option, _CALL_OPTIONS)}; a call takes shard_key=…, and the group is an option of the task",
        task=name,
        option=option,
    )


def _without_marks(options: dict[str, Any]) -> dict[str, Any]:
    """Return an ordinary task's options without the headers that were handed on from a sharded message."""
    headers = options.get("headers")
    return {**options, "headers": without_handed_on(headers)} if headers else options


def _is_resent(options: dict[str, Any], rule: TaskRule) -> bool:
    """Say whether a message of the group is sent again: only then the options name the group's exchange."""
    exchange = options.get("exchange")
    return exchange is not None and getattr(exchange, "name", exchange) == rule.exchange


def _refuse_place(options: dict[str, Any], name: str, rule: TaskRule) -> None:
    """Refuse a queue, exchange or routing key that the caller gives."""
    for option in ("queue", "exchange", "routing_key"):
        if options.get(option) is not None:
            raise UnsupportedOption(
                f"task {name!r} belongs to the shard group {rule.group.name!r}, so {option}={options[option]!r} would "
                f"take it out of its order; remove {option}, or take the task out of the group",
                task=name,
                option=option,
            )


def refuse_retry(task: str, option: str) -> UnsupportedOption:
    return UnsupportedOption(
        f"task {task!r}: retry({option}=…) would publish the task anew, but a sharded task is retried in its place; "
        f"remove {option}, or publish another task",
        task=task,
        option=option,
    )


def _refuse_stamps(stamps: frozenset[str], name: str) -> None:
    """Refuse stamps with the names of options that say where a message goes: a stamp replaces the option."""
    for stamp in sorted(stamps & _PLACES):
        raise UnsupportedOption(
            f"task {name!r} is sharded and has a stamp named {stamp!r}, which takes the place of the option of that "
            "name; name the stamp otherwise",
            task=name,
            option=stamp,
        )


@contextmanager
def ordinary_retry() -> Iterator[None]:
    """Let a retry go back to the ordinary queue that its run came from, although its task is sharded by now.

    While a task moves to a group, its old queue is still drained; refusing the retry would lose the message.
    """
    token = _is_ordinary_retry.set(True)
    try:
        yield
    finally:
        _is_ordinary_retry.reset(token)


def is_ordinary_retry() -> bool:
    """Say whether the message that leaves now is an `ordinary_retry`."""
    return _is_ordinary_retry.get()


def task_key_rule(task: Any | None) -> KeyRule | None:
    """Return a task's `shard_key`, read from its class: an instance would bind a plain function."""
    if task is None:
        return None
    rule = inspect.getattr_static(task, "shard_key", None)
    return rule.__func__ if isinstance(rule, staticmethod) else rule


def explicit_option(task: Any, name: str) -> Any:
    """Return the value that the application itself gave to a task's option, None if it gave none.

    `Task.bind` writes Celery's defaults onto the task's class, after the decorator's options. So the application gave
    what stands before `__bound__` in the class. Read in Celery 5.7.0; a test fails if a version changes it.
    """
    for cls in type(task).__mro__:
        if cls.__module__ == "celery.app.task":
            return None
        names = list(vars(cls))
        if name in names and ("__bound__" not in names or names.index(name) < names.index("__bound__")):
            return vars(cls)[name]
    return None
