"""The function under `@deduplicate`, and how the key of a call is found in its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from celery_sharding.config import suggest
from celery_sharding.dedup.options import Options
from celery_sharding.errors import ConfigurationError, DeduplicationError
from celery_sharding.keys import plain_key


class Body:
    """The body of a task, which runs under a claim.

    Raises:
        ConfigurationError: The key in `options` names no argument of `function`, or one that collects many.
    """

    def __init__(self, function: Callable[..., Any], options: Options) -> None:
        self.function = function
        self.options = options
        self.name = getattr(function, "__qualname__", str(function))
        self._signature = inspect.signature(function)
        self._check_key(options.key)

    def record_key(self, task: Any, request: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Return the name of the claim record of a call: scope, then key.

        Raises:
            DeduplicationError: The key cannot be used; the task does not run. `task`.
            TypeError: The call does not fit the signature.
        """
        rule, name = self.options.key, task.name
        scope = (self.options.scope or name).replace("%", "%25").replace(":", "%3A")
        if rule is None:
            return f"{scope}:{request.id}"
        if isinstance(rule, str):
            value = self.argument(rule, args, kwargs)
        else:
            try:
                value = rule(self._bind(args, kwargs))
            except Exception as exc:
                raise DeduplicationError(
                    f"the dedup key of task {name} could not be computed: its callable raised {exc!r}; it is given a "
                    "mapping of argument names to values",
                    task=name,
                ) from exc
        try:
            return f"{scope}:{plain_key(value)}"
        except ValueError as exc:
            raise DeduplicationError(
                f"the dedup key of task {name} {exc}. Join several values to a string, as in "
                "key=lambda a: f\"{a['order_id']}/{a['event_id']}\"",
                task=name,
            ) from exc

    def argument(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the argument `name` of a call.

        The call is bound only where it leaves the argument to its default: that takes as long as the rest of a key.

        Raises:
            TypeError: The call does not fit the signature.
        """
        parameter = self._signature.parameters[name]
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            position = list(self._signature.parameters).index(name)
            if position < len(args):
                return args[position]
        if name in kwargs and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY:
            return kwargs[name]
        return self._bind(args, kwargs)[name]

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def _check_key(self, key: Any) -> None:
        if not isinstance(key, str):
            return
        where, parameters = f"@deduplicate on {self.name}: key={key!r}", self._signature.parameters
        if key not in parameters:
            raise ConfigurationError(
                f"{where} is no argument of it{suggest(key, parameters)}; it has {', '.join(parameters) or 'none'}"
            )
        if parameters[key].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise ConfigurationError(f"{where} collects many arguments; use a callable on them")
