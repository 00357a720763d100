"""The options of `@deduplicate`, checked when the task is defined, and the key of a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from celery_sharding.config import KeyRule, suggest
from celery_sharding.errors import ConfigurationError, DeduplicationError

KEY_BYTES_MAX = 255


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
        _check_choice("on_running", self.on_running, ("wait", "retry", "skip"))
        _check_choice("on_store_error", self.on_store_error, ("wait", "fail"))
        if not isinstance(self.remember_failures, bool):
            raise ConfigurationError(f"@deduplicate: remember_failures is a bool, not {self.remember_failures!r}")
        if self.scope is not None and (not isinstance(self.scope, str) or not self.scope):
            raise ConfigurationError(f"@deduplicate: scope is a name that tasks share, not {self.scope!r}")
        if self.key is not None and not isinstance(self.key, str) and not callable(self.key):
            raise ConfigurationError(
                f"@deduplicate: key is the name of an argument or a callable on the arguments, not {self.key!r}"
            )


def check_key(options: Options, function: Callable[..., Any], signature: inspect.Signature) -> None:
    """Check that `options.key` fits `function`.

    Raises:
        ConfigurationError: It names no argument, or the callable does not take the mapping of arguments.
    """
    parameters = signature.parameters
    where = f"@deduplicate on {getattr(function, '__qualname__', function)}"
    if isinstance(options.key, str):
        if options.key not in parameters:
            raise ConfigurationError(
                f"{where}: key={options.key!r} is no argument of it{suggest(options.key, parameters)}; it has "
                f"{', '.join(parameters) or 'none'}"
            )
        if parameters[options.key].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise ConfigurationError(f"{where}: key={options.key!r} collects many arguments; use a callable on them")


def bound_arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, defaults included.

    Raises:
        TypeError: The call does not fit the signature.
    """
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def argument(name: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the argument `name` of a call.

    The call is bound only where it leaves the argument to its default: that takes as long as the rest of a key.

    Raises:
        TypeError: The call does not fit the signature.
    """
    parameter = signature.parameters[name]
    if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
        position = list(signature.parameters).index(name)
        if position < len(args):
            return args[position]
    if name in kwargs and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY:
        return kwargs[name]
    return bound_arguments(signature, args, kwargs)[name]


def record_key(
    options: Options,
    *,
    task_name: str,
    task_id: str,
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> str:
    """Return the name of the claim record of a call: scope, then key.

    Raises:
        DeduplicationError: The key cannot be used; the task does not run. `task`.
        TypeError: The call does not fit the signature.
    """
    scope = (options.scope or task_name).replace("%", "%25").replace(":", "%3A")
    if options.key is None:
        return f"{scope}:{task_id}"
    if isinstance(options.key, str):
        value = argument(options.key, signature, args, kwargs)
    else:
        try:
            value = options.key(bound_arguments(signature, args, kwargs))
        except Exception as exc:
            raise DeduplicationError(
                f"the dedup key of task {task_name} could not be told: its callable raised {exc!r}; it is given a "
                "mapping of argument names to values",
                task=task_name,
            ) from exc
    if isinstance(value, bool) or not isinstance(value, str | int | UUID) or value == "":
        raise DeduplicationError(
            f"the dedup key of task {task_name} is {value!r}; a key is a str, an int or a UUID, and not empty. Join "
            "several values to a string, as in key=lambda a: f\"{a['order_id']}/{a['event_id']}\"",
            task=task_name,
        )
    key = str(value)
    try:
        size_bytes = len(key.encode())
    except UnicodeEncodeError as exc:
        raise DeduplicationError(f"the dedup key of task {task_name} is not valid text: {exc}", task=task_name) from exc
    if size_bytes > KEY_BYTES_MAX:
        raise DeduplicationError(
            f"the dedup key of task {task_name} is longer than {KEY_BYTES_MAX} bytes; use a hash of it", task=task_name
        )
    return f"{scope}:{key}"


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(
            f"@deduplicate: {name} is one of {', '.join(map(repr, choices))}, not {value!r}{suggest(value, choices)}"
        )
