"""What a task message must be like before Celery's code may have it: with anything else that fails later, or elsewhere.

Celery trusts its headers. A time limit that is no number raises in the event loop when the run is handed to the pool, a
count of retries that is none when the task asks for its next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from celery_sharding.texts import ID_CHARACTERS_MAX, cut, plain_text

_TEXTS = ("id", "task", "root_id", "parent_id", "group", "shadow", "argsrepr", "kwargsrepr", "origin", "lang")
_FOLLOWERS = ("callbacks", "errbacks", "chain")
_NUMBERS = ("retries", "replaced_task_nesting")


def find_flaw(headers: Mapping[Any, Any], payload: Any) -> str | None:
    """Return what is wrong with a task message, None if nothing is.

    Args:
        headers: Of the message; of one of protocol 1 its body.
        payload: The decoded body.
    """
    for name in _TEXTS:
        if headers.get(name) is not None and not isinstance(headers[name], str):
            return f"{name} is no text: {headers[name]!r}"
    task_id = headers.get("id") or ""
    if not task_id:
        return "it has no id"
    if len(task_id) > ID_CHARACTERS_MAX or "\0" in task_id or plain_text(task_id) != task_id:
        return f"its id is none that a result could be stored under: {cut(task_id, 40)}"
    for name in _NUMBERS:
        value = headers.get(name)
        if value is not None and not (isinstance(value, int) and value >= 0):
            return f"{name} is no count: {value!r}"
    limits = headers.get("timelimit")
    if limits and not (isinstance(limits, list | tuple) and len(limits) == 2 and all(map(_is_limit, limits))):
        return f"timelimit is no pair of seconds: {limits!r}"
    stamped, stamps = headers.get("stamped_headers"), headers.get("stamps")
    if stamped and not (isinstance(stamped, list | tuple) and all(isinstance(name, str) for name in stamped)):
        return f"stamped_headers is no list of names: {stamped!r}"
    if stamps and not isinstance(stamps, Mapping):
        return f"stamps is no mapping: {stamps!r}"
    if isinstance(payload, Mapping) and headers is not payload and "args" not in payload:
        # Celery takes it for a body of protocol 2 and unpacks its names: nothing runs, and that counts as a success.
        return "its body is a mapping without args, and its headers name the task"
    return _find_flaw_of_call(payload)


def _find_flaw_of_call(payload: Any) -> str | None:
    if isinstance(payload, Mapping):
        args, kwargs, embed = payload.get("args", ()), payload.get("kwargs", {}), None
    elif isinstance(payload, list | tuple) and len(payload) == 3:
        args, kwargs, embed = payload
    else:
        return f"its body is no call: {type(payload).__name__}"
    if not isinstance(args, list | tuple):
        return f"its arguments are no list: {type(args).__name__}"
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        return "its keyword arguments are no mapping of names"
    if embed is not None and not isinstance(embed, Mapping):
        return f"the third part of its body is no mapping: {type(embed).__name__}"
    followers = payload if isinstance(payload, Mapping) else embed or {}
    for name in _FOLLOWERS:
        value = followers.get(name)
        if value is not None and not (
            isinstance(value, list | tuple) and all(isinstance(each, Mapping) for each in value)
        ):
            return f"its {name} are no signatures"
    if not isinstance(followers.get("chord") or {}, Mapping):
        return "its chord is no signature"
    return None


def _is_limit(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0
