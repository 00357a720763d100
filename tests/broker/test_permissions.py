"""Users with the permissions that `shards export` writes, and no others: what they can do, and that it takes all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import Connection

from celery_sharding import ShardGroup, Sharding
from celery_sharding.errors import PublishError, ShardingError, TopologyError, Unroutable
from celery_sharding.layout.ensure import ensure_group
from celery_sharding.layout.events import Operated, Paused
from celery_sharding.layout.lock import GroupLock
from celery_sharding.layout.manifest import load, write
from celery_sharding.monitoring.snapshot import read_snapshot
from celery_sharding.operations.dead_letters import read_dead
from celery_sharding.operations.locate import locate_keys
from celery_sharding.operations.permissions import Permissions, permissions_for
from celery_sharding.rabbitmq.channels import brief_channel
from celery_sharding.rabbitmq.streams import append
from celery_sharding.testing.processes import wait_until
from celery_sharding.topology import Names
from support.commands import call_shards
from support.shops import Shop
from support.virtual_hosts import VirtualHost

pytestmark = pytest.mark.timeout(150)

NAMES = Names("orders")


@pytest.fixture
def users(virtual_host: VirtualHost) -> dict[str, str]:
    """Role → user: the definitions of `shards export` are imported into an empty virtual host."""
    found = {role: virtual_host.add_user(role) for role in ("publisher", "worker", "operator")}
    app = Celery("export", broker=virtual_host.url(), set_as_current=False)
    app.conf.task_default_queue = "orders-plain"
    Sharding(app, groups=[ShardGroup("orders", 4)])
    asked = [f"--user={role}={user}" for role, user in found.items()]
    definitions = json.loads(call_shards(app, "export", "--format", "definitions", *asked).stdout)
    assert {each["user"] for each in definitions["permissions"]} == set(found.values())
    virtual_host.call("POST", "/api/definitions", definitions)
    return found


@pytest.fixture
def shop(virtual_host: VirtualHost, users: dict[str, str], tmp_path: Path) -> Iterator[Shop]:
    """A shop whose workers are the worker; the app that publishes to it is the publisher."""
    (tmp_path / "shop").mkdir()
    with Shop("orders", virtual_host.url(users["worker"]), tmp_path / "shop") as shop:
        yield shop


def publisher_app(shop: Shop, url: str) -> Celery:
    app = Celery("publisher", broker=url, backend=shop.env["SHOP_BACKEND"], set_as_current=False)
    app.conf.sharding_routes = {"shop.*": {"group": "orders", "key": "key"}}
    Sharding(app, groups=[ShardGroup("orders", 4)])
    return app


def test_a_worker_with_the_least_permissions_does_all_its_work_on_exchanges_that_were_imported(
    shop, users, virtual_host
):
    # Given exchanges that were imported, and nothing behind them yet
    app = publisher_app(shop, virtual_host.url(users["publisher"]))
    with pytest.raises(Unroutable, match="shards declare"):
        app.send_task("shop.step", kwargs={"key": "a", "number": 1})
    # When a worker starts
    worker = shop.worker("-c", "2", "-E", SHOP_ON_FAILURE="dead-letter", SHOP_MAX_ATTEMPTS="1")
    # Then tasks run, sharded and plain, are dead letters, also if they kill their process; remote control answers
    assert app.send_task("shop.step", kwargs={"key": "a", "number": 1}).get(timeout=30) == 1
    plain = Celery("plain", broker=virtual_host.url(users["worker"]), backend=shop.env["SHOP_BACKEND"])
    assert plain.send_task("shop.plain", (1,), queue="orders-plain").get(timeout=30) == 2
    for task in ("fail", "poison"):
        with pytest.raises(Exception, match=r"no luck|signal 9"):
            app.send_task(f"shop.{task}", kwargs={"key": "b", "number": 2}).get(timeout=60)
    assert plain.control.inspect(destination=[worker.name], timeout=10).ping() == {worker.name: {"ok": "pong"}}
    # And a lost ring is recovered
    with Connection(virtual_host.url()) as connection, brief_channel(connection) as channel:
        channel.exchange_delete(NAMES.ring(1))
    assert app.send_task("shop.step", kwargs={"key": "a", "number": 3}).get(timeout=60) == 3
    # And to import the definitions once more changes nothing
    exported = call_shards(shop.app, "export", "--format", "definitions", f"--user=publisher={users['publisher']}")
    virtual_host.call("POST", "/api/definitions", json.loads(exported.stdout))
    assert app.send_task("shop.step", kwargs={"key": "a", "number": 4}).get(timeout=30) == 4
    # And the operator sees it all
    operator = publisher_app(shop, virtual_host.url(users["operator"]))
    seen: list[Any] = []

    def shows_all() -> bool:  # counts come late
        seen.append(json.loads(call_shards(operator, "status", "--json").stdout)["groups"][0])
        return seen[-1]["dead_letters"] == 2 and all(row["owner"] == worker.name for row in seen[-1]["shards"])

    assert wait_until(shows_all, timeout_seconds=30), seen[-1]
    doctor = json.loads(call_shards(operator, "doctor", "--json").stdout)["groups"][0]["findings"]
    assert {each["check"] for each in doctor if each["severity"] == "error"} == set()
    assert [each["check"] for each in doctor if "not checked" in each["text"]] == ["management"]


def test_nothing_of_the_operators_permissions_can_be_left_out(virtual_host):
    # Given a declared group, and an operator
    ensure_group(lambda: Connection(virtual_host.url()), ShardGroup("orders", 2), owner="test")
    user = virtual_host.add_user("operator")
    whole = permissions_for("operator", ["orders"])

    def look() -> None:
        with Connection(virtual_host.url(user)) as connection:
            connection.connect()
            read_snapshot(connection, ["orders"])
            locate_keys(connection, NAMES, load(connection, NAMES), ["a"])

    def act() -> None:
        connect = lambda: Connection(virtual_host.url(user))  # noqa: E731
        with GroupLock(connect, NAMES, timeout_seconds=5) as lock, lock.operation() as connection:
            write(connection, NAMES, load(connection, NAMES), Paused(None), by="op")
            with brief_channel(connection) as channel:
                append(channel, NAMES.manifest, Operated("replay", by="op", result="2 replayed").as_dict())

    def replay() -> None:
        read_dead(lambda: Connection(virtual_host.url(user)), "orders", limit=1)
        publisher = Celery("replay", broker=virtual_host.url(user), set_as_current=False)
        publisher.conf.sharding_routes = {"step": {"group": "orders", "key": "key"}}
        Sharding(publisher, groups=[ShardGroup("orders", 2)])
        publisher.send_task("step", kwargs={"key": "a"})

    # When the operator has all
    virtual_host.permit(user, whole)
    for work in (look, act, replay):
        work()
    # Then each works; and none of its parts can be missing
    missing = {
        "configure": {r"shards\.orders": act},
        "write": {r"amq\.default$|": look, "orders($|": replay, r"|\.locate\.": look},
        "read": {"manifest|": look, "|journal": look, "|dead": replay, r"|locate\.": look},
    }
    for kind, parts in missing.items():
        for part, work in parts.items():
            expression = getattr(whole, kind)
            assert expression.count(part) == 1, (kind, part)
            less = expression.replace(part, {"orders($|": "orders(", r"shards\.orders": "nothing"}.get(part, ""))
            virtual_host.permit(user, replace(whole, **{kind: less}))
            with pytest.raises(ShardingError):
                work()


@pytest.mark.parametrize("kind", ["configure", "write", "read"])
def test_nothing_of_the_workers_permissions_on_a_group_can_be_left_out(virtual_host, kind):
    user = virtual_host.add_user("worker")
    whole = permissions_for("worker", ["orders"])
    virtual_host.permit(user, replace(whole, **{kind: "^$"}))

    with pytest.raises(TopologyError, match="write and read on"):
        ensure_group(lambda: Connection(virtual_host.url(user)), ShardGroup("orders", 2), owner="test")

    virtual_host.permit(user, whole)
    assert ensure_group(lambda: Connection(virtual_host.url(user)), ShardGroup("orders", 2), owner="test").shards == 2


def test_a_publisher_may_publish_to_its_groups_and_nowhere_else(virtual_host):
    for group in ("orders", "billing"):
        ensure_group(lambda: Connection(virtual_host.url()), ShardGroup(group, 2), owner="test")
    user = virtual_host.add_user("publisher")
    app = Celery("publisher", broker=virtual_host.url(user), set_as_current=False)
    app.conf.sharding_routes = {name: {"group": name, "key": "key"} for name in ("orders", "billing")}
    Sharding(app, groups=[ShardGroup("orders", 2), ShardGroup("billing", 2)])

    virtual_host.permit(user, permissions_for("publisher", ["orders"]))
    app.send_task("orders", kwargs={"key": "a"})
    with pytest.raises(PublishError, match="ACCESS_REFUSED"):
        app.send_task("billing", kwargs={"key": "a"})
    virtual_host.permit(user, Permissions("^$", "^$", "^$"))
    with pytest.raises(PublishError, match="ACCESS_REFUSED"):
        app.send_task("orders", kwargs={"key": "a"})
