"""What the application may say about groups, routes and limits, and what it is told when that is wrong."""

from __future__ import annotations

import pickle
import re
from collections import ChainMap
from typing import Any

import pytest

from celery_sharding import ShardGroup, errors
from celery_sharding.config import Settings, read_settings
from celery_sharding.errors import ConfigurationError, ShardingError, UnknownGroup, UnknownShard
from celery_sharding.setting_names import check_names
from celery_sharding.shard_names import check_shard, parse_shard

ORDERS = ShardGroup("orders", shards=8)


@pytest.mark.parametrize("name", ["a", "orders", "a-b_c9", "a" * 40])
def test_good_names_are_taken(name: str) -> None:
    assert ShardGroup(name, shards=1).name == name


@pytest.mark.parametrize("name", ["", "Orders", "9a", "-a", "a.b", "a/b", "a b", "ä", "a" * 41, "orders\n", None, 7])
def test_a_bad_group_name_is_an_error_that_says_what_a_name_is(name: object) -> None:
    with pytest.raises(ConfigurationError, match="small letter"):
        ShardGroup(name, shards=1)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("shards", 0),
        ("shards", 1000),
        ("shards", -1),
        ("shards", True),
        ("shards", 2.0),
        ("shards", "8"),
        ("shards", None),
        ("max_attempts", 0),
        ("prefetch", 0),
        ("prefetch", 65_536),
        ("queue_type", "stream"),
        ("queue_type", None),
        ("ordering", "none"),
        ("on_failure", "retry"),
    ],
)
def test_an_option_out_of_range_is_an_error_that_names_it_and_the_group(option: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"'orders'.*{option}"):
        ShardGroup("orders", **{"shards": 8, option: value})


def test_a_near_miss_is_told_the_right_word() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'quorum'"):
        ShardGroup("orders", shards=8, queue_type="quorom")
    with pytest.raises(ConfigurationError, match="did you mean 'ordering'"):
        read_settings({"sharding_groups": {"orders": {"shards": 8, "orderin": "key"}}})


def test_groups_in_code_and_in_settings_stand_side_by_side() -> None:
    settings = read_settings(
        {"sharding_groups": {"mail": {"shards": 2, "ordering": "shard"}, "cards": ShardGroup("cards", shards=3)}},
        [ORDERS],
    )

    assert settings.groups == {
        "orders": ORDERS,
        "mail": ShardGroup("mail", shards=2, ordering="shard"),
        "cards": ShardGroup("cards", shards=3),
    }


@pytest.mark.parametrize(
    ("conf", "groups", "message"),
    [
        ({}, [ORDERS, ShardGroup("orders", shards=2)], "two shard groups are called 'orders'"),
        ({"sharding_groups": {"orders": {"shards": 8}}}, [ORDERS], "both in Sharding.*keep one"),
        ({"sharding_groups": {"mail": ORDERS}}, [], "two names must be one"),
        ({"sharding_groups": {"mail": {}}}, [], "lacks 'shards'"),
        ({"sharding_groups": {"mail": 8}}, [], "mapping"),
        ({"sharding_groups": ["mail"]}, [], "sharding_groups is a mapping"),
        ({"sharding_groups": {"Mail": {"shards": 1}}}, [], "small letter"),
        ({}, ["orders"], "takes ShardGroup objects"),
        ({"sharding_routes": {"a": {"key": "id"}}}, [ORDERS], "lacks 'group'"),
        ({"sharding_routes": {"a": "orders"}}, [ORDERS], "mapping"),
        ({"sharding_routes": {"a": {"group": "orders", "kee": "id"}}}, [ORDERS], "did you mean 'key'"),
        ({"sharding_routes": {"a": {"group": "orders", "key": 5}}}, [ORDERS], "name of an argument or a callable"),
        ({"sharding_publish_timeout_seconds": 0}, [], "sharding_publish_timeout_seconds.*above 0"),
        ({"sharding_heartbeat_seconds": "15"}, [], "sharding_heartbeat_seconds"),
        ({"sharding_consumer_timeout_seconds": True}, [], "sharding_consumer_timeout_seconds"),
        ({"sharding_heartbeat_file": ""}, [], "sharding_heartbeat_file is the path of a file"),
        ({"sharding_heartbeat_file": 5}, [], "sharding_heartbeat_file is the path of a file"),
    ],
)
def test_a_wrong_configuration_is_an_error_that_says_where(conf: dict, groups: list, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_settings(conf, groups)


def test_a_route_to_an_unknown_group_is_told_the_nearest() -> None:
    with pytest.raises(UnknownGroup, match=r"'orderz'.*did you mean 'orders'") as caught:
        read_settings({"sharding_routes": {"a": {"group": "orderz"}}}, [ORDERS])
    assert caught.value.group == "orderz"


def test_the_exact_name_of_a_task_wins_over_patterns_and_patterns_go_by_their_order() -> None:
    routes = {
        "shop.*": {"group": "orders", "key": "first"},
        "shop.mail.*": {"group": "orders", "key": "second"},
        "shop.mail.send": {"group": "orders", "key": "third"},
    }
    settings = read_settings({"sharding_routes": routes}, [ORDERS])

    assert settings.route_for("shop.pay").key == "first"
    assert settings.route_for("shop.mail.list").key == "first"
    assert settings.route_for("shop.mail.send").key == "third"
    assert settings.route_for("shops.pay") is None


def test_a_catch_all_leaves_the_tasks_of_celery_alone_unless_it_names_them() -> None:
    settings = read_settings({"sharding_routes": {"*": {"group": "orders"}}}, [ORDERS])
    assert settings.route_for("shop.pay") is not None
    assert settings.route_for("celery.chord_unlock") is None

    settings = read_settings({"sharding_routes": {"celery.*": {"group": "orders"}}}, [ORDERS])
    assert settings.route_for("celery.chord_unlock") is not None


@pytest.mark.parametrize(
    ("text", "index"), [("orders", None), ("orders.003", 3), ("orders/3", 3), ("orders.7", 7), ("orders.99", 99)]
)
def test_groups_and_shards_are_read_in_each_of_their_spellings(text: str, index: int | None) -> None:
    assert parse_shard(text, Settings(groups={"orders": ORDERS})) == (ORDERS, index)


@pytest.mark.parametrize("text", ["celery", "orders.x", "order.3", "orders.", "orders-3", ""])
def test_other_names_are_no_shards(text: str) -> None:
    assert parse_shard(text, Settings(groups={"orders": ORDERS})) is None


def test_a_shard_beyond_the_last_is_told_what_there_is() -> None:
    with pytest.raises(UnknownShard, match=r"shards 0 to 7; there is no orders\.008") as caught:
        check_shard("orders", 8, 8)
    assert (caught.value.group, caught.value.index, caught.value.shards) == ("orders", 8, 8)


def test_every_error_survives_pickling_with_its_facts() -> None:
    classes = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, ShardingError)]
    assert len(classes) > 20
    for cls in classes:
        copied = pickle.loads(pickle.dumps(cls("what to do", group="orders", index=3)))
        assert type(copied) is cls
        assert (str(copied), copied.group, copied.index) == ("what to do", "orders", 3)


def test_a_fact_that_an_error_does_not_have_is_an_ordinary_attribute_error() -> None:
    error = ConfigurationError("wrong", group="orders")
    assert not hasattr(error, "index")
    assert not hasattr(ShardingError.__new__(ShardingError), "group")


class Conf(ChainMap[str, Any]):
    """Settings as Celery has them: what was given, the defaults, and the namespace."""

    def __init__(self, given: dict[str, Any], prefix: str | None = None) -> None:
        super().__init__(given, {"broker_url": None})
        self.prefix = prefix


@pytest.mark.parametrize(
    ("name", "prefix", "right"),
    [
        ("sharding_route", None, "sharding_routes"),
        ("sharding_group", None, "sharding_groups"),
        ("shard_groups", None, "sharding_groups"),
        ("shard_routes", None, "sharding_routes"),
        ("sharidng_groups", None, "sharding_groups"),
        ("sharding_heartbeat_second", None, "sharding_heartbeat_seconds"),
        ("CELERY_SHARDING_GROUPS", None, "sharding_groups"),
        ("CELERY_SHARDING_ROUTE", "CELERY_", "CELERY_SHARDING_ROUTES"),
        ("celery_sharding_group", "celery_", "celery_sharding_groups"),
        ("sharding_route", "CELERY_", "CELERY_SHARDING_ROUTES"),
    ],
)
def test_a_misspelt_setting_is_an_error_that_names_the_right_one(name: str, prefix: str | None, right: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{name!r} is unknown and has no effect .*did you mean {right!r}"):
        read_settings(Conf({name: {"orders": {"shards": 1}}}, prefix))


@pytest.mark.parametrize(
    ("name", "prefix", "right"),
    [
        ("SHARDING_GROUPS", None, "sharding_groups"),
        ("SHARDING_GROUPS", "CELERY_", "CELERY_SHARDING_GROUPS"),
        ("SHARDING_ROUTES", "CELERY_", "CELERY_SHARDING_ROUTES"),
        ("SHARDING_ROUTE", "CELERY_", "CELERY_SHARDING_ROUTES"),
        ("SHARD_GROUPS", "CELERY_", "CELERY_SHARDING_GROUPS"),
    ],
)
def test_a_setting_outside_its_namespace_is_a_doubt(name: str, prefix: str | None, right: str) -> None:
    # It may be another library's, so it is no error
    [doubt] = check_names(Conf({name: {"orders": {"shards": 1}}}, prefix))
    assert doubt.startswith(f"the setting {name!r} is unknown and has no effect (did you mean {right!r}?)")


@pytest.mark.parametrize(
    ("given", "prefix"),
    [
        ({"sharding_groups": {}, "shard_count": 3, "SHARDING_DATABASES": 2, "sharding_key_of": len}, None),
        ({"CELERY_SHARDING_GROUPS": {}, "SHARDING_GROUPS": {}, "SHARDING_FOO": 1}, "CELERY_"),
        ({"sharding_groups": {}, "DATABASES": {}}, "CELERY_"),
    ],
)
def test_right_names_and_those_of_others_are_no_doubts(given: dict[str, Any], prefix: str | None) -> None:
    assert check_names(Conf(given, prefix)) == ()


@pytest.mark.parametrize("name", ["sharing_groups", "charging_groups", "sharing_routes"])
def test_a_setting_that_is_like_ours_and_a_word_of_its_own_is_only_told(name: str) -> None:
    conf = Conf({name: {}}, None)
    read_settings(conf)
    assert len(check_names(conf)) == 1


@pytest.mark.parametrize("value", ["amqp://me:hunter2@host", ["http://me:hun/ter2@host"], {"a": "x://me:hunt@er2@h"}])
@pytest.mark.parametrize("name", ["sharding_groups", "sharding_routes", "sharding_heartbeat_seconds"])
def test_an_error_shows_no_password_that_got_into_the_wrong_setting(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_settings({name: value if name == "sharding_heartbeat_seconds" else {"a": value}})
    assert not re.search("hun|er2", str(caught.value))
