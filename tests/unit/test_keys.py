"""Which values are keys, and where in a call the key is found."""

from __future__ import annotations

import enum
import inspect
from decimal import Decimal
from types import SimpleNamespace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_sharding.errors import ShardKeyError
from celery_sharding.keys import KeyReader, bind_arguments, key_of_message, key_text


class Color(str, enum.Enum):  # noqa: UP042  # the kind that users have
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


class Size(int, enum.Enum):
    BIG = 9


class Loud(str):
    __slots__ = ()

    def __str__(self) -> str:
        return self.upper()


def reader(function, rule) -> KeyReader:
    return KeyReader("shop.pay", rule, inspect.signature(function))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("42", "42"),
        (42, "42"),
        (-1, "-1"),
        (0, "0"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        ("schlüssel 🔑", "schlüssel 🔑"),
        (" ", " "),
        ("x" * 255, "x" * 255),
        ("ä" * 127, "ä" * 127),
    ],
)
def test_text_numbers_and_uuids_are_keys(value: object, text: str) -> None:
    assert key_text(value, task="t") == text


@pytest.mark.parametrize(("value", "text"), [(Color.RED, "red"), (Level.LOW, "1"), (Size.BIG, "9"), (Loud("a"), "a")])
def test_an_enum_is_the_value_that_travels_not_its_spelling_in_python(value: object, text: str) -> None:
    # Two publishers, one of which passes the enum and one its value, must reach the same shard.
    assert key_text(value, task="t") == text


@pytest.mark.parametrize(
    "value", [None, True, False, 1.0, float("nan"), [], ["a"], ("a",), {}, {"a"}, b"a", Decimal(1), object(), Exception]
)
def test_values_with_more_than_one_spelling_are_refused_by_what_they_are(value: object) -> None:
    with pytest.raises(ShardKeyError, match=r"'shop.pay'.*must be a str, an int or a UUID") as caught:
        key_text(value, task="shop.pay")
    assert caught.value.task == "shop.pay"


def test_a_large_value_does_not_fill_the_message() -> None:
    with pytest.raises(ShardKeyError) as caught:
        key_text(["x" * 1_000] * 1_000, task="t")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "empty"),
        ("x" * 256, "256 bytes.*at most 255"),
        ("ä" * 128, "256 bytes"),
        ("\ud800", "not valid text"),
        pytest.param(10**5000, "too large", id="5001 digits"),
        pytest.param(10**300, "301 bytes", id="301 digits"),
    ],
)
def test_keys_that_fit_no_routing_key_are_refused(value: object, message: str) -> None:
    with pytest.raises(ShardKeyError, match=message):
        key_text(value, task="t")


@given(st.one_of(st.text(), st.integers(), st.uuids(), st.booleans(), st.floats(), st.none(), st.lists(st.text())))
def test_every_value_is_a_key_that_fits_or_an_error_of_ours(value: object) -> None:
    try:
        text = key_text(value, task="t")
    except ShardKeyError:
        return
    assert 1 <= len(text.encode()) <= 255
    assert text == str(value)


def plain(order_id, amount, *, note="", shop="main"):
    pass


def with_default(amount, order_id="none-given"):
    pass


def many(first, *rest, order_id):
    pass


def open_ended(first, **options):
    pass


def positional(order_id, /, amount):
    pass


@pytest.mark.parametrize(
    ("function", "rule", "args", "kwargs", "key"),
    [
        (plain, "order_id", (1, 5), {}, "1"),
        (plain, "order_id", (), {"amount": 5, "order_id": 1}, "1"),
        (plain, "amount", (1, 5), {}, "5"),
        (plain, "note", (1, 5), {"note": "n"}, "n"),
        (plain, "shop", (1, 5), {}, "main"),
        (with_default, "order_id", (5,), {}, "none-given"),
        (with_default, "order_id", (5, "o"), {}, "o"),
        (many, "order_id", (1, 2, 3), {"order_id": 9}, "9"),
        (many, "first", (1, 2, 3), {"order_id": 9}, "1"),
        (open_ended, "order_id", (1,), {"order_id": 7}, "7"),
        (positional, "order_id", (4, 5), {}, "4"),
        (plain, lambda a: f"{a['shop']}/{a['order_id']}", (1, 5), {}, "main/1"),
        (plain, lambda a: a["order_id"], (), {"amount": 5, "order_id": 1}, "1"),
        (many, lambda a: len(a["rest"]), (1, 2, 3), {"order_id": 9}, "2"),
        (open_ended, lambda a: a["order_id"], (1,), {"order_id": 7}, "7"),
        (open_ended, lambda a: a["options"]["order_id"], (1,), {"order_id": 7}, "7"),
    ],
)
def test_the_key_is_found_wherever_the_call_has_it(function, rule, args, kwargs, key) -> None:
    assert reader(function, rule).read(args, kwargs) == key


@pytest.mark.parametrize(
    ("function", "rule", "args", "kwargs", "message"),
    [
        (plain, "order_id", (), {"amount": 5}, "no argument 'order_id'; call it with order_id=…"),
        (open_ended, "order_id", (1,), {}, "no argument 'order_id'"),
        (plain, None, (1, 5), {}, "has no shard key; set shard_key on the task"),
        (plain, "order_id", (None, 5), {}, "shard key is None"),
        (plain, "order_id", ([1], 5), {}, "list"),
        (plain, lambda a: a["oder_id"], (1, 5), {}, r"callable raised KeyError\('oder_id'\).*amount"),
        (plain, lambda a: None, (1, 5), {}, "shard key is None"),
        (plain, lambda a: a["order_id"], (1,), {}, "does not fit its arguments"),
    ],
)
def test_a_call_without_a_usable_key_is_told_what_to_do(function, rule, args, kwargs, message) -> None:
    with pytest.raises(ShardKeyError, match=message):
        reader(function, rule).read(args, kwargs)


@pytest.mark.parametrize("rule", ["oder_id", "rest", ""])
def test_a_rule_that_names_no_argument_is_found_before_any_call(rule: str) -> None:
    with pytest.raises(ShardKeyError, match="has no argument"):
        reader(plain, rule)
    with pytest.raises(ShardKeyError, match="did you mean 'order_id'"):
        reader(plain, "oder_id")


def test_without_the_task_only_keyword_arguments_have_names() -> None:
    # Given a process that does not have the task
    by_name = KeyReader("shop.pay", "order_id", None)
    by_callable = KeyReader("shop.pay", lambda a: a["order_id"], None)
    # When the key comes by keyword, then it is found
    assert by_name.read((), {"order_id": 1}) == by_callable.read((), {"order_id": 1}) == "1"
    # And by position it is an error that says how to call
    for found in (by_name, by_callable):
        with pytest.raises(ShardKeyError, match=r"not registered here.*keyword"):
            found.read((1,), {})


def test_bound_arguments_do_not_change_those_of_the_call() -> None:
    args, kwargs = [1], {"order_id": 2}
    bind_arguments("t", inspect.signature(open_ended), args, kwargs)
    assert (args, kwargs) == ([1], {"order_id": 2})


@pytest.mark.parametrize(
    ("exchange", "routing_key", "header", "key", "problem"),
    [
        ("shards.orders", "42", "43", "42", None),
        ("", "shards.orders.g001.000", "43", "43", None),
        ("", "shards.orders.g001.000", 43, "43", None),
        ("", "shards.orders.g001.000", None, "shards.orders.g001.000", None),
        ("", "shards.orders.g001.000", 1.5, "shards.orders.g001.000", "its header shard_key is no key: it is 1.5"),
        ("shards.orders", "\ud800", None, "\\ud800", "its routing key is not valid UTF-8"),
    ],
)
def test_a_message_of_the_groups_exchange_has_its_routing_key_and_any_other_names_its_key(
    exchange: str, routing_key: str, header: object, key: str, problem: str | None
) -> None:
    info = {"exchange": exchange, "routing_key": routing_key}
    message = SimpleNamespace(delivery_info=info, headers={"shard_key": header})
    found, wrong = key_of_message(message, exchange="shards.orders")
    assert found == key
    assert (wrong or "").startswith(problem or "")
    assert (wrong is None) == (problem is None)
