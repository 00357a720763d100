"""What a worker consumes: -Q and -X with groups and shards, beside ordinary queues; and its banner."""

from __future__ import annotations

import pytest
from celery import Celery
from kombu import Queue

from celery_sharding import ShardGroup, Sharding
from celery_sharding.errors import ConfigurationError, ShardingError, UnknownShard


def make_app(**conf: object) -> Celery:
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.update(conf)
    Sharding(app, groups=[ShardGroup("orders", shards=8), ShardGroup("mail", shards=2, ordering="shard")])
    return app


def consume(app: Celery, include: object = None, exclude: object = None) -> tuple[dict, list[str]]:
    """Do what a worker does with -Q and -X; return the groups and the ordinary queues it consumes."""
    app.amqp.queues.select(include)
    if exclude:
        app.amqp.queues.deselect(exclude)
    selection = {name: None if shards is None else sorted(shards) for name, shards in app.sharding.selection().items()}
    return selection, sorted(app.amqp.queues.consume_from)


ALL = {"orders": None, "mail": None}


@pytest.mark.parametrize(
    ("include", "exclude", "groups", "queues"),
    [
        (None, None, ALL, ["celery"]),
        ([], [], ALL, ["celery"]),
        (["orders"], None, {"orders": None}, []),
        (["orders.003"], None, {"orders": [3]}, []),
        (["orders/3", "orders.004", "orders.3"], None, {"orders": [3, 4]}, []),
        (["orders", "orders.003"], None, {"orders": None}, []),
        (["orders.003", "orders"], None, {"orders": None}, []),
        (["orders.7", "mail"], None, {"orders": [7], "mail": None}, []),
        (["celery"], None, {}, ["celery"]),
        (["fast"], None, {}, ["fast"]),
        (["celery", "orders"], None, {"orders": None}, ["celery"]),
        (None, ["orders"], {"mail": None}, ["celery"]),
        (None, ["orders.003"], {"orders": [0, 1, 2, 4, 5, 6, 7], "mail": None}, ["celery"]),
        (None, ["celery"], ALL, []),
        (None, ["orders", "mail"], {}, ["celery"]),
        (None, ["mail.0", "mail.1"], {"orders": None}, ["celery"]),
        (["orders"], ["orders.0"], {"orders": [1, 2, 3, 4, 5, 6, 7]}, []),
        (["orders.0"], ["orders.0"], {}, []),
        (["orders.0", "orders.1"], ["orders.0"], {"orders": [1]}, []),
        (["mail"], ["orders"], {"mail": None}, []),
    ],
)
def test_a_worker_consumes_what_it_is_told(include, exclude, groups, queues) -> None:
    assert consume(make_app(), include, exclude) == (groups, queues)


def test_names_may_stand_in_one_text_as_on_the_command_line() -> None:
    assert consume(make_app(), "orders") == ({"orders": None}, [])


@pytest.mark.parametrize("name", ["orders.8", "orders/99", "mail.2"])
def test_a_shard_that_the_group_does_not_have_is_an_error(name: str) -> None:
    for option in ("include", "exclude"):
        with pytest.raises(UnknownShard, match="has the shards 0 to"):
            consume(make_app(), **{option: [name]})


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("order", "orders"),
        ("ordres", "orders"),
        ("Orders", "orders"),
        ("ORDERS", "orders"),
        ("order.003", "orders.003"),
        ("orders-003", "orders.003"),
        ("orders:3", "orders.003"),
        ("order/3", "orders.003"),
        ("orders.", "orders"),
        ("mails", "mail"),
    ],
)
def test_a_near_miss_of_a_group_or_shard_is_an_ordinary_queue_and_a_warning(option, name, meant) -> None:
    # Given a worker, when -Q or -X has a name that is nearly a group's
    app = make_app()
    selected = consume(app, **{option: [name]})
    # Then it keeps Celery's meaning, and there is something to be said when the worker has a log
    assert selected == (({}, [name]) if option == "include" else (ALL, ["celery"]))
    flag = "-Q" if option == "include" else "-X"
    assert app.amqp.queues.warnings == [
        f"{flag} {name} names no shard group and is taken for an ordinary queue (did you mean {meant!r}?)"
    ]


@pytest.mark.parametrize("name", ["something-else", "celery", "fast", "003"])
def test_other_names_are_no_warnings(name: str) -> None:
    app = make_app()
    consume(app, [name])
    assert app.amqp.queues.warnings == []


def test_a_near_miss_is_told_where_celery_refuses_unknown_queues() -> None:
    app = make_app(task_create_missing_queues=False, task_queues=[Queue("celery")])
    with pytest.raises(KeyError, match="did you mean 'orders'"):
        consume(app, ["ordres"])


def test_groups_are_consumed_though_the_app_makes_no_queues() -> None:
    app = make_app(task_create_missing_queues=False, task_queues=[Queue("celery")])
    assert consume(app, ["orders", "mail.1"]) == ({"orders": None, "mail": [1]}, [])
    with pytest.raises(KeyError):
        consume(app, ["unknown"])


def test_shards_never_become_queues_of_celery() -> None:
    app = make_app()
    consume(app, ["orders", "celery"])
    assert set(app.amqp.queues) == {"celery"}


def test_an_ordinary_queue_with_the_name_of_a_group_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"task_queues has a queue called 'orders'.*rename"):
        consume(make_app(task_queues=[Queue("orders"), Queue("celery")]))
    with pytest.raises(ConfigurationError, match="'orders'"):
        consume(make_app(task_default_queue="orders"))
    with pytest.raises(ConfigurationError, match="is the shard group 'orders', not a queue"):
        make_app().amqp.queues["orders"]


def test_all_that_is_wrong_is_an_error_of_ours() -> None:
    assert issubclass(UnknownShard, ConfigurationError)
    assert issubclass(ConfigurationError, ShardingError)


def test_the_banner_shows_queues_and_groups() -> None:
    app = make_app()
    consume(app, ["celery", "orders", "mail.1"])
    lines = app.amqp.queues.format(indent=16, indent_first=False).splitlines()
    assert lines[0].startswith(".> celery")
    assert [line.split() for line in lines[1:]] == [
        [".>", "orders", "shards=all", "8", "ordering=key", "queue_type=quorum"],
        [".>", "mail", "shards=1", "ordering=shard", "queue_type=quorum"],
    ]
    assert all(line.startswith(" " * 16 + ".>") for line in lines[1:])


def test_the_banner_of_a_worker_without_ordinary_queues_shows_its_groups_alone() -> None:
    app = make_app()
    consume(app, ["orders.3"])
    assert app.amqp.queues.format(indent=16, indent_first=False).startswith(".> orders")
