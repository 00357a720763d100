"""The configuration: groups, routes and limits, read and checked once.

Owns its shape and every check that needs no broker. All it knows of Celery is that `app.conf` is a mapping. The same
facts may be given in code (`Sharding(app, groups=[…])`) or as settings (`sharding_groups`, `sharding_routes`); a group
must not be given in both.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from celery_sharding.errors import ConfigurationError, UnknownGroup
from celery_sharding.masking import mask_passwords
from celery_sharding.setting_names import check_names

SHARDS_MAX = 999
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")

_BUILTIN = "celery."

KeyRule = str | Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class ShardGroup:
    """A named set of shards that tasks are routed to.

    Args:
        name: `[a-z][a-z0-9_-]{0,39}`; part of every exchange and queue name of the group.
        shards: 1 to 999, at the first start of the group. Later the manifest on the broker says how many are live.
        queue_type: "quorum", or "classic" on a single node, which may lose order when a cluster's node is lost.
        ordering: "key": the keys of a shard run side by side, each serially. "shard": one task of a shard at a time.
        prefetch: How many messages a shard's owner holds at most, the same in all workers; None means 200.
        on_failure: "continue": the next message of the key runs after a failure. "dead-letter": the same, and the
            failed message is kept in the dead-letter queue.
        max_attempts: How many runs of a message may lose their process before it becomes a dead letter.

    Raises:
        ConfigurationError: A value is out of range; the message names it.
    """

    name: str
    shards: int
    queue_type: str = "quorum"
    ordering: str = "key"
    prefetch: int | None = None
    on_failure: str = "continue"
    max_attempts: int = 5

    def __post_init__(self) -> None:
        where = f"shard group {self.name!r}"
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ConfigurationError(
                f"{where}: a name is a small letter followed by at most 39 small letters, digits, '-' or '_'"
            )
        _check_number(where, "shards", self.shards, 1, SHARDS_MAX)
        _check_number(where, "max_attempts", self.max_attempts, 1, 1_000)
        if self.prefetch is not None:
            _check_number(where, "prefetch", self.prefetch, 1, 65_535)
        check_choice(where, "queue_type", self.queue_type, ("quorum", "classic"))
        check_choice(where, "ordering", self.ordering, ("key", "shard"))
        check_choice(where, "on_failure", self.on_failure, ("continue", "dead-letter"))


@dataclass(frozen=True, slots=True)
class Route:
    """The group and key of tasks by name or pattern; `key` is None if only `shard_key=` at the call gives one."""

    pattern: str
    group: str
    key: KeyRule | None

    def fits(self, task_name: str) -> bool:
        """Say whether the name matches the pattern.

        Celery's own tasks (`celery.chord_unlock` …) have no keys: only a pattern that begins with "celery." fits them.
        """
        if task_name == self.pattern:
            return True
        if "*" not in self.pattern or not fnmatch.fnmatchcase(task_name, self.pattern):
            return False
        return self.pattern.startswith(_BUILTIN) or not task_name.startswith(_BUILTIN)


@dataclass(frozen=True, slots=True)
class Settings:
    """The checked configuration of one app.

    `publish_timeout_seconds` bounds the wait for a confirm, `heartbeat_seconds` is the heartbeat of the shard
    connection, and `consumer_timeout_seconds` is the broker's own setting of that name: how long it waits for an
    acknowledgement. `management_url` is that of the broker's management API, if it is used; it may contain a password.
    `heartbeat_file` is the liveness file of a worker, a path with Celery's `%n` and so on; None for no file.
    """

    groups: Mapping[str, ShardGroup] = field(default_factory=dict)
    routes: tuple[Route, ...] = ()
    publish_timeout_seconds: float = 10.0
    heartbeat_seconds: float = 15.0
    consumer_timeout_seconds: float = 1_800.0
    management_url: str | None = field(default=None, repr=False)
    heartbeat_file: str | None = None

    def group(self, name: str, *, needed_by: str) -> ShardGroup:
        """Return the group called `name`.

        Raises:
            UnknownGroup: There is none; the message names the nearest.
        """
        try:
            return self.groups[name]
        except (KeyError, TypeError):
            raise UnknownGroup(
                f"{needed_by} names the shard group {name!r}, which is not configured{suggest(name, self.groups)}; "
                "add it to Sharding(app, groups=[…]) or to the setting sharding_groups",
                group=name,
            ) from None

    def route_for(self, task_name: str) -> Route | None:
        """Return the route of `task_name`: that of its exact name, else the first whose pattern fits."""
        exact = (route for route in self.routes if route.pattern == task_name)
        return next(exact, None) or next((route for route in self.routes if route.fits(task_name)), None)


def read_settings(conf: Mapping[str, Any], groups: Iterable[ShardGroup] = ()) -> Settings:
    """Read and check the sharding settings of `conf` beside the `groups` given in code.

    Raises:
        ConfigurationError: Anything is wrong; the message says which setting, and the nearest right name.
    """
    check_names(conf)
    found: dict[str, ShardGroup] = {}
    for group in groups:
        if not isinstance(group, ShardGroup):
            raise ConfigurationError(f"Sharding(groups=…) takes ShardGroup objects, not {_shown(group)}")
        if group.name in found:
            raise ConfigurationError(f"two shard groups are called {group.name!r}; give one of them another name")
        found[group.name] = group
    for name, options in _mapping(conf, "sharding_groups").items():
        if name in found:
            raise ConfigurationError(
                f"shard group {name!r} is given both in Sharding(app, groups=[…]) and in the setting sharding_groups; "
                "keep one"
            )
        found[name] = _read_group(name, options)
    routes = tuple(
        _read_route(pattern, options, found) for pattern, options in _mapping(conf, "sharding_routes").items()
    )
    defaults = Settings()
    limits = {
        name: _read_seconds(conf, f"sharding_{name}", getattr(defaults, name))
        for name in ("publish_timeout_seconds", "heartbeat_seconds", "consumer_timeout_seconds")
    }
    return Settings(
        found, routes, **limits, management_url=_read_management_url(conf), heartbeat_file=_read_heartbeat_file(conf)
    )


def suggest(name: object, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the known name nearest to `name`, else ""."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _read_group(name: str, options: Any) -> ShardGroup:
    where = f"sharding_groups[{name!r}]"
    if isinstance(options, ShardGroup):
        if options.name != name:
            raise ConfigurationError(f"{where} holds the group {options.name!r}; the two names must be one")
        return options
    known = {item.name for item in fields(ShardGroup)} - {"name"}
    _check_options(where, options, known, needed="shards")
    return ShardGroup(name, **options)


def _read_route(pattern: str, options: Any, groups: Mapping[str, ShardGroup]) -> Route:
    where = f"sharding_routes[{pattern!r}]"
    _check_options(where, options, {"group", "key"}, needed="group")
    key = options.get("key")
    if key is not None and not isinstance(key, str) and not callable(key):
        raise ConfigurationError(f"{where}: key is the name of an argument or a callable, not {_shown(key)}")
    Settings(groups=groups).group(options["group"], needed_by=where)
    return Route(pattern, options["group"], key)


def _check_options(where: str, options: Any, known: set[str], *, needed: str) -> None:
    if not isinstance(options, Mapping):
        raise ConfigurationError(f"{where} is a mapping such as {{{needed!r}: …}}, not {_shown(options)}")
    for name in options:
        if name not in known:
            raise ConfigurationError(f"{where} has no option {name!r}{suggest(name, known)}")
    if needed not in options:
        raise ConfigurationError(f"{where} lacks {needed!r}")


def _mapping(conf: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = conf.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{name} is a mapping, not {_shown(value)}")
    return value


def _read_seconds(conf: Mapping[str, Any], name: str, default: float) -> float:
    value = conf.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigurationError(f"{name} is a number of seconds above 0, not {_shown(value)}")
    return float(value)


def _read_management_url(conf: Mapping[str, Any]) -> str | None:
    url = conf.get("sharding_management_url")
    if url is None:
        return None
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (ValueError, TypeError, AttributeError):
        fits = False
    if not fits or parts.query or parts.fragment:
        # Not shown: it may contain a password.
        raise ConfigurationError(
            "sharding_management_url is a URL such as 'http://host:15672' or 'https://user:password@host'; "
            "percent-encode special characters in its user and password, '/' as %2F"
        )
    return str(url)


def _read_heartbeat_file(conf: Mapping[str, Any]) -> str | None:
    path = conf.get("sharding_heartbeat_file")
    if path is not None and not (isinstance(path, str | os.PathLike) and str(path)):
        raise ConfigurationError(f"sharding_heartbeat_file is the path of a file, not {_shown(path)}")
    return None if path is None else str(path)


def _check_number(where: str, name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigurationError(f"{where}: {name} is a whole number from {least} to {most}, not {_shown(value)}")


def check_choice(where: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise `ConfigurationError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigurationError(
            f"{where}: {name} is one of {', '.join(map(repr, choices))}, not {_shown(value)}{suggest(value, choices)}"
        )


def _shown(value: object) -> str:
    """Return a value for the text of an error: a URL with a password may be in the wrong setting."""
    return mask_passwords(repr(value))
