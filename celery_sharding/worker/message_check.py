"""What a task message must be like before Celery's code may have it: with anything else that fails later, or elsewhere.

Celery trusts its headers. A time limit that is no number raises in the event loop when the run is handed to the pool, a
count of retries that is none when the task asks for its next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_TEXTS = ("id", "task", "root_id", "parent_id", "group", "shadow", "argsrepr", "kwargsrepr", "origin", "lang")
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
    if not headers.get("id"):
        return "it has no id"
    for name in _NUMBERS:
        value = headers.get(name)
        if value is not None and not (isinstance(value, int) and value >= 0):
            return f"{name} is no count: {value!r}"
    limits = headers.get("timelimit")
    if limits and not (isinstance(limits, list | tuple) and len(limits) == 2 and all(map(_is_limit, limits))):
        return f"timelimit is no pair of seconds: {limits!r}"
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
    return None


def _is_limit(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0
