"""The options of `@deduplicate`, checked when the task is defined."""

from __future__ import annotations

from dataclasses import dataclass

from celery_sharding.config import KeyRule, check_choice
from celery_sharding.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Options:
    """What `@deduplicate` was given.

    Raises:
        ConfigurationError: A value is out of range; the message names it.
    """

    key: KeyRule | None
    ttl_seconds: float
    lease_seconds: float
    on_running: str
    on_store_error: str
    remember_failures: bool
    scope: str | None

    def __post_init__(self) -> None:
        for name in ("ttl_seconds", "lease_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ConfigurationError(f"@deduplicate: {name} is a number of seconds above 0, not {value!r}")
        if self.ttl_seconds < self.lease_seconds:
            raise ConfigurationError(
                f"@deduplicate: ttl_seconds={self.ttl_seconds} is shorter than lease_seconds={self.lease_seconds}; "
                "a result must be kept at least as long as a claim without news"
            )
        check_choice("@deduplicate", "on_running", self.on_running, ("wait", "retry", "skip"))
        check_choice("@deduplicate", "on_store_error", self.on_store_error, ("wait", "fail"))
        if not isinstance(self.remember_failures, bool):
            raise ConfigurationError(f"@deduplicate: remember_failures is a bool, not {self.remember_failures!r}")
        if self.scope is not None and (not isinstance(self.scope, str) or not self.scope):
            raise ConfigurationError(f"@deduplicate: scope is a name that tasks share, not {self.scope!r}")
        if self.key is not None and not isinstance(self.key, str) and not callable(self.key):
            raise ConfigurationError(
                f"@deduplicate: key is the name of an argument or a callable on the arguments, not {self.key!r}"
            )
