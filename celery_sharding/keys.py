"""The key of a call: found in its arguments, checked, and made text.

A key decides the shard and the lane, so it must be the same text in every process and every language: `str(value)` of a
str, an int or a UUID, and nothing else. Floats, booleans, None and containers have several spellings, so they are
refused at the call, before anything is published.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any
from uuid import UUID

from celery_sharding.config import KeyRule, suggest
from celery_sharding.errors import ShardKeyError
from celery_sharding.texts import plain_text
from celery_sharding.wire import KEY_HEADER

KEY_BYTES_MAX = 255


def plain_key(value: object) -> str:
    """Return `value` as the text of a key.

    Raises:
        ValueError: It is no str, int or UUID, is empty, or is longer than 255 bytes of UTF-8. The text goes on where
            the name of the key ends: "is empty".
    """
    if isinstance(value, bool) or not isinstance(value, str | int | UUID):
        found = "None" if value is None else f"{reprlib.repr(value)} ({type(value).__name__})"
        raise ValueError(f"is {found}; it must be a str, an int or a UUID, and not a bool. Convert it at the call")
    # An enum's str() may be "Color.RED" where the serialized argument is "red"; what travels is the plain value.
    if isinstance(value, str):
        text = str.__str__(value)
    elif isinstance(value, UUID):
        text = str(value)
    else:
        try:
            text = int.__repr__(value)
        except ValueError as exc:
            raise ValueError(f"is too large a number: {exc}") from exc
    if not text:
        raise ValueError("is empty")
    try:
        size_bytes = len(text.encode())
    except UnicodeEncodeError as exc:
        raise ValueError(f"{text!r} is not valid text: {exc}") from exc
    if size_bytes > KEY_BYTES_MAX:
        raise ValueError(
            f"{text[:40]!r}… has {size_bytes} bytes of UTF-8; at most {KEY_BYTES_MAX} are allowed: use a shorter id or "
            "a hash of it"
        )
    return text


def key_text(value: object, *, task: str) -> str:
    """Return `value` as a shard key.

    Raises:
        ShardKeyError: As `plain_key` says.
    """
    try:
        return plain_key(value)
    except ValueError as exc:
        raise ShardKeyError(f"task {task!r}: the shard key {exc}", task=task) from exc


def key_of_message(message: Any, *, exchange: str) -> tuple[str, str | None]:
    """Return the key of a message on a group's queue, and what is wrong with it; None: a task could be published so.

    What came through the group's `exchange` is in its shard by its routing key, whatever its headers say. A message
    that was put into the queue by hand may name its key in a header.
    """
    info = message.delivery_info or {}
    key: Any = info.get("routing_key") or ""
    if info.get("exchange") != exchange:
        named = (message.headers or {}).get(KEY_HEADER)
        try:
            return (plain_key(named) if named else plain_text(key)), None
        except ValueError as exc:
            return plain_text(key), f"its header {KEY_HEADER} is no key: it {exc}"
    text = plain_text(key)
    return text, None if text == key else "its routing key is not valid UTF-8"


def key_digest(key: str) -> str:
    """Return a digest of a key for the logs, which contain no keys."""
    return sha256(key.encode()).hexdigest()[:16]


class KeyReader:
    """Reads the key of a task's calls by its rule.

    `signature` is None in a process that does not have the task; then only keyword arguments have names.
    """

    def __init__(self, task: str, rule: KeyRule | None, signature: inspect.Signature | None) -> None:
        self._task = task
        self._rule = rule
        self._signature = signature
        self._position, self._default = self._place()

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Return the key of the call.

        Raises:
            ShardKeyError: The call has no key, or an unusable one.
        """
        rule = self._rule
        if rule is None:
            raise ShardKeyError(
                f"task {self._task!r} is sharded but has no shard key; set shard_key on the task, key in "
                "sharding_routes, or give shard_key=… at the call",
                task=self._task,
            )
        if not isinstance(rule, str):
            return key_text(self._call(rule, args, kwargs), task=self._task)
        if rule in kwargs:
            return key_text(kwargs[rule], task=self._task)
        if self._position is not None and self._position < len(args):
            return key_text(args[self._position], task=self._task)
        if self._default is not inspect.Parameter.empty:
            return key_text(self._default, task=self._task)
        hint = (
            "the task is not registered here, so only keyword arguments have names: pass it by keyword, or give "
            "shard_key=…"
            if self._signature is None
            else f"call it with {rule}=…, or give shard_key=…"
        )
        raise ShardKeyError(f"task {self._task!r}: the call has no argument {rule!r}; {hint}", task=self._task)

    def _place(self) -> tuple[int | None, Any]:
        """Return the position and default of the named argument; refuse a name that the task does not take."""
        if self._signature is None or not isinstance(self._rule, str):
            return None, inspect.Parameter.empty
        for position, parameter in enumerate(self._signature.parameters.values()):
            if parameter.name == self._rule and parameter.kind in _NAMED:
                by_position = parameter.kind is not inspect.Parameter.KEYWORD_ONLY
                return (position if by_position else None), parameter.default
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                return None, inspect.Parameter.empty
        raise ShardKeyError(
            f"task {self._task!r} has no argument {self._rule!r} to take the shard key from"
            f"{suggest(self._rule, self._signature.parameters)}",
            task=self._task,
        )

    def _call(self, rule: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        bound = bind_arguments(self._task, self._signature, args, kwargs)
        try:
            return rule(bound)
        except Exception as exc:
            raise ShardKeyError(
                f"task {self._task!r}: its shard_key callable raised {exc!r} on the arguments {sorted(bound)}",
                task=self._task,
            ) from exc


_NAMED = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
)


def bind_arguments(
    task: str, signature: inspect.Signature | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return argument name → value of a call, with defaults, and with each of `**kwargs` under its own name, too.

    Raises:
        ShardKeyError: The call does not fit the signature, or positional arguments have no names here.
    """
    if signature is None:
        if args:
            raise ShardKeyError(
                f"task {task!r} is not registered here, so its positional arguments have no names; pass them by "
                "keyword, or give shard_key=…",
                task=task,
            )
        return dict(kwargs)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as exc:
        raise ShardKeyError(f"task {task!r}: the call does not fit its arguments: {exc}", task=task) from exc
    bound.apply_defaults()
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            return {**bound.arguments[parameter.name], **bound.arguments}
    return bound.arguments
