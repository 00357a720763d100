"""The names of our settings, and what is wrong with names that nearly are.

Under a namespace Celery reads a setting from `CELERY_SHARDING_GROUPS` or from `sharding_groups`, and without one from
the latter only. What is written in capitals elsewhere may belong to somebody else.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from celery_sharding.errors import ConfigurationError

# Every setting; an unknown name that begins like these is an error.
SETTINGS = (
    "sharding_groups",
    "sharding_routes",
    "sharding_publish_timeout_seconds",
    "sharding_heartbeat_seconds",
    "sharding_consumer_timeout_seconds",
    "sharding_management_url",
    "sharding_heartbeat_file",
)
_PREFIX = "sharding_"
# Ordinary words that resemble ours.
_SHARING = ("share", "sharing")
# How similar to a setting of ours a name that begins differently must be, to count as a misspelling of it.
_MISSPELT = 0.85


def check_names(conf: Mapping[str, Any]) -> tuple[str, ...]:
    """Return warnings about names that look like settings of ours, but stand outside the app's namespace.

    Raises:
        ConfigurationError: A setting of ours is misspelt, or written so that it is never read.
    """
    conf.get(SETTINGS[0])  # until it is first read, Celery's knows neither its names nor its prefix
    prefix = getattr(conf, "prefix", None) or ""
    doubts = []
    for name in _given_names(conf):
        stem = name.lower().removeprefix(prefix.lower()).removeprefix("celery_")
        is_ours = name == name.lower() or stem != name.lower()
        near = _nearest(stem, cutoff=0.6 if is_ours and stem.startswith(_PREFIX) else _MISSPELT)
        if near is None and not (is_ours and stem.startswith(_PREFIX)):
            continue
        right = near if near is None or not prefix else _like(prefix + near, prefix)
        if near is not None and name in (near, right):
            continue
        if not is_ours and (near in conf or right in conf):
            continue  # somebody else's, beside ours
        hint = f"; those of sharding are {', '.join(SETTINGS)}" if right is None else f" (did you mean {right!r}?)"
        where = f"; the settings of this app begin with {prefix}" if prefix and not is_ours else ""
        text = f"the setting {name!r} is unknown and has no effect{hint}{where}"
        if is_ours and stem.startswith("sh") and not stem.startswith(_SHARING):
            raise ConfigurationError(text)
        doubts.append(text)
    return tuple(doubts)


def _given_names(conf: Any) -> list[str]:
    """Return the names that may be settings: not Celery's defaults, nor what else is in a module of settings."""
    *given, defaults = [*conf.maps] if hasattr(conf, "maps") else [conf, {}]
    names = sorted({name for each in given for name in each if isinstance(name, str) and name not in defaults})

    def is_value(name: str) -> bool:
        value = next(each[name] for each in given if name in each)
        return not callable(value) and not isinstance(value, ModuleType)

    return [name for name in names if _may_be_ours(name) and is_value(name)]


def _may_be_ours(name: str) -> bool:
    return "shard" in name.lower() or _nearest(name.lower(), cutoff=_MISSPELT) is not None


def _nearest(stem: str, *, cutoff: float) -> str | None:
    """Return the setting that is called so, or nearly so."""
    return next(iter(difflib.get_close_matches(stem, SETTINGS, n=1, cutoff=cutoff)), None)


def _like(text: str, other: str) -> str:
    """Return `text` in the case of `other`, as Celery does with its namespace."""
    return text.upper() if other.isupper() else text.lower()
