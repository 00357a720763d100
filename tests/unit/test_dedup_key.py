"""Which argument of a call is its dedup key."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from celery_sharding.dedup.body import Body
from celery_sharding.dedup.options import Options

OPTIONS = Options("key", 60, 60, "wait", "wait", remember_failures=False, scope=None)


def plain(first: Any, key: Any = "default", *rest: Any, named: Any = None, **others: Any) -> None: ...


def by_name_only(first: Any, *, key: Any = "default") -> None: ...


def by_position_only(first: Any, key: Any = "default", /, **others: Any) -> None: ...


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "expected"),
    [
        (plain, (1, "a"), {}, "a"),
        (plain, (1, "a", 3, 4), {"named": 5, "other": 6}, "a"),
        (plain, (1,), {"key": "a"}, "a"),
        (plain, (), {"key": "a", "first": 1}, "a"),
        (plain, (1,), {}, "default"),
        (by_name_only, (1,), {"key": "a"}, "a"),
        (by_name_only, (1,), {}, "default"),
        (by_position_only, (1, "a"), {"key": "another"}, "a"),
    ],
)
def test_the_key_is_the_argument_that_the_task_will_see(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], expected: str
) -> None:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    assert Body(function, OPTIONS).argument("key", args, kwargs) == bound.arguments["key"] == expected


def test_a_call_without_its_key_is_no_call_of_the_task() -> None:
    def task(key: Any, other: Any) -> None: ...

    with pytest.raises(TypeError, match="key"):
        Body(task, OPTIONS).argument("key", (), {"other": 1})
